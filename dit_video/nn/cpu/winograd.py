"""3x3 convolutions with fewer products: F(2x2, 3x3) of Lavin and Gray (arXiv 1509.09308, section 4.1).

Four outputs next to each other take 16 products for each pair of channels instead of 36: of sums and differences of the
input's places with those of the kernel's. In float32 it agrees with the plain sum to about 1e-6.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_ROWS = 4096
"""Tiles that are computed at once: their 16 arrays then stay close to the cores."""
_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)


def winograd(x: Float[Array, "n h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "n h w o"]:
    """The convolution of every picture, zero-padded to its own size."""
    count, height, width = x.shape[:3]
    tiles = -(-height // 2), -(-width // 2)
    margins = ((0, 0), *((1, 1 + 2 * tile - size) for tile, size in zip(tiles, (height, width), strict=True)), (0, 0))
    padded = jnp.pad(x, margins)
    transformed = jnp.einsum("ai,bj,ijco->abco", _KERNEL, _KERNEL, kernel)
    # What is kept for the backward pass is the input alone: its sums take four times the memory, and little time.
    convolve = jax.checkpoint(lambda part: _tiled(part, transformed))
    volume = tiles[0] * tiles[1]
    at_once = max(each for each in range(1, count + 1) if count % each == 0 and (each == 1 or each * volume <= _ROWS))
    if at_once == count:
        y = convolve(padded)
    else:
        parts = padded.reshape(-1, at_once, *padded.shape[1:])
        y = jax.lax.map(convolve, parts).reshape(count, 2 * tiles[0], 2 * tiles[1], -1)
    return y[:, :height, :width]


def _tiled(x: Float[Array, "n H W i"], kernel: Float[Array, "4 4 i o"]) -> Float[Array, "n h w o"]:
    """Pictures that have their padding of one at each side; heights and widths are even."""
    height, width = x.shape[1] - 2, x.shape[2] - 2
    products = [
        [
            jnp.dot(places.reshape(-1, x.shape[-1]), kernel[row, column])
            for column, places in enumerate(_inputs(rows, width, axis=2))
        ]
        for row, rows in enumerate(_inputs(x, height, axis=1))
    ]
    by_row = [_outputs(row) for row in products]
    quarters = zip(*(_outputs(column) for column in zip(*by_row, strict=True)), strict=True)
    shape = (x.shape[0], height // 2, width // 2, kernel.shape[-1])
    rows = [jnp.stack([place.reshape(shape) for place in row], axis=3) for row in quarters]
    return jnp.stack(rows, axis=2).reshape(x.shape[0], height, width, kernel.shape[-1])


def _inputs(x: Array, size: int, *, axis: int) -> list[Array]:
    """The four sums of a tile's places along an axis."""
    first, second, third, fourth = (jax.lax.slice_in_dim(x, at, at + size - 1, 2, axis) for at in range(4))
    return [first - third, second + third, third - second, second - fourth]


def _outputs(products: Sequence[Array]) -> tuple[Array, Array]:
    """Both outputs of a tile along an axis."""
    first, second, third, fourth = products
    return first + second + third, second - third - fourth
