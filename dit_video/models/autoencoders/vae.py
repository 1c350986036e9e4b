"""A causal convolutional variational autoencoder; both of Wan's are configurations of it.

Resolution levels of residual blocks, attention in the middle (arXiv 2503.20314, section 4.1). With `shortcuts`, every
level has a parallel path without parameters, as in the autoencoder of Wan 2.2 (after DC-AE, arXiv 2410.10733).
"""

import math
from dataclasses import dataclass, field
from typing import Any, get_args

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.models.autoencoders.blocks import BlockInputs, LayerOptions, NormFactory
from dit_video.models.autoencoders.interface import Latents, Pixels
from dit_video.models.autoencoders.levels import ConvVae, Decoder, Encoder, Resolution
from dit_video.models.autoencoders.posterior import check_std
from dit_video.nn import ConvForm, RmsNorm, set_conv_form
from dit_video.tokens import Grid

_EPSILON = 1e-12


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
        """Return the channels of every level for a network of `base` channels."""
        return tuple(base * multiplier for multiplier in self.multipliers)

    def list_resolutions(self, base: int) -> list[Resolution]:
        """Return the levels of a network of `base` channels, from the highest resolution to the lowest."""
        return list(map(Resolution, self.widths(base), (*self.factors, None)))

    def make_layers(self, norm: NormFactory, rngs: nnx.Rngs) -> LayerOptions:
        """Return the options of the layers, with these norms."""
        options: dict[str, Any] = {"blocks": self.blocks, "shortcuts": self.shortcuts, "halves": not self.shortcuts}
        options |= {"fused_attention": True, "remat": self.remat, "dtype": self.dtype, "rngs": rngs}
        return LayerOptions(norm=norm, kernel=(3, 3, 3), **options)

    def make(self, rngs: nnx.Rngs) -> ConvVae:
        encoder = CausalVaeEncoder(self, 2 * self.channels, rngs=rngs)
        decoder = CausalVaeDecoder(self, make_position_norm, rngs=rngs)
        return ConvVae(encoder, decoder, self, std=self.std, rngs=rngs)


class CausalVaeEncoder(Encoder):
    """An encoder of pixels to `features` features per latent position."""

    def __init__(self, config: CausalVaeConfig, features: int, *, rngs: nnx.Rngs):
        self.config = config
        sizes = {"channels": 3 * config.patch**2, "width": config.width, "features": features}
        layers = config.make_layers(make_position_norm, rngs)
        super().__init__(layers, config.list_resolutions(config.width), **sizes)
        set_conv_form(self, config.form)

    def __call__(self, pixels: Pixels, inputs: BlockInputs) -> Float[Array, "B t h w _"]:
        side = self.config.patch
        return super().__call__(rearrange(pixels, "B T (h a) (w b) C -> B T h w (C b a)", a=side, b=side), inputs)


class CausalVaeDecoder(Decoder):
    """A decoder of latents to pixels, whose norms `norm` makes."""

    def __init__(self, config: CausalVaeConfig, norm: NormFactory, *, rngs: nnx.Rngs):
        self.config = config
        sizes = {"channels": config.channels, "features": 3 * config.patch**2}
        resolutions = config.list_resolutions(config.decoder_width or config.width)
        super().__init__(config.make_layers(norm, rngs), resolutions, **sizes)
        set_conv_form(self, config.form)

    def __call__(self, latents: Latents, inputs: BlockInputs) -> Pixels:
        x, side = super().__call__(latents, inputs), self.config.patch
        return rearrange(x, "B T h w (C b a) -> B T (h a) (w b) C", a=side, b=side)


class PositionNorm(RmsNorm):
    """An RMS norm over the channels of each position."""

    def __call__(self, x: Float[Array, "B t h w D"], inputs: BlockInputs) -> Float[Array, "B t h w D"]:  # type: ignore[override]
        return super().__call__(x)


def make_position_norm(width: int, _rngs: nnx.Rngs) -> PositionNorm:
    """Return a norm of the causal VAE."""
    return PositionNorm(width, eps=_EPSILON)
