"""LPIPS, a distance between pictures fitted to human perception (arXiv 1801.03924), on features of VGG16."""

import functools
import itertools
import operator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.nn import CausalConv

VGG_STAGES = (2, 2, 3, 3, 3)
"""Convolutions of VGG16 per stage; stages are separated by halving, and each stage's features are compared."""
VGG_WIDTHS = (64, 128, 256, 512, 512)
MIN_SIDE = 16
"""Minimum pixels of a side, which is halved before every stage but the first."""
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
"""ImageNet's mean and standard deviation of colours, for pixels in [-1, 1]."""
_EPSILON = 1e-10


class Lpips(nnx.Module):
    """The LPIPS distance of clips, averaged over frames.

        sum_l mean over positions of sum_c w_lc (f_lc(x) - f_lc(y))²

    with the features `f` after each of VGG16's five stages, normalised to length 1 at each position (eq. 1). It equals
    `LPIPS(net="vgg")` of the package `lpips` 0.1; `dit_video.weights.load_lpips` reads the parameters.

    Args:
      widths: Channels of the stages, for tests.
      rngs: Random keys of the initial parameters, which are to be replaced by loaded ones.
    """

    def __init__(self, *, widths: tuple[int, ...] = VGG_WIDTHS, rngs: nnx.Rngs):
        stages = []
        for width_in, width, convolutions in zip((3, *widths[:-1]), widths, VGG_STAGES, strict=True):
            pairs = itertools.pairwise((width_in, *[width] * convolutions))
            stages.append(nnx.List([CausalConv(*pair, (1, 3, 3), rngs=rngs) for pair in pairs]))
        self.stages = nnx.List(stages)
        self.weights = nnx.List([nnx.Param(jnp.full((width,), 1 / width, jnp.float32)) for width in widths])

    def __call__(self, pixels: Float[Array, "B T H W 3"], others: Float[Array, "B T H W 3"]) -> Float[Array, " B"]:
        """Return the distance of each clip in [-1, 1] from its other, with frames of at least 16×16 pixels.

        Raises:
          UserError: If the frames are smaller.
        """
        height, width = pixels.shape[2:4]
        if min(height, width) < MIN_SIDE:
            raise UserError(f"frames of {height}x{width} are too small for LPIPS: use {MIN_SIDE}x{MIN_SIDE} or more")
        distances = [
            (jnp.square(one - other) * weight[...]).sum(axis=-1).mean(axis=(1, 2, 3))
            for one, other, weight in zip(self._features(pixels), self._features(others), self.weights, strict=True)
        ]
        return functools.reduce(operator.add, distances)

    def _features(self, pixels: Float[Array, "B T H W 3"]) -> list[Float[Array, "B T h w _"]]:
        x = (pixels - jnp.asarray(_SHIFT)) / jnp.asarray(_SCALE)
        features: list[Array] = []
        for stage in self.stages:
            x = _max_pool(x) if features else x
            for convolution in stage:
                x = jax.nn.relu(convolution(x))
            features.append(_normalize(x))
        return features


def _max_pool(x: Float[Array, "B T H W D"]) -> Float[Array, "B T h w D"]:
    """Return the maximum of every 2×2 cell; an odd last row or column is dropped, as in VGG16."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    cells = x[:, :, : 2 * height, : 2 * width].reshape(*x.shape[:2], height, 2, width, 2, x.shape[-1])
    return cells.max(axis=(3, 5))


def _normalize(x: Float[Array, "B T h w D"]) -> Float[Array, "B T h w D"]:
    """Return `x / (|x| + epsilon)`, with gradient 0 where `x` is 0 (there `lpips` has none)."""
    square = jnp.square(x).sum(axis=-1, keepdims=True)
    length = jnp.sqrt(jnp.where(square > 0, square, 1))
    return x / (jnp.where(square > 0, length, 0) + _EPSILON)
