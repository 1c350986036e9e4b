"""Norms that the latents modulate at every position, as the decoder of MoVQ has them (arXiv 2209.09002, section 3.2).

    F <- phi_scale(q) * norm(F) + phi_shift(q)

with linear phi, at each position of the features F the quantised latent q that it lies in. A code then looks different
at different places, which a plain norm makes alike.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.nn import Linear


class Guide(NamedTuple):
    """The latents that a decoder's features are made of."""

    latents: Float[Array, "B t h w c"]
    begins: bool = True
    """whether they are a clip's first ones, so that the first latent frame stands for one frame alone"""


class SpatialNorm(nnx.Module):
    """A norm whose scale and shift the latents give; at the start it is the norm alone."""

    def __init__(self, norm: nnx.Module, width: int, channels: int, *, rngs: nnx.Rngs):
        """`norm` is of features of `width`, the latents have `channels`."""
        self.norm = norm
        self.scale = Linear(channels, width, init="zero", rngs=rngs)
        self.scale.bias = nnx.Param(jnp.ones((width,), jnp.float32))
        self.shift = Linear(channels, width, init="zero", rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W D"], guide: Guide) -> Float[Array, "B T H W D"]:
        return self.modulated(self.norm(x), guide)

    def modulated(self, x: Float[Array, "B T H W D"], guide: Guide) -> Float[Array, "B T H W D"]:
        """Features that are normed already."""
        # The maps are of single positions, so they are computed at the latents' resolution, which is the coarsest.
        scale, shift = (_spread(part(guide.latents), x.shape, guide.begins) for part in (self.scale, self.shift))
        return (x * scale + shift).astype(x.dtype)


def _spread(latents: Float[Array, "B t h w D"], shape: tuple[int, ...], begins: bool) -> Float[Array, "B T H W D"]:
    """Each latent at all positions that it stands for."""
    frames, rows, columns = latents.shape[1:4]
    # A clip's first latent frame is one frame, at every resolution.
    times = (shape[1] - 1) // max(1, frames - 1) if begins else shape[1] // frames
    if times > 1:
        latents = jnp.repeat(latents, times, axis=1)[:, times - 1 if begins else 0 :]
    for axis, factor in ((2, shape[2] // rows), (3, shape[3] // columns)):
        latents = jnp.repeat(latents, factor, axis=axis) if factor > 1 else latents
    return latents
