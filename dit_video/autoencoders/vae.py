"""A causal convolutional variational autoencoder; both of Wan's are configurations of it.

Resolution levels of residual blocks, attention in the middle (arXiv 2503.20314, section 4.1). With `shortcuts`, every
level has a parallel path without parameters, as in the autoencoder of Wan 2.2 (after DC-AE, arXiv 2410.10733).
"""

import functools
import itertools
import math
from dataclasses import dataclass, field
from typing import get_args

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from dit_video.autoencoders.blocks import (
    CanvasSegments,
    Downsample,
    FrameAttention,
    ResidualBlock,
    Upsample,
    apply_norm,
    average_downsample,
    make_canvas_segments,
    make_norm,
    mask_gaps,
    repeat_upsample,
)
from dit_video.autoencoders.interface import Latents, Pixels, SegmentIds
from dit_video.autoencoders.modulation import Guide
from dit_video.autoencoders.posterior import Normalizer, Posterior, Vae, check_std
from dit_video.core.errors import UserError
from dit_video.nn import CausalConv, ConvCache, ConvForm, Linear, rematerialize, set_conv_form
from dit_video.tokens import Grid


@dataclass(frozen=True, kw_only=True)
class CausalVaeConfig:
    """Configuration of a causal VAE.

    Raises:
      UserError: factors other than 1 and 2, numbers of levels and multipliers that differ, shortcuts whose channels do
        not divide, or an unknown form of convolutions.
    """

    channels: int = 16
    """Channels of the latents."""
    width: int = 96
    """Channels of the encoder's first level."""
    decoder_width: int | None = None
    """Channels of the decoder's last level; None uses `width`."""
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Multiples of the width, one per level."""
    factors: tuple[Grid, ...] = (Grid(1, 2, 2), Grid(2, 2, 2), Grid(2, 2, 2))
    """Downsampling factors along (t, h, w) between levels: 1 or 2."""
    blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    patch: int = 1
    """Side of the square cells of pixels that the first convolution sees as channels."""
    shortcuts: bool = False
    """True adds a path without parameters parallel to each level."""
    std: float | None = None
    """Fixed standard deviation of the latents in training; None learns one for each (the usual VAE). 0 is a plain
    autoencoder, whose latents have noise of about 3e-7: train it without a divergence."""
    bfloat16: bool = False
    """True stores features in bfloat16, with products summed in float32; parameters, norms and latents stay float32."""
    form: ConvForm = field(default="auto", metadata={"how": True})
    """Algorithm of convolutions: see `CausalConv`. To find the fastest for a device and width, run
    `tools/benchmark.py autoencoder --config CONFIG --set autoencoder.model.form=FORM`."""
    remat: bool = field(default=False, metadata={"how": True})
    """True recomputes residual blocks in the backward pass, which then stores only their inputs."""

    def __post_init__(self):
        if len(self.factors) != len(self.multipliers) - 1:
            raise UserError(f"{len(self.factors)} factors do not fit {len(self.multipliers)} multipliers: use one less")
        for factors in self.factors:
            if not set(factors) <= {1, 2} or factors.h != factors.w or factors.volume == 1:
                raise UserError(f"factors={tuple(factors)} is invalid: use 1 or 2, the same in h and w, not all 1")
        if min(self.channels, self.width, self.blocks, self.patch, *self.multipliers) < 1:
            raise UserError(f"{self} is invalid: use channels, width, blocks, patch and multipliers of at least 1")
        decoder_widths = self.widths(self.decoder_width or self.width)[1:]
        if not self.shortcuts and any(width % 2 for width in decoder_widths):
            raise UserError(f"decoder widths {decoder_widths} are invalid: use even widths, or shortcuts")
        if self.form not in get_args(ConvForm):
            raise UserError(f"form={self.form!r} is invalid: use one of {', '.join(get_args(ConvForm))}")
        check_std(self.std)
        self._check_shortcuts()

    def _check_shortcuts(self) -> None:
        down, up = self.widths(self.width), self.widths(self.decoder_width or self.width)
        levels = (*self.factors, Grid(1, 1, 1))
        for (width_in, width_out), factors in zip(zip((down[0], *down), down, strict=False), levels, strict=True):
            if self.shortcuts and width_in * factors.volume % width_out:
                raise UserError(
                    f"a shortcut from {width_in} to {width_out} channels by {tuple(factors)} does not divide; change "
                    "width or multipliers"
                )
        for width_in, width_out, factors in zip(up[:0:-1], up[-2::-1], self.factors[::-1], strict=True):
            if self.shortcuts and width_out * factors.volume % width_in:
                raise UserError(
                    f"a shortcut from {width_in} to {width_out} channels by {tuple(factors)} does not divide; change "
                    "decoder_width or multipliers"
                )

    @classmethod
    def wan21(cls) -> "CausalVaeConfig":
        """Return the VAE of Wan 2.1: 4×8×8 pixels to 16 channels, 127 M parameters."""
        return cls()

    @classmethod
    def wan22(cls) -> "CausalVaeConfig":
        """Return the VAE of Wan 2.2 TI2V-5B: 4×16×16 pixels to 48 channels, 705 M parameters."""
        return cls(channels=48, width=160, decoder_width=256, patch=2, shortcuts=True)

    @property
    def stride(self) -> Grid:
        """Return the pixels per latent along (t, h, w)."""
        t, h, w = (math.prod(factors[axis] for factors in self.factors) for axis in range(3))
        return Grid(t, h * self.patch, w * self.patch)

    @property
    def last_layer(self) -> str:
        return "decoder/conv_out/kernel"

    @property
    def dtype(self) -> jnp.dtype:
        """Return the dtype of products."""
        return jnp.dtype(jnp.bfloat16 if self.bfloat16 else jnp.float32)

    def widths(self, base: int) -> tuple[int, ...]:
        """Return the channels of every level for a base width."""
        return tuple(base * multiplier for multiplier in self.multipliers)

    def make(self, rngs: nnx.Rngs) -> "CausalVae":
        return CausalVae(self, rngs=rngs)


class CausalVae(Vae):
    """A causal VAE from pixels in [-1, 1] to normalised latents and back, on clips or chunks with a `ConvCache`."""

    def __init__(self, config: CausalVaeConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels = config.channels
        self.encoder = CausalVaeEncoder(config, 2 * channels, rngs=rngs)
        self.decoder = CausalVaeDecoder(config, rngs=rngs)
        self.moments = Linear(2 * channels, 2 * channels, rngs=rngs)
        self.latents = Linear(channels, channels, rngs=rngs)
        self.normalizer = Normalizer(channels)

    def posterior(self, pixels: Pixels, segment_ids: SegmentIds = None, cache: ConvCache | None = None) -> Posterior:
        """Return the distribution of latents before normalisation. See `encode` for the arguments."""
        segments = make_canvas_segments(pixels, self.config.stride, segment_ids, cache)
        moments = self.moments(self.encoder(pixels, cache, segments).astype(jnp.float32))
        return Posterior.from_moments(moments, self.config.std)

    def reconstruct(self, latents: Latents, cache: ConvCache | None = None) -> Pixels:
        """Return pixels from latents that are not normalised."""
        return self.decoder(self.latents(latents), cache).astype(jnp.float32)


class CausalVaeEncoder(nnx.Module):
    """A causal encoder of pixels to a number of features per latent."""

    def __init__(self, config: CausalVaeConfig, features: int, *, rngs: nnx.Rngs):
        self.config, dtype = config, config.dtype
        widths = config.widths(config.width)
        make_conv = functools.partial(CausalConv, temporal_padding="zero", dtype=dtype, rngs=rngs)
        self.conv_in = make_conv(3 * config.patch**2, config.width, (3, 3, 3))
        # The first convolution has the base width whatever the first level's multiplier, as in the open models.
        steps = zip((config.width, *widths[:-1]), widths, (*config.factors, None), strict=True)
        self.levels = nnx.List([_DownLevel(*step, config, rngs=rngs) for step in steps])
        self.middle = _MiddleBlock(widths[-1], dtype=dtype, rngs=rngs)
        self.norm = make_norm(widths[-1], None, rngs)
        self.conv_out = make_conv(widths[-1], features, (3, 3, 3))
        set_conv_form(self, config.form)

    def __call__(
        self, pixels: Pixels, cache: ConvCache | None = None, segments: CanvasSegments | None = None
    ) -> Float[Array, "B t h w _"]:
        side = self.config.patch
        x = rearrange(pixels, "B T (h a) (w b) C -> B T h w (C b a)", a=side, b=side)
        x = self.conv_in(mask_gaps(x, segments), cache)
        for level in self.levels:
            x = level(x, cache, segments)
        x = jax.nn.silu(self.norm(self.middle(x, cache, segments)))
        return self.conv_out(mask_gaps(x, segments), cache)


class CausalVaeDecoder(nnx.Module):
    """A causal decoder of latents to pixels; with `guide_channels`, latents of so many channels modulate its norms."""

    def __init__(self, config: CausalVaeConfig, *, guide_channels: int | None = None, rngs: nnx.Rngs):
        self.config, dtype = config, config.dtype
        widths = config.widths(config.decoder_width or config.width)[::-1]
        make_conv = functools.partial(CausalConv, temporal_padding="zero", dtype=dtype, rngs=rngs)
        self.conv_in = make_conv(config.channels, widths[0], (3, 3, 3))
        self.middle = _MiddleBlock(widths[0], guide_channels=guide_channels, dtype=dtype, rngs=rngs)
        levels, width_in = [], widths[0]
        for width, factors in zip(widths, (*config.factors[::-1], None), strict=True):
            levels.append(_UpLevel(width_in, width, factors, config, guide_channels=guide_channels, rngs=rngs))
            width_in = width if config.shortcuts else width // 2
        self.levels = nnx.List(levels)
        self.norm = make_norm(widths[-1], guide_channels, rngs)
        self.conv_out = make_conv(widths[-1], 3 * config.patch**2, (3, 3, 3))
        set_conv_form(self, config.form)

    def __call__(self, latents: Latents, cache: ConvCache | None = None, guide: Guide | None = None) -> Pixels:
        x = self.middle(self.conv_in(latents, cache), cache, guide=guide)
        for level in self.levels:
            x = level(x, cache, guide)
        x = self.conv_out(jax.nn.silu(apply_norm(self.norm, x, guide)), cache)
        side = self.config.patch
        return rearrange(x, "B T h w (C b a) -> B T (h a) (w b) C", a=side, b=side)


class _DownLevel(nnx.Module):
    """Residual blocks, then downsampling, except in the last level."""

    def __init__(self, width_in: int, width_out: int, factors: Grid | None, config: CausalVaeConfig, *, rngs: nnx.Rngs):
        dtype = config.dtype
        self.width, self.factors = width_out, factors
        self.shortcuts, self.remat = config.shortcuts, config.remat
        widths = (width_in, *[width_out] * config.blocks)
        self.blocks = nnx.List([ResidualBlock(*pair, dtype=dtype, rngs=rngs) for pair in itertools.pairwise(widths)])
        self.down = None if factors is None else Downsample(width_out, factors, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T H W i"], cache: ConvCache | None, segments: CanvasSegments | None
    ) -> Float[Array, "B t h w o"]:
        y = x
        for block in self.blocks:
            y = _apply_block(block, y, cache, segments, remat=self.remat)
        if self.down is not None:
            y = self.down(y, cache, segments)
        if not self.shortcuts:
            return y
        is_first = cache is None or cache.is_first
        return y + average_downsample(x, self.width, self.factors or Grid(1, 1, 1), is_first=is_first)


class _UpLevel(nnx.Module):
    """Residual blocks, then upsampling, except in the last level."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        factors: Grid | None,
        config: CausalVaeConfig,
        *,
        guide_channels: int | None,
        rngs: nnx.Rngs,
    ):
        dtype = config.dtype
        self.width, self.factors = width_out, factors
        self.shortcuts, self.remat = config.shortcuts, config.remat
        widths = (width_in, *[width_out] * (config.blocks + 1))
        make_block = functools.partial(ResidualBlock, guide_channels=guide_channels, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([make_block(*pair) for pair in itertools.pairwise(widths)])
        up_width = width_out if config.shortcuts else width_out // 2
        self.up = None if factors is None else Upsample(width_out, up_width, factors, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B t h w i"], cache: ConvCache | None, guide: Guide | None
    ) -> Float[Array, "B T H W o"]:
        y = x
        for block in self.blocks:
            y = _apply_block(block, y, cache, guide=guide, remat=self.remat)
        if self.up is None or self.factors is None:
            return y
        y = self.up(y, cache)
        if not self.shortcuts:
            return y
        return y + repeat_upsample(x, self.width, self.factors, is_first=cache is None or cache.is_first)


class _MiddleBlock(nnx.Module):
    def __init__(self, width: int, *, guide_channels: int | None = None, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.before = ResidualBlock(width, width, guide_channels=guide_channels, dtype=dtype, rngs=rngs)
        self.attention = FrameAttention(width, guide_channels=guide_channels, dtype=dtype, rngs=rngs)
        self.after = ResidualBlock(width, width, guide_channels=guide_channels, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B t h w D"],
        cache: ConvCache | None,
        segments: CanvasSegments | None = None,
        guide: Guide | None = None,
    ) -> Float[Array, "B t h w D"]:
        x = self.attention(self.before(x, cache, segments, guide), segments, guide)
        return self.after(x, cache, segments, guide)


def _apply_block(
    block: ResidualBlock,
    x: Float[Array, "B t h w i"],
    cache: ConvCache | None,
    segments: CanvasSegments | None = None,
    guide: Guide | None = None,
    *,
    remat: bool,
) -> Float[Array, "B t h w o"]:
    """Apply a block; with `remat` and without a cache (as in training) only its input is kept for the backward pass."""
    if not remat or cache is not None:
        return block(x, cache, segments, guide)
    return rematerialize(lambda block, x: block(x, None, segments, guide), block, x)
