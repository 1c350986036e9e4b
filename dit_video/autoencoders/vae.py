"""A causal convolutional variational autoencoder, of which Wan's two are configurations.

Resolution levels of residual blocks, attention in the middle (arXiv 2503.20314, section 4.1). With `shortcuts`, every
level has a parameter-free path beside it, as in the autoencoder of Wan 2.2 (after DC-AE, arXiv 2410.10733).
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import get_args

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dit_video.autoencoders.blocks import (
    Down,
    FrameAttention,
    Places,
    ResidualBlock,
    Up,
    alone,
    averaged,
    make_norm,
    normed,
    placed,
    repeated,
)
from dit_video.autoencoders.modulation import Guide
from dit_video.autoencoders.posterior import Normalizer, Posterior, Vae, check_std
from dit_video.core.errors import UserError
from dit_video.nn import CausalConv, Form, Linear, Memory, choose_form, rematerialised
from dit_video.tokens import Grid


@dataclass(frozen=True, kw_only=True)
class CausalVaeConfig:
    """A causal VAE by its levels.

    Raises:
      UserError: factors other than 1 and 2, another number of levels than of multipliers, shortcuts whose channels do
        not divide, or a form of convolutions that there is not.
    """

    channels: int = 16
    """of the latents"""
    width: int = 96
    """channels of the first level, in the encoder"""
    decoder_width: int | None = None
    """and in the decoder; the same by default"""
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """of the width, level by level"""
    factors: tuple[Grid, ...] = (Grid(1, 2, 2), Grid(2, 2, 2), Grid(2, 2, 2))
    """how much smaller each next level is, along (t, h, w): 1 or 2"""
    blocks: int = 2
    """residual blocks a level in the encoder; the decoder has one more"""
    patch: int = 1
    """side of the cells of pixels that are channels from the start"""
    shortcuts: bool = False
    """whether a path without parameters lies beside each level"""
    std: float | None = None
    """The latents' standard deviation in training, fixed; None learns one for each (the usual VAE). 0 is a plain
    autoencoder, whose latents have noise of about 3e-7: train it without a divergence."""
    bfloat16: bool = False
    """whether features are bfloat16, with products summed in float32; parameters, norms and latents stay float32"""
    form: Form = field(default="auto", metadata={"how": True})
    """How convolutions are computed: see `CausalConv`. Which is the fastest for a device and width is found with
    `tools/benchmark.py autoencoder --config CONFIG --set autoencoder.model.form=FORM`."""
    remat: bool = field(default=False, metadata={"how": True})
    """whether residual blocks are computed again in the backward pass, which then keeps their inputs alone"""

    def __post_init__(self):
        if len(self.factors) != len(self.multipliers) - 1:
            raise UserError(
                f"{len(self.multipliers)} multipliers are {len(self.multipliers)} levels, between which lie "
                f"{len(self.multipliers) - 1} changes of resolution, not {len(self.factors)} factors"
            )
        for factors in self.factors:
            if not set(factors) <= {1, 2} or factors.h != factors.w or factors.volume == 1:
                raise UserError(f"factors {tuple(factors)} must be 1 or 2, equal in height and width, and not all 1")
        if min(self.channels, self.width, self.blocks, self.patch, *self.multipliers) < 1:
            raise UserError("channels, width, blocks, patch and multipliers must be at least 1 each")
        halved = self.widths(self.decoder_width or self.width)[1:]
        if not self.shortcuts and any(width % 2 for width in halved):
            raise UserError(f"without shortcuts the decoder halves its widths {halved}, which must be even")
        if self.form not in get_args(Form):
            raise UserError(f"convolutions have no form {self.form!r}; use one of {', '.join(get_args(Form))}")
        check_std(self.std)
        self._check_shortcuts()

    def _check_shortcuts(self) -> None:
        down, up = self.widths(self.width), self.widths(self.decoder_width or self.width)
        levels = (*self.factors, Grid(1, 1, 1))
        for (before, after), factors in zip(zip((down[0], *down), down, strict=False), levels, strict=True):
            if self.shortcuts and before * factors.volume % after:
                raise UserError(f"a shortcut from {before} to {after} channels by {tuple(factors)} does not divide")
        for before, after, factors in zip(up[:0:-1], up[-2::-1], self.factors[::-1], strict=True):
            if self.shortcuts and after * factors.volume % before:
                raise UserError(f"a shortcut from {before} to {after} channels by {tuple(factors)} does not divide")

    @classmethod
    def wan21(cls) -> "CausalVaeConfig":
        """Wan 2.1: 4×8×8 pixels to 16 channels, 127 M parameters."""
        return cls()

    @classmethod
    def wan22(cls) -> "CausalVaeConfig":
        """Wan 2.2 TI2V-5B: 4×16×16 pixels to 48 channels, 705 M parameters."""
        return cls(
            channels=48,
            width=160,
            decoder_width=256,
            factors=(Grid(1, 2, 2), Grid(2, 2, 2), Grid(2, 2, 2)),
            patch=2,
            shortcuts=True,
        )

    @property
    def stride(self) -> Grid:
        """Pixels for one latent along (t, h, w)."""
        t, h, w = (math.prod(factors[axis] for factors in self.factors) for axis in range(3))
        return Grid(t, h * self.patch, w * self.patch)

    @property
    def last_layer(self) -> str:
        return "decoder/conv_out/kernel"

    @property
    def dtype(self) -> jnp.dtype:
        """What products are computed in."""
        return jnp.dtype(jnp.bfloat16 if self.bfloat16 else jnp.float32)

    def widths(self, base: int) -> tuple[int, ...]:
        """Channels of every level."""
        return tuple(base * multiplier for multiplier in self.multipliers)

    def make(self, rngs: nnx.Rngs) -> "CausalVae":
        return CausalVae(self, rngs=rngs)


class CausalVae(Vae):
    """Pixels in [-1, 1] to normalised latents and back; clips whole, or chunk by chunk with a `Memory`."""

    def __init__(self, config: CausalVaeConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels = config.channels
        self.encoder, self.decoder = Encoder(config, 2 * channels, rngs=rngs), Decoder(config, rngs=rngs)
        self.moments = Linear(2 * channels, 2 * channels, rngs=rngs)
        self.latents = Linear(channels, channels, rngs=rngs)
        self.normalizer = Normalizer(channels)

    def posterior(
        self,
        pixels: Float[Array, "B T H W 3"],
        inside: Bool[Array, "B h w"] | Int[Array, "B h w"] | None = None,
        memory: Memory | None = None,
    ) -> Posterior:
        """The distribution of latents, before normalisation. See `encode` for the arguments."""
        places = placed(pixels, self.config.stride, inside, memory)
        moments = self.moments(self.encoder(pixels, memory, places).astype(jnp.float32))
        return Posterior.of_moments(moments, self.config.std)

    def reconstruct(
        self, latents: Float[Array, "B t h w c"], memory: Memory | None = None
    ) -> Float[Array, "B T H W 3"]:
        """Pixels from latents that are not normalised."""
        return self.decoder(self.latents(latents), memory).astype(jnp.float32)


class Encoder(nnx.Module):
    """Pixels to so many features for each latent."""

    def __init__(self, config: CausalVaeConfig, features: int, *, rngs: nnx.Rngs):
        self.config, dtype = config, config.dtype
        widths = config.widths(config.width)
        self.conv_in = CausalConv(3 * config.patch**2, config.width, (3, 3, 3), past="zero", dtype=dtype, rngs=rngs)
        # As in the open models the first convolution has the base width, whatever the first level's multiplier.
        befores = (config.width, *widths[:-1])
        self.levels = nnx.List(
            [
                _DownLevel(before, after, factors, config, rngs=rngs)
                for before, after, factors in zip(befores, widths, (*config.factors, None), strict=True)
            ]
        )
        self.middle = _Middle(widths[-1], dtype=dtype, rngs=rngs)
        self.norm = make_norm(widths[-1], None, rngs)
        self.conv_out = CausalConv(widths[-1], features, (3, 3, 3), past="zero", dtype=dtype, rngs=rngs)
        choose_form(self, config.form)

    def __call__(
        self, pixels: Float[Array, "B T H W 3"], memory: Memory | None = None, places: Places | None = None
    ) -> Float[Array, "B t h w _"]:
        side = self.config.patch
        x = rearrange(pixels, "B T (h a) (w b) C -> B T h w (C b a)", a=side, b=side)
        x = self.conv_in(alone(x, places), memory)
        for level in self.levels:
            x = level(x, memory, places)
        x = jax.nn.silu(self.norm(self.middle(x, memory, places)))
        return self.conv_out(alone(x, places), memory)


class Decoder(nnx.Module):
    """Latents to pixels; with `guided` channels of latents its norms are modulated by them."""

    def __init__(self, config: CausalVaeConfig, *, guided: int | None = None, rngs: nnx.Rngs):
        self.config, dtype = config, config.dtype
        widths = config.widths(config.decoder_width or config.width)[::-1]
        self.conv_in = CausalConv(config.channels, widths[0], (3, 3, 3), past="zero", dtype=dtype, rngs=rngs)
        self.middle = _Middle(widths[0], guided=guided, dtype=dtype, rngs=rngs)
        levels, before = [], widths[0]
        for width, factors in zip(widths, (*config.factors[::-1], None), strict=True):
            levels.append(_UpLevel(before, width, factors, config, guided=guided, rngs=rngs))
            before = width if config.shortcuts else width // 2
        self.levels = nnx.List(levels)
        self.norm = make_norm(widths[-1], guided, rngs)
        self.conv_out = CausalConv(widths[-1], 3 * config.patch**2, (3, 3, 3), past="zero", dtype=dtype, rngs=rngs)
        choose_form(self, config.form)

    def __call__(
        self, latents: Float[Array, "B t h w c"], memory: Memory | None = None, guide: Guide | None = None
    ) -> Float[Array, "B T H W 3"]:
        x = self.middle(self.conv_in(latents, memory), memory, guide=guide)
        for level in self.levels:
            x = level(x, memory, guide)
        x = self.conv_out(jax.nn.silu(normed(self.norm, x, guide)), memory)
        side = self.config.patch
        return rearrange(x, "B T h w (C b a) -> B T (h a) (w b) C", a=side, b=side)


class _DownLevel(nnx.Module):
    """Residual blocks, then the change to the next resolution; the last level has none."""

    def __init__(self, width_in: int, width_out: int, factors: Grid | None, config: CausalVaeConfig, *, rngs: nnx.Rngs):
        dtype = config.dtype
        self.width, self.factors = width_out, factors
        self.shortcuts, self.remat = config.shortcuts, config.remat
        widths = (width_in, *[width_out] * config.blocks)
        self.blocks = nnx.List([ResidualBlock(*pair, dtype=dtype, rngs=rngs) for pair in itertools.pairwise(widths)])
        self.down = None if factors is None else Down(width_out, factors, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T H W i"], memory: Memory | None, places: Places | None
    ) -> Float[Array, "B t h w o"]:
        y = x
        for block in self.blocks:
            y = _through(block, y, memory, places, remat=self.remat)
        if self.down is not None:
            y = self.down(y, memory, places)
        if not self.shortcuts:
            return y
        return y + averaged(x, self.width, self.factors or Grid(1, 1, 1), begins=memory is None or memory.begins)


class _UpLevel(nnx.Module):
    """Residual blocks, then the change to the next resolution; the last level has none."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        factors: Grid | None,
        config: CausalVaeConfig,
        *,
        guided: int | None,
        rngs: nnx.Rngs,
    ):
        dtype = config.dtype
        self.width, self.factors = width_out, factors
        self.shortcuts, self.remat = config.shortcuts, config.remat
        widths = (width_in, *[width_out] * (config.blocks + 1))
        self.blocks = nnx.List(
            [ResidualBlock(*pair, guided=guided, dtype=dtype, rngs=rngs) for pair in itertools.pairwise(widths)]
        )
        narrow = width_out if config.shortcuts else width_out // 2
        self.up = None if factors is None else Up(width_out, narrow, factors, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B t h w i"], memory: Memory | None, guide: Guide | None
    ) -> Float[Array, "B T H W o"]:
        y = x
        for block in self.blocks:
            y = _through(block, y, memory, guide=guide, remat=self.remat)
        if self.up is None or self.factors is None:
            return y
        y = self.up(y, memory)
        if not self.shortcuts:
            return y
        return y + repeated(x, self.width, self.factors, begins=memory is None or memory.begins)


class _Middle(nnx.Module):
    def __init__(self, width: int, *, guided: int | None = None, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.before = ResidualBlock(width, width, guided=guided, dtype=dtype, rngs=rngs)
        self.attention = FrameAttention(width, guided=guided, dtype=dtype, rngs=rngs)
        self.after = ResidualBlock(width, width, guided=guided, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B t h w D"],
        memory: Memory | None,
        places: Places | None = None,
        guide: Guide | None = None,
    ) -> Float[Array, "B t h w D"]:
        x = self.attention(self.before(x, memory, places, guide), places, guide)
        return self.after(x, memory, places, guide)


def _through(
    block: ResidualBlock,
    x: Float[Array, "B t h w i"],
    memory: Memory | None,
    places: Places | None = None,
    guide: Guide | None = None,
    *,
    remat: bool,
) -> Float[Array, "B t h w o"]:
    """A block's output; with `remat` and without a memory, which training does not have, kept is `x` alone."""
    if not remat or memory is not None:
        return block(x, memory, places, guide)
    return rematerialised(lambda block, x: block(x, None, places, guide), block, x)
