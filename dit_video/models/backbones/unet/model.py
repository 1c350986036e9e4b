"""U-Net over space and time for dense batches and canvases.

Residual blocks of factorised convolutions at several resolutions (Video Diffusion Models, arXiv 2204.03458), with
attention to the clip and to its text at the lower ones, as in latent diffusion (arXiv 2112.10752).
"""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.models.backbones.unet.blocks import (
    HALF,
    AttentionBlock,
    ClipNorm,
    ConvBlock,
    merge_positions,
    repeat_positions,
)
from dit_video.models.backbones.unet.config import SPATIAL_KERNEL, TIME_FEATURES, UnetArchitecture
from dit_video.models.conditioning import Conditioning, TextTokens
from dit_video.nn import ONE_DEVICE, CausalConv, Linear, Parallelism, sinusoidal_embedding
from dit_video.tokens import Canvas, RowView


class _LevelInputs(NamedTuple):
    """Inputs that all blocks of a level share, besides the features."""

    condition: Float[Array, "B G c"]
    text: TextTokens | None
    layout: Canvas
    """Places of the clips at the level's resolution."""
    rows: RowView


class _UnetLevel(nnx.Module):
    """Residual blocks at one resolution, each followed by attention where the config says so."""

    def __init__(self, width_in: int, level: int, config: UnetArchitecture, *, parallel: Parallelism, rngs: nnx.Rngs):
        width, blocks = config.widths[level], range(config.blocks)
        attends = level in config.attention_levels
        self.residual = nnx.List([ConvBlock(width_in, width, config, rngs=rngs) for _ in blocks])
        self.attention = nnx.List(
            [AttentionBlock(width, config, parallel=parallel, rngs=rngs) for _ in blocks if attends]
        )

    def apply(self, index: int, x: Float[Array, "B t h w i"], inputs: _LevelInputs) -> Float[Array, "B t h w o"]:
        """Apply one of the blocks, and its attention."""
        x = self.residual[index](x, inputs.condition, inputs.layout)
        return self.attention[index](x, inputs.text, inputs.layout, inputs.rows) if len(self.attention) else x


class Unet(nnx.Module):
    """A U-Net on dense batches and canvases; see `Backbone`."""

    def __init__(self, config: UnetArchitecture, *, parallel: Parallelism = ONE_DEVICE, rngs: nnx.Rngs):
        self.config = config
        widths, dtype = config.widths, jnp.dtype(config.dtype)
        levels, last = range(len(widths)), widths[-1]
        self.time_in = Linear(TIME_FEATURES, config.condition_width, precision="highest", rngs=rngs)
        self.time_out = Linear(config.condition_width, config.condition_width, precision="highest", rngs=rngs)
        self.embed = CausalConv(config.channels, widths[0], SPATIAL_KERNEL, dtype=dtype, rngs=rngs)
        self.down = nnx.List(
            [_UnetLevel(widths[level], level, config, parallel=parallel, rngs=rngs) for level in levels]
        )
        self.shrink = nnx.List(
            [Linear(HALF.volume * fine, coarse, dtype=dtype, rngs=rngs) for fine, coarse in itertools.pairwise(widths)]
        )
        self.middle_in = ConvBlock(last, last, config, rngs=rngs)
        self.middle_attention = AttentionBlock(last, config, parallel=parallel, rngs=rngs)
        self.middle_out = ConvBlock(last, last, config, rngs=rngs)
        self.up = nnx.List(
            [_UnetLevel(2 * widths[level], level, config, parallel=parallel, rngs=rngs) for level in levels]
        )
        self.grow = nnx.List(
            [
                CausalConv(coarse, fine, SPATIAL_KERNEL, dtype=dtype, rngs=rngs)
                for fine, coarse in itertools.pairwise(widths)
            ]
        )
        self.head_norm = ClipNorm(widths[0], config.groups)
        self.head = CausalConv(widths[0], config.channels, SPATIAL_KERNEL, init="zero", rngs=rngs)

    def __call__(
        self,
        noisy: Float[Array, "B N c"],
        time: Float[Array, "B G"],
        layout: Canvas,
        conditioning: Conditioning,
        state: Any = None,
    ) -> tuple[Float[Array, "B N c"], Any]:
        """Predict from noisy latents; see `Backbone`."""
        conditioning.check(self.config.conditioning_kinds)
        levels = self._prepare_levels(time, layout, conditioning)
        x, skips = self.embed(layout.mask_padding(layout.to_array(noisy))), []
        for number, (level, inputs) in enumerate(zip(self.down, levels, strict=True)):
            if number:
                x = self.shrink[number - 1](merge_positions(x))
            for index in range(self.config.blocks):
                x = level.apply(index, x, inputs)
                skips.append(x)
        x = self.middle_in(x, levels[-1].condition, levels[-1].layout)
        x = self.middle_attention(x, levels[-1].text, levels[-1].layout, levels[-1].rows)
        x = self.middle_out(x, levels[-1].condition, levels[-1].layout)
        for number in reversed(range(len(levels))):
            for index in range(self.config.blocks):
                x = self.up[number].apply(index, jnp.concatenate([x, skips.pop()], axis=-1), levels[number])
            if number:
                x = self.grow[number - 1](levels[number - 1].layout.mask_padding(repeat_positions(x)))
        x = layout.mask_padding(nnx.silu(self.head_norm(x, layout)))
        return layout.from_array(self.head(x)).astype(jnp.float32), state

    def _prepare_levels(
        self, time: Float[Array, "B G"], layout: Canvas, conditioning: Conditioning
    ) -> list[_LevelInputs]:
        features = sinusoidal_embedding(1000 * time, TIME_FEATURES)
        condition = nnx.silu(self.time_out(nnx.silu(self.time_in(features))))
        levels = []
        for number in range(len(self.config.widths)):
            layout = layout.coarsen(HALF) if number else layout
            levels.append(_LevelInputs(condition, conditioning.get(TextTokens), layout, layout.to_rows()))
        return levels


@dataclass(frozen=True, kw_only=True)
class UnetConfig(UnetArchitecture):
    """Configuration of the U-Net; for the fields see `UnetArchitecture`."""

    def make(self, rngs: nnx.Rngs, parallel: Parallelism = ONE_DEVICE) -> Unet:
        return Unet(self, parallel=parallel, rngs=rngs)
