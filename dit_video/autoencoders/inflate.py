"""Inflation: an image autoencoder becomes one of clips, by temporal layers in its decoder that start as the identity.

As in Video LDM (arXiv 2304.08818, section 3.1.1), Stable Video Diffusion (arXiv 2311.15127) and Kandinsky Video (arXiv
2311.13073) the encoder stays the image's, so that a denoiser of its latents needs no change, and only the temporal
layers are trained: they take away what flickers. Ours are causal, so that clips can be decoded chunk by chunk. The
temporal stride stays 1.
"""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from dit_video.autoencoders.image_blocks import Beside, ImageDecoder, ImageLevels
from dit_video.autoencoders.interface import AutoencoderConfig
from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.nn import CausalConv, GroupNorm, checked_params, completed_params, param_shapes
from dit_video.tokens import Grid

_TEMPORAL = "/temporal/"
"""What the paths of the temporal layers have, and no others."""


@dataclass(frozen=True, kw_only=True)
class InflatedConfig:
    """An image autoencoder with a temporal layer after every residual block of its decoder's levels.

    Raises:
      UserError: an autoencoder that is of clips already, or a span that isn't 2 frames or more.
    """

    image: AutoencoderConfig
    """whose decoder is an `ImageDecoder`"""
    span: int = 3
    """frames that a temporal convolution sees: its own and those before it"""

    def __post_init__(self):
        if self.image.stride.t != 1:
            raise UserError(
                f"{type(self.image).__name__} has a temporal stride of {self.image.stride.t}; inflate an image's, of 1"
            )
        if self.span < 2:
            raise UserError(f"temporal layers that span {self.span} frames see no other frame; use at least 2")

    @property
    def stride(self) -> Grid:
        """Pixels for one latent along (t, h, w)."""
        return self.image.stride

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self.image.channels

    @property
    def last_layer(self) -> str:
        """Path of the parameter that makes the pixels, of those that are trained: the last temporal layer's kernel."""
        paths = flatten(param_shapes(self.make))
        return [path for path in paths if _TEMPORAL in path and path.endswith("conv_out/kernel")][-1]

    def make(self, rngs: nnx.Rngs) -> nnx.Module:
        """The image's module, with temporal layers.

        Raises:
          UserError: an autoencoder whose decoder is not an image's.
        """
        model = self.image.make(rngs)
        decoder = getattr(model, "decoder", None)
        if not isinstance(decoder, ImageDecoder):
            raise UserError(f"{type(self.image).__name__} has no decoder of images; inflate ImageVaeConfig or the like")
        for level, width in zip(decoder.levels, decoder.config.widths[::-1], strict=True):
            level.temporal = nnx.List(
                [TemporalResidual(width, self.span, decoder.config, rngs=rngs) for _ in level.blocks]
            )
        return model


class TemporalResidual(nnx.Module):
    """Twice norm, SiLU and a causal convolution in time, beside the identity, which it starts as."""

    def __init__(self, width: int, span: int, levels: ImageLevels, *, rngs: nnx.Rngs):
        dtype = levels.dtype
        self.norm_in, self.norm_out = GroupNorm(width, levels.groups), GroupNorm(width, levels.groups)
        self.conv_in = CausalConv(width, width, (span, 1, 1), dtype=dtype, rngs=rngs)
        self.conv_out = CausalConv(width, width, (span, 1, 1), init="zero", dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B t h w D"], beside: Beside) -> Float[Array, "B t h w D"]:
        y = self.conv_in(jax.nn.silu(self.norm_in(x)), beside.memory)
        return x + self.conv_out(jax.nn.silu(self.norm_out(y)), beside.memory)


def inflate(
    config: AutoencoderConfig, params: dict[str, Any], key: Array, *, span: int = 3
) -> tuple[InflatedConfig, dict[str, Any]]:
    """A video autoencoder that decodes every frame as the image autoencoder does, until it is trained.

    Args:
      config: of an image autoencoder.
      params: its parameters, which the result shares.
      key: for the temporal layers.
      span: frames that a temporal convolution sees.

    Raises:
      UserError: an autoencoder that can't be inflated, or parameters of another one.
    """
    inflated = InflatedConfig(image=config, span=span)
    return inflated, completed_params(inflated.make, checked_params(config.make, params), key)
