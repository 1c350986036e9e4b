"""Inflation of an image autoencoder to clips by temporal layers in its decoder, which start as the identity.

As in Video LDM (arXiv 2304.08818, section 3.1.1), Stable Video Diffusion (arXiv 2311.15127) and Kandinsky Video (arXiv
2311.13073), the encoder stays unchanged, so that a denoiser of its latents needs no change, and only the temporal
layers are trained: they remove flicker. These are causal, so that clips can be decoded chunk by chunk. The temporal
stride stays 1.
"""

from dataclasses import dataclass, replace
from typing import Any

from flax import nnx
from jaxtyping import Array

from dit_video.core.errors import UserError, check_at_least
from dit_video.core.trees import flatten
from dit_video.models.autoencoders.config import AutoencoderConfig, LoadParams
from dit_video.models.autoencoders.image_vae import ImageVaeDecoder
from dit_video.models.autoencoders.vae import ResidualBlock
from dit_video.nn import check_params, complete_params, get_param_shapes
from dit_video.tokens import Grid

_TEMPORAL = "/temporal/"
"""Part of the paths of temporal layers' parameters, and of no others."""


@dataclass(frozen=True, kw_only=True)
class InflatedConfig(AutoencoderConfig):
    """Configuration of an image autoencoder with a temporal layer after every residual block of its decoder's levels.

    Raises:
      UserError: If the autoencoder's temporal stride is not 1, or the kernel has fewer than 2 frames.
    """

    image: AutoencoderConfig
    """Configuration of the image autoencoder; its decoder must be an `ImageVaeDecoder`."""
    kernel_size: int = 3
    """Frames that a temporal convolution sees: its own and those before it."""

    def __post_init__(self):
        if self.image.stride.t != 1:
            name, stride = type(self.image).__name__, self.image.stride.t
            raise UserError(f"{name} has a temporal stride of {stride} and can't be inflated; use one of images")
        check_at_least(2, kernel_size=self.kernel_size)

    @property
    def stride(self) -> Grid:
        """Return the pixels per latent along (t, h, w)."""
        return self.image.stride

    @property
    def channels(self) -> int:
        """Return the channels of the latents."""
        return self.image.channels

    @property
    def last_layer(self) -> str:
        """Return the path of the trained parameter closest to the pixels: the last temporal layer's kernel."""
        paths = flatten(get_param_shapes(self.make))
        return [path for path in paths if _TEMPORAL in path and path.endswith("conv_out/kernel")][-1]

    def make(self, rngs: nnx.Rngs) -> nnx.Module:
        """Return the image autoencoder's module with temporal layers.

        Raises:
          UserError: If the autoencoder's decoder is not an `ImageVaeDecoder`.
        """
        model = self.image.make(rngs)
        decoder = getattr(model, "decoder", None)
        if not isinstance(decoder, ImageVaeDecoder):
            raise UserError(f"{type(self.image).__name__} can't be inflated: no decoder of images. Use ImageVaeConfig")
        layers = replace(decoder.config.make_layers(decoder.config.make_norm, rngs), kernel=(self.kernel_size, 1, 1))
        layers = replace(layers, temporal_padding="first")
        for level in decoder.levels:
            blocks = [ResidualBlock(level.width, level.width, layers, init="zero") for _ in level.blocks]
            level.temporal = nnx.List(blocks)
        return model

    def init_from_weights(self, load: LoadParams, key: Array) -> dict[str, Any]:
        """Return the parameters of the image autoencoder, inflated; `key` initialises the temporal layers."""
        return inflate(self.image, load(self.image), key, kernel_size=self.kernel_size)[1]


def inflate(
    config: AutoencoderConfig, params: dict[str, Any], key: Array, *, kernel_size: int = 3
) -> tuple[InflatedConfig, dict[str, Any]]:
    """Return a video autoencoder that decodes every frame like the image autoencoder until it is trained.

    Args:
      config: Configuration of an image autoencoder.
      params: Its parameters, which the result shares.
      key: Random key for the temporal layers.
      kernel_size: Frames that a temporal convolution sees.

    Raises:
      UserError: If the autoencoder can't be inflated, or the parameters do not fit it.
    """
    inflated = InflatedConfig(image=config, kernel_size=kernel_size)
    return inflated, complete_params(inflated.make, check_params(config.make, params), key)
