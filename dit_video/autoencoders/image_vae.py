"""The variational autoencoder of images that Stable Diffusion and FLUX have (arXiv 2112.10752), frame by frame."""

from dataclasses import dataclass, field

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dit_video.autoencoders.blocks import placed
from dit_video.autoencoders.image_blocks import Beside, ImageDecoder, ImageEncoder, ImageLevels, frame_norms
from dit_video.autoencoders.posterior import Normalizer, Posterior, Vae, check_std
from dit_video.core.errors import UserError
from dit_video.nn import Linear, Memory
from dit_video.tokens import Grid


@dataclass(frozen=True, kw_only=True)
class ImageVaeConfig:
    """A VAE of images by its levels. Clips of any length are coded frame by frame: the temporal stride is 1.

    Raises:
      UserError: no channels, or a negative deviation.
    """

    channels: int = 4
    """of the latents"""
    levels: ImageLevels = field(default_factory=ImageLevels)
    moments: bool = True
    """whether a linear map follows the encoder"""
    latents: bool = True
    """whether a linear map goes before the decoder"""
    std: float | None = None
    """The latents' standard deviation in training, fixed; None learns one for each (the usual VAE). 0 is a plain
    autoencoder, whose latents have noise of about 3e-7: train it without a divergence."""

    def __post_init__(self):
        if self.channels < 1:
            raise UserError(f"latents need at least 1 channel, not {self.channels}")
        check_std(self.std)

    @classmethod
    def stable_diffusion(cls) -> "ImageVaeConfig":
        """Stable Diffusion 1, 2 and XL: 8×8 pixels to 4 channels, 84 M parameters."""
        return cls()

    @classmethod
    def flux(cls) -> "ImageVaeConfig":
        """FLUX.1: 8×8 pixels to 16 channels, 84 M parameters."""
        return cls(channels=16, moments=False, latents=False)

    @property
    def stride(self) -> Grid:
        """Pixels for one latent along (t, h, w)."""
        return self.levels.stride

    @property
    def last_layer(self) -> str:
        return "decoder/conv_out/kernel"

    def make(self, rngs: nnx.Rngs) -> "ImageVae":
        return ImageVae(self, rngs=rngs)


class ImageVae(Vae):
    """Pixels in [-1, 1] to normalised latents and back."""

    def __init__(self, config: ImageVaeConfig, *, rngs: nnx.Rngs):
        self.config = config
        levels, channels = config.levels, config.channels
        self.encoder = ImageEncoder(levels, 2 * channels, rngs=rngs)
        self.decoder = ImageDecoder(levels, channels, frame_norms(levels), rngs=rngs)
        self.moments = Linear(2 * channels, 2 * channels, rngs=rngs) if config.moments else None
        self.latents = Linear(channels, channels, rngs=rngs) if config.latents else None
        self.normalizer = Normalizer(channels)

    def posterior(
        self,
        pixels: Float[Array, "B T H W 3"],
        inside: Bool[Array, "B h w"] | Int[Array, "B h w"] | None = None,
        memory: Memory | None = None,
    ) -> Posterior:
        """The distribution of latents, before normalisation. See `encode` for the arguments."""
        places = placed(pixels, self.config.stride, inside, memory)
        moments = self.encoder(pixels, places).astype(jnp.float32)
        moments = moments if self.moments is None else self.moments(moments)
        return Posterior.of_moments(moments, self.config.std)

    def reconstruct(
        self, latents: Float[Array, "B t h w c"], memory: Memory | None = None
    ) -> Float[Array, "B T H W 3"]:
        """Pixels from latents that are not normalised."""
        x = latents if self.latents is None else self.latents(latents)
        return self.decoder(x, Beside(memory=memory)).astype(jnp.float32)
