"""Costs of a denoiser's step: counted from its config, and read from its compiled program."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from dit_video.core.platform.devices import Platform
from dit_video.models.backbones.flops import count_attention_flops, count_forward_flops
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.nn import Linear, get_graph_def, get_param_shapes
from dit_video.nn.attention import BackendName, SplashBlocks
from dit_video.nn.attention.splash import DEFAULT_BLOCKS
from dit_video.planning.compiled_program import CompiledStep
from dit_video.planning.estimate import StepSpec
from dit_video.planning.roofline import StepWork
from dit_video.tokens import Grid, LayoutShape


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
      backbone: config of the denoiser.
      row_shape: shape of a row.
      platform: platform of the devices, by which attention is counted.
      rows: rows of the global batch.
      clips: grids of the clips of each row, in tokens.
      texts: number of text tokens of each clip.
      images: number of image tokens of each clip, for models that use them.
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


def _find_query_block(backbone: BackboneConfig, attention: BackendName, tokens: int) -> int | None:
    """Return the queries per block of a kernel that reads all keys once a block; None if it is not known."""
    if attention != "splash":
        return None
    blocks = backbone.attention if isinstance(backbone.attention, SplashBlocks) else DEFAULT_BLOCKS
    return blocks.resolve(tokens, tokens).block_q


def read_step_work(
    compiled: CompiledStep, costs: StepSpec | None, *, model_flops: int, devices: int = 1, turns: int = 1
) -> StepWork:
    """Return the work of a compiled step on each device.

    The program's kernels, which are attention, are opaque to the compiler's counts, and loops over a data-dependent
    number of blocks are counted as one turn; the known costs of both are added.

    Args:
      compiled: the step.
      costs: its counted costs; None if they are not known.
      model_flops: operations of the model on all devices, which stand for a program that does not fit in memory.
      devices: number of devices.
      turns: number of times that the costs are incurred.
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
