"""Closed-form estimate of the memory, work and collectives of a transformer step, without compiling it.

Plans are ranked by these estimates, so that only the promising ones have to be compiled.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dit_video.distributed.sharding import STATE_AXES
from dit_video.planning.compiled_program import MemoryUsage
from dit_video.planning.hlo import CollectiveTraffic
from dit_video.planning.roofline import StepWork

_BACKWARD_RATIOS = {"dense": 2.0, "splash": 3.5}
"""FLOPs of an attention backend's backward pass, in units of its forward pass (2 matrix products).

The scores are recomputed once (5 products, arXiv 2205.14135), unless they were kept. Splash computes the gradient of
the queries with 3 products, and that of keys and values with 4, in two kernels.
"""
_DEFAULT_BACKWARD_RATIO = 2.5


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """Sizes and FLOPs of a training or sampling step, as its config defines them."""

    width: int
    mlp_dim: int
    layers: int
    tokens_per_row: int
    """Tokens of one packed row, including padding."""
    rows: int
    """Rows of the global batch."""
    itemsize: int
    """Bytes per value of the inputs of matrix products."""
    remat: str
    forward_flops: int
    """FLOPs of the forward pass over the global batch, including attention."""
    attention_flops: int
    attention: str = "splash"
    """Backend of self-attention."""
    query_block: int | None = None
    """Queries per block of a fused kernel, which reads all keys and values once a block; None if unknown or unfused."""
    training: bool = True
    accumulation: int = 1
    """Microbatches that the rows are divided into, whose gradients are computed one after the other and summed."""

    def resize(self, rows: int, remat: str) -> "StepSpec":
        """Return the step of the same model for another number of rows and another recomputation policy."""
        forward, attention = self.forward_flops // self.rows * rows, self.attention_flops // self.rows * rows
        return replace(self, rows=rows, remat=remat, forward_flops=forward, attention_flops=attention)

    @property
    def is_recomputed(self) -> bool:
        """Return True if the backward pass recomputes activations, which repeats the forward pass's collectives."""
        return self.training and self.remat != "none"

    @property
    def is_attention_recomputed(self) -> bool:
        """Return True if the backward pass recomputes attention."""
        return self.is_recomputed and self.remat not in ("attention", "dots_attention")

    @property
    def is_matmul_recomputed(self) -> bool:
        """Return True if the backward pass recomputes the products with weights, as none of their results are kept."""
        return self.is_recomputed and self.remat in ("full", "attention")

    @property
    def executed_flops(self) -> int:
        """Return the FLOPs that are executed, including recomputation."""
        products = self.forward_flops - self.attention_flops
        passes = (4 if self.is_matmul_recomputed else 3) if self.training else 1
        return products * passes + self.executed_attention_flops

    @property
    def executed_attention_flops(self) -> int:
        """Return the FLOPs that attention executes, including recomputation, and pairs that dense attention masks."""
        forward = self.attention_flops
        if self.attention == "dense":
            forward = max(forward, 4 * self.width * self.layers * self.rows * self.tokens_per_row**2)
        if not self.training:
            return forward
        backward = _BACKWARD_RATIOS.get(self.attention, _DEFAULT_BACKWARD_RATIO)
        return round(((2 if self.is_attention_recomputed else 1) + backward) * forward)

    @property
    def attention_bytes(self) -> int:
        """Return the bytes that attention kernels read on all devices.

        The forward pass and the gradient of the queries read all keys and values for each block of queries; the
        gradient of keys and values reads all queries and their gradients for each block of keys.
        """
        if self.query_block is None:
            return 0
        passes = (4 if self.is_attention_recomputed else 3) if self.training else 1
        return passes * self.attention_flops * self.itemsize // (2 * self.query_block)


