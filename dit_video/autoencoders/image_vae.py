"""The variational autoencoder of images of Stable Diffusion and FLUX (arXiv 2112.10752), applied to each frame."""

from dataclasses import dataclass, field

import jax.numpy as jnp
from flax import nnx

from dit_video.autoencoders.blocks import make_canvas_segments
from dit_video.autoencoders.image_blocks import (
    BlockInputs,
    ImageLevels,
    ImageVaeDecoder,
    ImageVaeEncoder,
    make_frame_norm_factory,
)
from dit_video.autoencoders.interface import Latents, Pixels, SegmentIds
from dit_video.autoencoders.posterior import Normalizer, Posterior, Vae, check_std
from dit_video.core.errors import UserError
from dit_video.nn import ConvCache, Linear
from dit_video.tokens import Grid


@dataclass(frozen=True, kw_only=True)
class ImageVaeConfig:
    """Configuration of an image VAE. Clips of any length are coded frame by frame: the temporal stride is 1.

    Raises:
      UserError: no channels, or a negative standard deviation.
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
        if self.channels < 1:
            raise UserError(f"channels={self.channels} is invalid: use at least 1")
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

    def make(self, rngs: nnx.Rngs) -> "ImageVae":
        return ImageVae(self, rngs=rngs)


class ImageVae(Vae):
    """A VAE from pixels in [-1, 1] to normalised latents and back, frame by frame."""

    def __init__(self, config: ImageVaeConfig, *, rngs: nnx.Rngs):
        self.config = config
        levels, channels = config.levels, config.channels
        self.encoder = ImageVaeEncoder(levels, 2 * channels, rngs=rngs)
        self.decoder = ImageVaeDecoder(levels, channels, make_frame_norm_factory(levels), rngs=rngs)
        self.moments = Linear(2 * channels, 2 * channels, rngs=rngs) if config.use_quant_conv else None
        self.latents = Linear(channels, channels, rngs=rngs) if config.use_post_quant_conv else None
        self.normalizer = Normalizer(channels)

    def posterior(self, pixels: Pixels, segment_ids: SegmentIds = None, cache: ConvCache | None = None) -> Posterior:
        """Return the distribution of latents before normalisation. See `encode` for the arguments."""
        segments = make_canvas_segments(pixels, self.config.stride, segment_ids, cache)
        moments = self.encoder(pixels, segments).astype(jnp.float32)
        moments = moments if self.moments is None else self.moments(moments)
        return Posterior.from_moments(moments, self.config.std)

    def reconstruct(self, latents: Latents, cache: ConvCache | None = None) -> Pixels:
        """Return pixels from latents that are not normalised."""
        x = latents if self.latents is None else self.latents(latents)
        return self.decoder(x, BlockInputs(cache=cache)).astype(jnp.float32)
