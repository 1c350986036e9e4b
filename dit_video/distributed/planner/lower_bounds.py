"""Lower bound on the bytes a training step must communicate, to compare compiled programs with."""

from collections.abc import Mapping, Sequence

from dit_video.distributed.mesh import ContextAttention
from dit_video.distributed.planner.estimate import StepSpec
from dit_video.distributed.planner.hlo import CollectiveTraffic

_ATTENTION_KINDS = ("all-to-all", "collective-permute")
"""Collectives that attention uses over `context`; all-reduces over it sum gradients and don't count."""


def compute_min_collective_bytes(
    step: StepSpec, parameters: int, mesh: Mapping[str, int], context_attention: ContextAttention
) -> dict[str, float]:
    """Return the bytes that a device must receive over `fsdp`, and over `context` for attention; skip axes of size 1.

    - `fsdp` (arXiv 1910.02054): `(n - 1) / n` of all weights in the dtype of products, and of their gradients in
      float32. The weights are gathered for the forward pass and again for the backward pass if it recomputes
      activations; else the gathered weights are kept.
    - `context`, `ulysses` (arXiv 2309.14509): `(n - 1) / n` of a device's queries, keys, values and results, once for
      each forward pass (including a recomputed one) and once for their gradients.
    - `context`, `ring` (arXiv 2310.01889): keys and values of the `n - 1` other devices in each pass, and the gradients
      of both in float32.

    Args:
      step: a training step that updates all weights.
      parameters: number of the model's parameters.
      mesh: sizes of the mesh's axes by name.
      context_attention: how attention is parallelised over `context`.
    """
    fsdp, tensor, context = (mesh[name] for name in ("fsdp", "tensor", "context"))
    forwards = 2 if step.is_recomputed else 1
    values = step.layers * step.rows * step.tokens_per_row // (mesh["data"] * fsdp * context) * step.width // tensor
    if context_attention == "ulysses":
        attention = 4 * (forwards + 1) * (context - 1) / context * values * step.itemsize
    else:
        attention = (context - 1) * values * 2 * ((forwards + 1) * step.itemsize + 4)
    weights = (fsdp - 1) / fsdp * parameters / tensor * (forwards * step.itemsize + 4)
    return {name: size for name, size in (("fsdp", weights), ("context", attention)) if mesh[name] > 1}


def sum_collective_bytes(axis: str, collectives: Sequence[CollectiveTraffic]) -> float:
    """Return the bytes of a program's collectives over one axis that `compute_min_collective_bytes` bounds."""
    over = [part for part in collectives if part.axes == (axis,)]
    return sum(part.bytes for part in over if axis == "fsdp" or part.kind in _ATTENTION_KINDS)
