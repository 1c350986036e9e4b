"""Interpolation of frames to the sizes that networks read, as in their references without a filter when shrinking."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def resize_frames(
    pixels: Float[Array, "*B T H W 3"], *, height: int, width: int, has_aligned_corners: bool = False
) -> Float[Array, "*B T {height} {width} 3"]:
    """Resize frames linearly between the four nearest pixels.

    Args:
      pixels: frames.
      height, width: their new size in pixels.
      has_aligned_corners: True to map the centres of the corners' pixels to each other; False for the corners of the
        frame.
    """
    axes, lengths, sides = (pixels.ndim - 3, pixels.ndim - 2), np.array(pixels.shape[-3:-1]), np.array([height, width])
    scale = (sides - 1) / np.maximum(1, lengths - 1) if has_aligned_corners else sides / lengths
    translation = (1 - scale) / 2 if has_aligned_corners else np.zeros(2)
    shape = (*pixels.shape[:-3], height, width, 3)
    return jax.image.scale_and_translate(
        pixels, shape, axes, jnp.float32(scale), jnp.float32(translation), "linear", antialias=False
    )
