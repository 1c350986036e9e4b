"""Winograd 3x3 convolution with fewer products: F(2x2, 3x3) of Lavin and Gray (arXiv 1509.09308, section 4.1).

A tile of 2x2 outputs takes 16 products per pair of channels instead of 36: sums and differences of inputs times sums
and differences of kernel values. In float32 the result agrees with the direct sum to about 1e-6.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_MAX_TILES = 4096
"""Tiles that are computed at once, few enough that their 16 arrays stay in the caches of the cores."""
_KERNEL_TRANSFORM = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)


def winograd_conv(x: Float[Array, "n h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "n h w o"]:
    """Convolve every frame, zero-padded to its own size."""
    count, height, width = x.shape[:3]
    tiles = -(-height // 2), -(-width // 2)
    margins = ((0, 0), *((1, 1 + 2 * tile - size) for tile, size in zip(tiles, (height, width), strict=True)), (0, 0))
    padded = jnp.pad(x, margins)
    transformed = jnp.einsum("ai,bj,ijco->abco", _KERNEL_TRANSFORM, _KERNEL_TRANSFORM, kernel)
    # Only the input is kept for the backward pass: its transform takes four times the memory, and little time.
    convolve = jax.checkpoint(lambda part: _convolve_tiles(part, transformed))
    volume = tiles[0] * tiles[1]
    at_once = max(n for n in range(1, count + 1) if count % n == 0 and (n == 1 or n * volume <= _MAX_TILES))
    if at_once == count:
        y = convolve(padded)
    else:
        parts = padded.reshape(-1, at_once, *padded.shape[1:])
        y = jax.lax.map(convolve, parts).reshape(count, 2 * tiles[0], 2 * tiles[1], -1)
    return y[:, :height, :width]


def _convolve_tiles(x: Float[Array, "n H W i"], kernel: Float[Array, "4 4 i o"]) -> Float[Array, "n h w o"]:
    """Convolve padded frames of even height and width without further padding."""
    height, width = x.shape[1] - 2, x.shape[2] - 2
    products = [
        [
            jnp.dot(values.reshape(-1, x.shape[-1]), kernel[row, column])
            for column, values in enumerate(_transform_inputs(rows, width, axis=2))
        ]
        for row, rows in enumerate(_transform_inputs(x, height, axis=1))
    ]
    by_row = [_transform_outputs(row) for row in products]
    quarters = zip(*(_transform_outputs(column) for column in zip(*by_row, strict=True)), strict=True)
    shape = (x.shape[0], height // 2, width // 2, kernel.shape[-1])
    rows = [jnp.stack([output.reshape(shape) for output in row], axis=3) for row in quarters]
    return jnp.stack(rows, axis=2).reshape(x.shape[0], height, width, kernel.shape[-1])


def _transform_inputs(x: Array, size: int, *, axis: int) -> list[Array]:
    """Return the four transformed inputs of every tile along an axis."""
    first, second, third, fourth = (jax.lax.slice_in_dim(x, start, start + size - 1, 2, axis) for start in range(4))
    return [first - third, second + third, third - second, second - fourth]


def _transform_outputs(products: Sequence[Array]) -> tuple[Array, Array]:
    """Return the two outputs of every tile along an axis."""
    first, second, third, fourth = products
    return first + second + third, second - third - fourth
