"""Causal spacetime patches of pixels."""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Float

from dit_video.core.typing import SameArray
from dit_video.models.autoencoders.interface import chunk_grid
from dit_video.tokens import Grid


def to_patches(
    pixels: Float[SameArray, "B T H W 3"], stride: Grid, *, is_first: bool = True
) -> Float[SameArray, "B t h w p"]:
    """Return causal patches: the first is frame 0 repeated `stride.t` times, each later one has `stride.t` frames.

    If `is_first` is false, the pixels are a later chunk of a clip and all patches have `stride.t` frames.

    Raises:
      UserError: a size that does not fit the stride.
    """
    chunk_grid(Grid(*pixels.shape[1:4]), stride, is_first=is_first)
    if is_first:
        xp = np if isinstance(pixels, np.ndarray) else jnp
        pixels = xp.concatenate([xp.repeat(pixels[:, :1], stride.t - 1, axis=1), pixels], axis=1)
    return rearrange(pixels, "B (t a) (h b) (w c) C -> B t h w (a b c C)", a=stride.t, b=stride.h, c=stride.w)


def from_patches(
    patches: Float[SameArray, "B t h w p"], stride: Grid, *, is_first: bool = True
) -> Float[SameArray, "B T H W 3"]:
    """Invert `to_patches`; only the last frame of a clip's first patch is kept."""
    pixels = rearrange(patches, "B t h w (a b c C) -> B (t a) (h b) (w c) C", a=stride.t, b=stride.h, c=stride.w)
    return pixels[:, stride.t - 1 :] if is_first else pixels
