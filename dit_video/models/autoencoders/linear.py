"""The optimal linear autoencoder: principal components of spacetime patches.

It is the baseline for learned autoencoders, and the initialisation of `PatchVae`.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8

from dit_video.core import pixels
from dit_video.core.errors import UserError
from dit_video.models.autoencoders.patches import from_patches, to_patches
from dit_video.tokens import Grid


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
        """Return the nearest clip for the stride that this was fitted with."""
        patches = to_patches(pixels.to_float(frames)[None], stride)
        return pixels.to_uint8(from_patches(self.reconstruct(patches), stride)[0])


def fit_linear(
    batches: Iterable[Float32[np.ndarray, "B T H W 3"]], *, stride: Grid, channels: int
) -> LinearAutoencoder:
    """Return the principal components of causal patches of clips with pixels in [-1, 1], computed in float64.

    Raises:
      UserError: more channels than a patch has values, or no clips.
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
