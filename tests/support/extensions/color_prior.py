"""A prior of colours, and conditioning on them (unCLIP, arXiv 2204.06125), as a file of another package."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx

from dit_video.core.registry import register
from dit_video.models.autoencoders import AutoencoderConfig
from dit_video.models.conditioning import ClipConditioning
from dit_video.tokens import Field, Grid


@register
@dataclass(frozen=True, kw_only=True)
class MeanColorConfig(AutoencoderConfig):
    """An embedding of images without weights: the mean colour of 16 × 16 pixels is one latent."""

    stride: Grid = Grid(1, 16, 16)
    channels: int = 3

    def make(self, rngs):
        return MeanColor()


class MeanColor(nnx.Module):
    def encode(self, pixels, segment_ids=None, cache=None):
        return rearrange(pixels, "b t (h y) (w x) c -> b t h w (y x) c", y=16, x=16).mean(axis=-2)

    def decode(self, latents, cache=None):
        return repeat(latents, "b t h w c -> b t (h y) (w x) c", y=16, x=16)


@register
@dataclass(frozen=True, kw_only=True)
class ColorEmbedding(ClipConditioning):
    """Mean colour of a clip, in [-1, 1]."""

    field = Field(name="color", alignment="example", shape=(3,))

    def from_clip(self, view):
        return (view.frames.mean(axis=(0, 1, 2)) / 127.5 - 1).astype(np.float32)

    def from_request(self, value, latents):
        return np.asarray(value, np.float32).reshape(3)

    def make_embedding(self, width, *, patch, dtype, partitioner, rngs):
        return ColorMap(nnx.Param(0.1 * jnp.ones((3, width))))


class ColorMap(nnx.Module):
    def __init__(self, kernel):
        self.kernel = kernel

    def __call__(self, values):
        return values @ self.kernel[...]
