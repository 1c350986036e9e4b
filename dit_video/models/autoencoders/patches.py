"""Causal patches of clips, and the best linear autoencoder of them: their principal components.

The first frame is repeated so that it fills a patch of its own (as in Cosmos-Tokenizer, arXiv 2501.03575, section 4.1).
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Float, Float32, UInt8

from dit_video.core import pixels
from dit_video.core.errors import UserError
from dit_video.core.typing import SameArray
from dit_video.models.autoencoders.interface import chunk_grid
from dit_video.tokens import Grid


def to_patches(
    pixels: Float[SameArray, "B T H W 3"], stride: Grid, *, is_first: bool = True
) -> Float[SameArray, "B t h w p"]:
    """Return causal patches: the first is frame 0 repeated `stride.t` times, each later one has `stride.t` frames.

    If `is_first` is false, the pixels are a later chunk of a clip and all patches have `stride.t` frames.

    Raises:
      UserError: If the size does not fit the stride.
    """
    chunk_grid(Grid(*pixels.shape[1:4]), stride, is_first=is_first)
    if is_first:
        xp = np if isinstance(pixels, np.ndarray) else jnp
        pixels = xp.concatenate([xp.repeat(pixels[:, :1], stride.t - 1, axis=1), pixels], axis=1)
    return rearrange(pixels, "B (t a) (h b) (w c) C -> B t h w (a b c C)", a=stride.t, b=stride.h, c=stride.w)


def from_patches(
    patches: Float[SameArray, "B t h w p"], stride: Grid, *, is_first: bool = True
) -> Float[SameArray, "B T H W C"]:
    """Invert `to_patches`, also for features of any channels; only the last frame of a clip's first patch is kept."""
    pixels = rearrange(patches, "B t h w (a b c C) -> B (t a) (h b) (w c) C", a=stride.t, b=stride.h, c=stride.w)
    return pixels[:, stride.t - 1 :] if is_first else pixels


class LinearAutoencoder(NamedTuple):
    """A linear autoencoder, `latents = (patch - mean) @ basis`, with an orthonormal basis."""

    mean: Float32[np.ndarray, " p"]
    basis: Float32[np.ndarray, "p c"]
    scale: np.float32
    """Root mean square of the latents over all channels."""

    def reconstruct(self, patches: Float[np.ndarray, "*batch p"]) -> Float[np.ndarray, "*batch p"]:
        """Return the nearest patches that can be expressed by `c` numbers each."""
        return (patches - self.mean) @ self.basis @ self.basis.T + self.mean

    def reconstruct_clip(self, frames: UInt8[np.ndarray, "T H W 3"], stride: Grid) -> UInt8[np.ndarray, "T H W 3"]:
        """Return the nearest clip. The stride is the one that this was fitted with."""
        patches = to_patches(pixels.to_float(frames)[None], stride)
        return pixels.to_uint8(from_patches(self.reconstruct(patches), stride)[0])


def fit_linear(
    batches: Iterable[Float32[np.ndarray, "B T H W 3"]], *, stride: Grid, channels: int
) -> LinearAutoencoder:
    """Return the best linear autoencoder of causal patches of clips with pixels in [-1, 1]. Sums are float64.

    Raises:
      UserError: If there are more channels than a patch has values, or there are no clips.
    """
    values = stride.volume * 3
    if channels > values:
        raise UserError(f"channels={channels} is invalid: a patch has {values} values. Use fewer, or a larger stride")
    count, total, products = 0, np.zeros(values), np.zeros((values, values))
    for clips in batches:
        patches = np.asarray(to_patches(clips, stride), np.float64).reshape(-1, values)
        count, total, products = count + len(patches), total + patches.sum(axis=0), products + patches.T @ patches
    if not count:
        raise UserError("principal components need data; give at least one clip")
    mean = total / count
    variances, vectors = np.linalg.eigh(products / count - np.outer(mean, mean))
    basis = vectors[:, ::-1][:, :channels].astype(np.float32)
    scale = np.sqrt(np.maximum(variances[::-1][:channels], 1e-8).mean())
    return LinearAutoencoder(mean.astype(np.float32), basis, np.float32(scale))


@runtime_checkable
class ClipStatistics(Protocol):
    """Statistics of the clips that an autoencoder will be trained on; each is computed when it is asked for."""

    def read_windows(self) -> Iterator[Float32[np.ndarray, "B T H W 3"]]:
        """Yield batches of the training's windows without augmentation, pixels in [-1, 1], the same at every call."""
        ...

    def fit_linear(self, *, stride: Grid, channels: int) -> LinearAutoencoder:
        """Return the best linear autoencoder of the windows; see `dit_video.models.autoencoders.fit_linear`."""
        ...
