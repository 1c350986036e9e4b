"""The best linear autoencoder: principal components of spacetime patches.

The baseline that a learned autoencoder has to beat, and the point that ours starts from.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8

from dit_video.autoencoders.patches import from_patches, to_patches
from dit_video.core import pixels
from dit_video.core.errors import UserError
from dit_video.tokens import Grid


class LinearAutoencoder(NamedTuple):
    """`latents = (patch - mean) @ basis`; the basis is orthonormal."""

    mean: Float32[np.ndarray, " p"]
    basis: Float32[np.ndarray, "p c"]
    scale: np.float32
    """the root mean square of the latents over all channels"""

    def reconstruct(self, patches: Float[np.ndarray, "*batch p"]) -> Float[np.ndarray, "*batch p"]:
        """The nearest patches that `c` numbers each can express."""
        return (patches - self.mean) @ self.basis @ self.basis.T + self.mean

    def reconstruct_clip(self, frames: UInt8[np.ndarray, "T H W 3"], stride: Grid) -> UInt8[np.ndarray, "T H W 3"]:
        """The nearest clip, of the stride that it was fitted for."""
        patches = to_patches(pixels.to_float(frames)[None], stride)
        return pixels.to_uint8(from_patches(self.reconstruct(patches), stride)[0])


def fit_linear(
    batches: Iterable[Float32[np.ndarray, "B T H W 3"]], *, stride: Grid, channels: int
) -> LinearAutoencoder:
    """Principal components of the causal patches of clips with pixels in [-1, 1], in float64.

    Raises:
      UserError: more channels than a patch has values, or no clips.
    """
    values = stride.volume * 3
    if channels > values:
        raise UserError(
            f"{channels} channels are more than the {values} values of a patch; use at most {values}, or a wider stride"
        )
    count, total, products = 0, np.zeros(values), np.zeros((values, values))
    for clips in batches:
        patches = np.asarray(to_patches(clips, stride), np.float64).reshape(-1, values)
        count, total, products = count + len(patches), total + patches.sum(axis=0), products + patches.T @ patches
    if not count:
        raise UserError("principal components of no clips were asked for; give at least one clip")
    mean = total / count
    variances, vectors = np.linalg.eigh(products / count - np.outer(mean, mean))
    basis = vectors[:, ::-1][:, :channels].astype(np.float32)
    scale = np.sqrt(np.maximum(variances[::-1][:channels], 1e-8).mean())
    return LinearAutoencoder(mean.astype(np.float32), basis, np.float32(scale))
