"""Lower bound on the bytes a training step must communicate, to compare compiled programs with."""

from collections.abc import Mapping, Sequence
from typing import Literal

from dit_video.distributed.mesh import ContextAttention
from dit_video.distributed.sharding import STATE_AXES
from dit_video.planning.estimate import StepSpec
from dit_video.planning.hlo import CollectiveTraffic

Purpose = Literal["weights", "attention"]
"""Purpose of collectives: to gather weights and sum their gradients, or to exchange tokens in attention."""

_ATTENTION_KINDS = ("all-to-all", "collective-permute")
"""Collectives that attention uses over `context`; others over it gather weights and sum gradients."""


def compute_min_collective_bytes(
    step: StepSpec,
    parameters: int,
    mesh: Mapping[str, int],
    context_attention: ContextAttention,
    *,
    context_weights: int = 0,
) -> dict[Purpose, float]:
    """Return the bytes that a device must receive for weights and for attention; skip a purpose that needs none.

    - weights, over the `n` devices of `fsdp` x `context` (arXiv 1910.02054): `(n - 1) / n` of all weights in the dtype
      of products, and of their gradients in float32. The weights are gathered for the forward pass and again for the
      backward pass if it recomputes activations; else the gathered weights are kept. Devices of `context` have the
      same captions, so the gradients of the maps of these are summed over `fsdp` alone, a part by each device.
    - attention over `context`, `ulysses` (arXiv 2309.14509): `(n - 1) / n` of a device's queries, keys, values and
      results, once for each forward pass (including a recomputed one) and once for their gradients.
    - attention over `context`, `ring` (arXiv 2310.01889): keys and values of the `n - 1` other devices in each pass,
      and the gradients of both in float32.

    Sums over `data` and `tensor` are not counted.

    Args:
      step: a training step that updates all weights.
      parameters: number of the model's parameters.
      mesh: sizes of the mesh's axes by name.
      context_attention: how attention is parallelised over `context`.
      context_weights: number of those parameters that are weights of maps of a context.
    """
    fsdp, tensor, context = (mesh[name] for name in ("fsdp", "tensor", "context"))
    forwards = 2 if step.is_recomputed else 1
    values = step.layers * step.rows * step.tokens_per_row // (mesh["data"] * fsdp * context) * step.width // tensor
    if context_attention == "ulysses":
        attention = 4 * (forwards + 1) * (context - 1) / context * values * step.itemsize
    else:
        attention = (context - 1) * values * 2 * ((forwards + 1) * step.itemsize + 4)
    shards = fsdp * context
    gathered = (shards - 1) / shards * parameters * forwards * step.itemsize
    summed = (shards - 1) / shards * (parameters - context_weights) + (fsdp - 1) / fsdp * context_weights / context
    weights = (gathered + 4 * summed) / tensor
    bounds: dict[Purpose, float] = {"weights": weights, "attention": attention}
    return {purpose: size for purpose, size in bounds.items() if size}


def sum_collective_bytes(purpose: Purpose, collectives: Sequence[CollectiveTraffic]) -> float:
    """Return the bytes of a program's collectives for a purpose that `compute_min_collective_bytes` bounds.

    Collectives over a part of `fsdp` x `context` count, too: arrays that both do not divide are sharded over one.
    """
    return sum(part.bytes for part in collectives if _get_purpose(part) == purpose)


def _get_purpose(part: CollectiveTraffic) -> Purpose | None:
    if part.axes == ("context",) and part.kind in _ATTENTION_KINDS:
        return "attention"
    return "weights" if {*part.axes} <= {*STATE_AXES, "part of"} else None
