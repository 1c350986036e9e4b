"""Costs of a denoiser's step: counted from its config, read from its compiled program, and bounded from below.

Counted costs need no compilation: searches rank candidates by them, and compile only the promising ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from dit_video.core.hlo import CollectiveTraffic
from dit_video.core.platform.devices import Platform
from dit_video.distributed import AXES, MeshPartitioner
from dit_video.distributed.sharding import STATE_AXES
from dit_video.models.backbones.flops import count_attention_flops, count_forward_flops
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.nn import Linear, get_graph_def, get_param_shapes
from dit_video.nn.attention import BackendName, SplashBlocks
from dit_video.nn.attention.splash import DEFAULT_BLOCKS
from dit_video.planning.compiled_program import CompiledStep, MemoryUsage
from dit_video.planning.roofline import StepWork
from dit_video.tokens import Grid, LayoutShape


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


Purpose = Literal["weights", "attention"]
"""Purpose of collectives: to gather weights and sum their gradients, or to exchange tokens in attention."""


def count_step_costs(
    backbone: BackboneConfig,
    row_shape: LayoutShape,
    platform: Platform,
    *,
    rows: int,
    clips: Sequence[Grid],
    texts: Sequence[int],
    images: Sequence[int] = (),
    training: bool = True,
) -> StepSpec:
    """Return the counted costs of a denoiser's step on rows of the same clips.

    Args:
      backbone: Config of the denoiser.
      row_shape: Shape of a row.
      platform: Platform of the devices, by which attention is counted.
      rows: Rows of the global batch.
      clips: Grids of the clips of each row, in tokens.
      texts: Number of text tokens of each clip.
      images: Number of image tokens of each clip, for models that use them.
      training: True for a training step, False for a pass of sampling.
    """
    attention = backbone.resolve_attention(platform, tokens=row_shape.tokens, segments=row_shape.segments)[0]
    return StepSpec(
        width=backbone.width,
        mlp_dim=backbone.mlp_dim,
        layers=backbone.layers,
        tokens_per_row=row_shape.tokens,
        rows=rows,
        itemsize=jnp.dtype(backbone.dtype).itemsize,
        remat=backbone.remat,
        forward_flops=rows * count_forward_flops(backbone, clips, texts, images=images),
        attention_flops=rows * count_attention_flops(backbone, clips, texts),
        attention=attention,
        query_block=_find_query_block(backbone, attention, row_shape.tokens),
        training=training,
    )


def count_context_weights(backbone: BackboneConfig) -> int:
    """Return the number of weights of a denoiser's linear maps of a context."""
    model = nnx.merge(get_graph_def(backbone.make), get_param_shapes(backbone.make))
    layers = (layer for _, layer in nnx.iter_graph(model) if isinstance(layer, Linear) and layer.is_context)
    return sum(layer.kernel.get_value().size for layer in layers)


def read_step_work(
    compiled: CompiledStep, costs: StepSpec | None, *, model_flops: int, devices: int = 1, turns: int = 1
) -> StepWork:
    """Return the work of a compiled step on each device.

    The program's kernels, which are attention, are opaque to the compiler's counts, and loops over a data-dependent
    number of blocks are counted as one turn; the known costs of both are added.

    Args:
      compiled: The step.
      costs: Its counted costs; None if they are not known.
      model_flops: Operations of the model on all devices, which stand for a program that does not fit in memory.
      devices: Number of devices.
      turns: Number of times that the costs are incurred.
    """
    program = compiled.program
    if program is None:
        executed = model_flops if costs is None else costs.executed_flops * turns
        return StepWork(flops=executed / devices, bytes=0.0, collectives=())
    flops, traffic, attention = program.flops, program.bytes, 0.0
    if costs is not None:
        attention = costs.executed_attention_flops * turns / devices
        if program.kernel_calls:
            flops += attention
            traffic += costs.attention_bytes * turns / devices
        elif program.unknown_loops:
            flops = max(flops, costs.executed_flops * turns / devices)
    moved = [*program.collectives.values(), *program.slice_transfers.values()]
    return StepWork(
        flops=flops,
        bytes=traffic,
        collectives=tuple(sorted(moved, key=lambda part: -part.bytes)),
        attention_flops=min(attention, flops),
        attention=None if costs is None else costs.attention,
    )


def estimate_step(
    step: StepSpec,
    state_bytes: Mapping[str, int],
    layer_bytes: int,
    mesh: Mapping[str, int],
    slices: Mapping[str, int] | None = None,
) -> tuple[MemoryUsage, StepWork]:
    """Estimate the memory and the work of a step on one device.

    Args:
      step: Sizes and FLOPs of the step.
      state_bytes: Bytes of the state on one device by kind, as `count_argument_bytes` returns them.
      layer_bytes: Bytes of one unsharded layer's parameters in float32.
      mesh: Sizes of the mesh's axes by name.
      slices: Number of slices along each axis; None for a single slice.
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


def compute_min_collective_bytes(
    step: StepSpec,
    parameters: int,
    partitioner: MeshPartitioner,
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
      step: A training step that updates all weights.
      parameters: Number of the model's parameters.
      partitioner: The mesh, and the method of attention over `context`.
      context_weights: Number of those parameters that are weights of maps of a context.
    """
    data, fsdp, tensor, context = (partitioner.mesh.shape[name] for name in AXES)
    forwards = 2 if step.is_recomputed else 1
    values = step.layers * step.rows * step.tokens_per_row // (data * fsdp * context) * step.width // tensor
    if partitioner.context_attention == "ulysses":
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


_BACKWARD_RATIOS = {"dense": 2.0, "splash": 3.5}
"""FLOPs of an attention backend's backward pass, in units of its forward pass (2 matrix products).

The scores are recomputed once (5 products, arXiv 2205.14135), unless they were kept. Splash computes the gradient of
the queries with 3 products, and that of keys and values with 4, in two kernels.
"""
_DEFAULT_BACKWARD_RATIO = 2.5


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


def _find_query_block(backbone: BackboneConfig, attention: BackendName, tokens: int) -> int | None:
    """Return the queries per block of a kernel that reads all keys once a block; None if it is not known."""
    if attention != "splash":
        return None
    blocks = backbone.attention if isinstance(backbone.attention, SplashBlocks) else DEFAULT_BLOCKS
    return blocks.resolve(tokens, tokens).block_q


_ATTENTION_KINDS = ("all-to-all", "collective-permute")
"""Collectives that attention uses over `context`; others over it gather weights and sum gradients."""


def _get_purpose(part: CollectiveTraffic) -> Purpose | None:
    if part.axes == ("context",) and part.kind in _ATTENTION_KINDS:
        return "attention"
    return "weights" if {*part.axes} <= {*STATE_AXES, "part of"} else None
