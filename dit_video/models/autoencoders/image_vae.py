"""The variational autoencoder of images of Stable Diffusion and FLUX (arXiv 2112.10752), applied to each frame."""

from dataclasses import dataclass, field

from flax import nnx

from dit_video.core.errors import check_at_least
from dit_video.models.autoencoders.image_blocks import ImageLevels, ImageVaeDecoder, ImageVaeEncoder
from dit_video.models.autoencoders.levels import ConvVae
from dit_video.models.autoencoders.posterior import check_std
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