def estimate_step(
    step: StepSpec,
    state_bytes: Mapping[str, int],
    layer_bytes: int,
    mesh: Mapping[str, int],
    slices: Mapping[str, int] | None = None,
) -> tuple[MemoryUsage, StepWork]:
    """Estimate the memory and the work of a step on one device.

    Args:
      step: sizes and FLOPs of the step.
      state_bytes: bytes of the state on one device by kind, as `count_argument_bytes` returns them.
      layer_bytes: bytes of one unsharded layer's parameters in float32.
      mesh: sizes of the mesh's axes by name.
      slices: number of slices along each axis; None for a single slice.
    """
    devices, tensor = math.prod(mesh.values()), mesh["tensor"]
    rows = step.rows // step.accumulation
    local_tokens = rows * step.tokens_per_row // (mesh["data"] * mesh["fsdp"] * mesh["context"])
    residual = 4 * local_tokens * step.width
    # One layer stores the residual stream and its six modulations in float32 and, in the dtype of products,
    # queries, keys, values, attention's output and the hidden layer of the MLP.
    layer_activations = 10 * residual + local_tokens * (8 * step.width + 3 * step.mlp_dim) * step.itemsize // tensor
    product_results = local_tokens * (8 * step.width + step.mlp_dim) * step.itemsize // tensor
    attention = local_tokens * step.width * step.itemsize // tensor
    saved = {"full": 0, "offload": 0, "attention": attention, "dots_attention": product_results + attention}
    layer_saved = layer_activations if step.remat == "none" else residual + saved.get(step.remat, product_results)
    activations = step.layers * layer_saved if step.training else 0
    gathered = 2 * layer_bytes // 4 * step.itemsize // tensor
    # Sums over the microbatches are kept beside the gradients of the current one.
    gradients = state_bytes["parameters"] * min(2, step.accumulation) if step.training else 0
    temporary = gradients + gathered + (2 * layer_activations if step.training else layer_activations)
    peak = sum(state_bytes.values()) + activations + temporary
    memory = MemoryUsage(**state_bytes, activations=activations, temporary=temporary, peak=peak)
    # The state is read and written once; the activations of a layer about twice in each pass.
    passes = (4 if step.is_matmul_recomputed else 3) if step.training else 1
    layer_traffic = passes * step.layers * (2 * layer_activations + gathered)
    traffic = 2 * sum(state_bytes.values()) + step.accumulation * layer_traffic + step.attention_bytes / devices
    collectives = _list_collectives(step, state_bytes, layer_bytes, mesh, local_tokens)
    parts = [part for each in collectives for part in split_over_slices(each, mesh, slices or {})]
    return memory, StepWork(
        flops=step.executed_flops / devices,
        bytes=float(traffic),
        collectives=tuple(part for part in parts if part.bytes),
        attention_flops=step.executed_attention_flops / devices,
        attention=step.attention,
    )


def split_over_slices(
    traffic: CollectiveTraffic, mesh: Mapping[str, int], slices: Mapping[str, int]
) -> list[CollectiveTraffic]:
    """Divide a collective over axes of the mesh into its parts inside the slices and between them.

    Arrays are gathered from the counterparts in other slices first, then inside the slice; sums take the reverse way.
    """
    size = math.prod(mesh[axis] for axis in traffic.axes)
    count = math.prod(slices.get(axis, 1) for axis in traffic.axes)
    if count == 1 or not traffic.bytes:
        return [traffic]
    inner, values = size // count, traffic.bytes * size / (size - 1)
    outside = values * (count - 1) / (count if traffic.kind == "all-to-all" else size)
    inside = traffic.bytes - outside
    return [replace(traffic, bytes=inside if inner > 1 else 0.0), replace(traffic, bytes=outside, between_slices=True)]


def _list_collectives(
    step: StepSpec, state_bytes: Mapping[str, int], layer_bytes: int, mesh: Mapping[str, int], local_tokens: int
) -> list[CollectiveTraffic]:
    """Return the unavoidable collectives, with the bytes that each device receives."""
    tensor, context, data = (mesh[name] for name in ("tensor", "context", "data"))
    state_axes = tuple(name for name in STATE_AXES if mesh[name] > 1)
    shards = math.prod(mesh[name] for name in state_axes)
    passes = (3 if step.is_recomputed else 2) if step.training else 1
    gathers = 2 if step.is_recomputed else 1  # without recomputation the gathered weights are kept

    def remote_share(size: int) -> float:
        return (size - 1) / size

    # Each microbatch gathers the weights and sums gradients anew.
    passes, gathers = passes * step.accumulation, gathers * step.accumulation
    weights, count = step.layers * layer_bytes // tensor, passes * step.layers
    local_values = local_tokens * step.width
    gathered = gathers * remote_share(shards) * weights / 4 * step.itemsize
    exchanged = 4 * count * remote_share(context) * local_values * step.itemsize / tensor
    summed = 2 * 3 * count * remote_share(tensor) * local_values * 4
    collectives = [
        CollectiveTraffic("all-gather", state_axes, gathered, gathers * step.layers),
        # Queries, keys, values and attention's output (arXiv 2309.14509), and their gradients in the backward pass.
        CollectiveTraffic("all-to-all", ("context",), exchanged, 4 * count),
        # Sums after attention and MLP, and of the gradients of their inputs (arXiv 1909.08053, section 3).
        CollectiveTraffic("all-reduce", ("tensor",), summed, 3 * count),
    ]
    if step.training:
        collectives += [
            CollectiveTraffic(
                "reduce-scatter",
                state_axes,
                step.accumulation * remote_share(shards) * weights,
                step.accumulation * step.layers,
            ),
            CollectiveTraffic("all-reduce", ("data",), 2 * remote_share(data) * state_bytes["parameters"], 1),
        ]
    return collectives
