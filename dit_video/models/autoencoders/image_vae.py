"""The variational autoencoder of images of Stable Diffusion and FLUX (arXiv 2112.10752), applied to each frame."""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.autoencoders.config import AutoencoderConfig
from dit_video.models.autoencoders.interface import check_std
from dit_video.models.autoencoders.vae import (
    BlockInputs,
    ConvVae,
    Decoder,
    Encoder,
    LayerOptions,
    NormFactory,
    Resolution,
)
from dit_video.nn import GroupNorm
from dit_video.tokens import Grid


@dataclass(frozen=True, kw_only=True)
class ImageLevels:
    """Configuration of the levels of an encoder and decoder; each level has half the height and width of the previous.

    Raises:
      UserError: If there are no levels, groups do not divide a width, or attention is at a level that does not exist.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of each level."""
    blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    groups: int = 32
    """Number of groups of channels in group norms."""
    middle_attention: bool = True
    """True adds attention between the two blocks in the middle."""
    attention: tuple[int, ...] = ()
    """Levels with attention after every residual block, counted from 0."""
    bfloat16: bool = False
    """True stores features in bfloat16, with products summed in float32; parameters, norms and latents stay float32."""

    def __post_init__(self):
        if not self.widths or min(*self.widths, self.blocks, self.groups) < 1:
            raise UserError(f"{self} is invalid: use one level or more, and widths, blocks and groups of at least 1")
        for width in self.widths:
            if width % self.groups:
                raise UserError(f"{width} channels are not divisible by groups={self.groups}; change one of them")
        if set(self.attention) - set(range(len(self.widths))):
            raise UserError(f"attention={self.attention} is invalid: use levels from 0 to {len(self.widths) - 1}")

    @property
    def stride(self) -> Grid:
        """Return the pixels per latent along (t, h, w)."""
        side = 2 ** (len(self.widths) - 1)
        return Grid(1, side, side)

    @property
    def dtype(self) -> jnp.dtype:
        """Return the dtype of products."""
        return jnp.dtype(jnp.bfloat16 if self.bfloat16 else jnp.float32)

    @property
    def resolutions(self) -> list[Resolution]:
        """Return the levels, from the highest resolution to the lowest."""
        factors = (*[Grid(1, 2, 2)] * (len(self.widths) - 1), None)
        pairs = enumerate(zip(self.widths, factors, strict=True))
        return [Resolution(*each, has_attention=index in self.attention) for index, each in pairs]

    def make_norm(self, width: int, _rngs: nnx.Rngs) -> "FrameNorm":
        """Return a plain group norm, as in all encoders, and in Stable Diffusion's and FLUX's decoders."""
        return FrameNorm(width, self.groups)

    def make_layers(self, norm: NormFactory, rngs: nnx.Rngs) -> LayerOptions:
        """Return the options of the layers, with these norms."""
        sizes: dict[str, Any] = {"blocks": self.blocks, "middle_attention": self.middle_attention, "dtype": self.dtype}
        return LayerOptions(norm=norm, kernel=(1, 3, 3), **sizes, rngs=rngs)


class FrameNorm(GroupNorm):
    """A group norm over each frame, or over each clip's part of it if clips share a canvas."""

    def __call__(self, x: Float[Array, "B t h w D"], inputs: BlockInputs) -> Float[Array, "B t h w D"]:  # type: ignore[override]
        return super().__call__(x, inputs.segments)


class ImageVaeEncoder(Encoder):
    """An encoder from pixels to `channels` features per latent position."""

    def __init__(self, levels: ImageLevels, channels: int, *, rngs: nnx.Rngs):
        layers = levels.make_layers(levels.make_norm, rngs)
        super().__init__(layers, levels.resolutions, width=levels.widths[0], features=channels)


class ImageVaeDecoder(Decoder):
    """A decoder from features with `channels` channels to pixels."""

    def __init__(self, levels: ImageLevels, channels: int, norm: NormFactory, *, rngs: nnx.Rngs):
        """Create the decoder; `norm` makes its norms."""
        self.config = levels
        layers = levels.make_layers(norm, rngs)
        super().__init__(layers, levels.resolutions, channels=channels)


@dataclass(frozen=True, kw_only=True)
class ImageVaeConfig(AutoencoderConfig):
    """Configuration of an image VAE. Clips of any length are coded frame by frame: the temporal stride is 1.

    Raises:
      UserError: If there are no channels, or the standard deviation is negative.
    """

    channels: int = 4
    """Channels of the latents."""
    levels: ImageLevels = field(default_factory=ImageLevels)
    use_quant_conv: bool = True
    """True adds a linear map after the encoder (diffusers' `use_quant_conv`)."""
    use_post_quant_conv: bool = True
    """True adds a linear map before the decoder (diffusers' `use_post_quant_conv`)."""
    std: float | None = None
    """Fixed standard deviation of the latents in training; None learns one for each (the usual VAE). 0 is a plain
    autoencoder, whose latents have noise of about 3e-7: train it without a divergence."""

    def __post_init__(self):
        check_at_least(1, channels=self.channels)
        check_std(self.std)

    @classmethod
    def stable_diffusion(cls) -> "ImageVaeConfig":
        """Return the VAE of Stable Diffusion 1, 2 and XL: 8×8 pixels to 4 channels, 84 M parameters."""
        return cls()

    @classmethod
    def flux(cls) -> "ImageVaeConfig":
        """Return the VAE of FLUX.1: 8×8 pixels to 16 channels, 84 M parameters."""
        return cls(channels=16, use_quant_conv=False, use_post_quant_conv=False)

    @property
    def stride(self) -> Grid:
        """Return the pixels per latent along (t, h, w)."""
        return self.levels.stride

    @property
    def last_layer(self) -> str:
        return "decoder/conv_out/kernel"

    def make(self, rngs: nnx.Rngs) -> ConvVae:
        encoder = ImageVaeEncoder(self.levels, 2 * self.channels, rngs=rngs)
        decoder = ImageVaeDecoder(self.levels, self.channels, self.levels.make_norm, rngs=rngs)
        maps = {"has_moments_map": self.use_quant_conv, "has_latents_map": self.use_post_quant_conv}
        return ConvVae(encoder, decoder, self, std=self.std, **maps, rngs=rngs)
