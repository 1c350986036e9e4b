"""Norms modulated by the latents at every position, as in the decoder of MoVQ (arXiv 2209.09002, section 3.2).

    F <- phi_scale(q) * norm(F) + phi_shift(q)

with linear phi and, at each position of the features F, the quantised latent q that covers it. A code can then look
different at different positions, which a plain norm makes alike.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.models.autoencoders.blocks import BlockInputs
from dit_video.nn import Linear


class SpatialNorm(nnx.Module):
    """A norm with scale and shift computed from the latents; initialised as the norm alone."""

    def __init__(self, norm: nnx.Module, width: int, channels: int, *, rngs: nnx.Rngs):
        """Create the norm: `norm` is over `width` channels, the latents have `channels`."""
        self.norm = norm
        self.scale = Linear(channels, width, init="zero", rngs=rngs)
        self.scale.bias = nnx.Param(jnp.ones((width,), jnp.float32))
        self.shift = Linear(channels, width, init="zero", rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W D"], inputs: BlockInputs) -> Float[Array, "B T H W D"]:
        assert inputs.latents is not None
        x = self.norm(x, inputs)
        # The maps act on single positions, so they are computed at the latents' resolution, which is the coarsest.
        maps = (part(inputs.latents) for part in (self.scale, self.shift))
        scale, shift = (_upsample_latents(each, x.shape, inputs.is_first) for each in maps)
        return (x * scale + shift).astype(x.dtype)


def _upsample_latents(
    latents: Float[Array, "B t h w D"], shape: tuple[int, ...], is_first: bool
) -> Float[Array, "B T H W D"]:
    """Repeat each latent over all positions that it stands for."""
    frames, rows, columns = latents.shape[1:4]
    # A clip's first latent frame is a single frame at every resolution.
    repeats = (shape[1] - 1) // max(1, frames - 1) if is_first else shape[1] // frames
    if repeats > 1:
        latents = jnp.repeat(latents, repeats, axis=1)[:, repeats - 1 if is_first else 0 :]
    for axis, factor in ((2, shape[2] // rows), (3, shape[3] // columns)):
        latents = jnp.repeat(latents, factor, axis=axis) if factor > 1 else latents
    return latents
