"""Convolutions on CPUs, written as matrix products."""

import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

MAX_COLUMN_BYTES = 2**26
"""Largest number of bytes of columns in memory at once; a single frame is never split, so it may take more."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def im2col_conv(
    x: Float[Array, "B T h w i"],
    kernel: Float[Array, "kt kh kw i o"],
    bias: Float[Array, " o"],
    dtype: DTypeLike = jnp.bfloat16,
) -> Float[Array, "B t h w o"]:
    """Convolve with stride 1 and zero padding in space but not in time: `t = T - kt + 1` frames remain.

    Args:
      x: Input of any dtype; its gradient has the same dtype.
      kernel: Weights of odd height and width.
      bias: Added to every output.
      dtype: Dtype in which values are multiplied; products are summed in float32.

    Returns:
      The output in float32; so are the gradients of the kernel and the bias.
    """
    return _forward(x, kernel, bias, dtype)[0]


def _forward(x: Array, kernel: Array, bias: Array, dtype: DTypeLike) -> tuple[Array, tuple[Array, Array, Array]]:
    rounded = x.astype(dtype)
    merged = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], -1, kernel.shape[-1])
    y = _convolve_frames(_stack_frames(rounded, kernel.shape[0]), merged) + bias
    return y, (rounded, kernel, jnp.zeros((0,), x.dtype))


def _backward(dtype: DTypeLike, kept: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    x, kernel, like = kept
    frames, kernel_h, kernel_w, width, out = kernel.shape
    positions = gradient.reshape(-1, out)
    # A product with ones takes a tenth of the time of XLA's sum.
    d_bias = jnp.dot(jnp.ones((1, len(positions)), positions.dtype), positions)[0]
    gradient = gradient.astype(dtype)
    flipped = kernel[:, ::-1, ::-1].transpose(1, 2, 4, 0, 3).reshape(kernel_h, kernel_w, out, frames * width)
    d_stacked = _convolve_frames(gradient, flipped)
    extra = x.shape[1] - gradient.shape[1]
    # A frame was stacked once at every time offset, so its gradient is the sum over the offsets.
    parts = enumerate(jnp.split(d_stacked, frames, axis=-1))
    padded = (jnp.pad(part, ((0, 0), (offset, extra - offset), (0, 0), (0, 0), (0, 0))) for offset, part in parts)
    d_x = functools.reduce(operator.add, padded)
    d_merged = _compute_kernel_gradient(_stack_frames(x, frames), gradient, (kernel_h, kernel_w))
    d_kernel = jnp.moveaxis(d_merged.reshape(kernel_h, kernel_w, frames, width, out), 2, 0)
    return d_x.astype(like.dtype), d_kernel, d_bias


im2col_conv.defvjp(_forward, _backward)


def _convolve_frames(x: Float[Array, "B t h w i"], kernel: Float[Array, "kh kw i o"]) -> Float[Array, "B t h w o"]:
    """Convolve every frame in space."""
    factor = kernel.astype(x.dtype).reshape(-1, kernel.shape[-1])

    def product(frames: Array) -> Array:
        return _dot(_gather_columns(frames, kernel.shape[:2]), factor)

    parts = _split_frames(x, kernel.shape[:2])
    y = product(parts[0]) if len(parts) == 1 else jax.lax.map(product, parts)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _compute_kernel_gradient(
    x: Float[Array, "B t h w i"], gradient: Float[Array, "B t h w o"], kernel_size: tuple[int, int]
) -> Float[Array, "k o"]:
    """Return the gradient of the 2-D convolution's kernel from its output's gradient."""
    parts = _split_frames(x, kernel_size)
    gradients = gradient.reshape(len(parts), -1, gradient.shape[-1])

    def product(part: tuple[Array, Array]) -> Array:
        return _dot(_transpose(part[1]), _gather_columns(part[0], kernel_size))

    if len(parts) == 1:
        return product((parts[0], gradients[0])).T
    start = jnp.zeros((gradient.shape[-1], kernel_size[0] * kernel_size[1] * x.shape[-1]), jnp.float32)
    return jax.lax.scan(lambda total, part: (total + product(part), None), start, (parts, gradients))[0].T


def _dot(left: Float[Array, "p k"], right: Float[Array, "k o"]) -> Float[Array, "p o"]:
    """Return the matrix product, behind a barrier so that XLA cannot fold a transpose of it into the factors."""
    return jax.lax.optimization_barrier(jnp.dot(left, right, preferred_element_type=jnp.float32))


def _transpose(x: Float[Array, "p o"]) -> Float[Array, "o p"]:
    """Transpose in two halves.

    XLA would fold a whole transpose into the following product, which is slow in bfloat16.
    """
    half = x.shape[1] // 2
    return jnp.concatenate([x[:, :half].T, x[:, half:].T])


def _split_frames(x: Float[Array, "B t h w i"], kernel_size: Sequence[int]) -> Float[Array, "parts n h w i"]:
    """Divide the frames into equal parts whose columns are within the limit."""
    count = x.shape[0] * x.shape[1]
    frame = compute_column_bytes(x.shape[2:], kernel_size, x.dtype)
    at_once = max(n for n in range(1, count + 1) if count % n == 0 and (n == 1 or n * frame <= MAX_COLUMN_BYTES))
    return x.reshape(count // at_once, at_once, *x.shape[2:])


def compute_column_bytes(
    frame_shape: Sequence[int], kernel_size: Sequence[int], dtype: DTypeLike = jnp.bfloat16
) -> int:
    """Return the bytes of the columns of one frame `[h w i]`."""
    return math.prod((*frame_shape, *kernel_size)) * jnp.dtype(dtype).itemsize


def _gather_columns(x: Float[Array, "n h w i"], kernel_size: Sequence[int]) -> Float[Array, "p k"]:
    """Gather the values that every output position sees, with zeros beyond the edges, by (row, column, channel)."""
    (kernel_h, kernel_w), (height, width) = kernel_size, x.shape[1:3]
    moved = _to_integers(x)
    padded = jnp.pad(moved, ((0, 0), (kernel_h // 2, kernel_h // 2), (kernel_w // 2, kernel_w // 2), (0, 0)))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(kernel_h) for j in range(kernel_w)]
    gathered = _to_floats(jnp.concatenate(shifted, axis=-1), x.dtype)
    return jax.lax.optimization_barrier(gathered.reshape(-1, gathered.shape[-1]))


def _stack_frames(x: Float[Array, "B T h w i"], frames: int) -> Float[Array, "B t h w c"]:
    """Stack every run of `frames` consecutive frames along the channels."""
    if frames == 1:
        return x
    moved, length = _to_integers(x), x.shape[1] - frames + 1
    stacked = jnp.concatenate([moved[:, offset : offset + length] for offset in range(frames)], axis=-1)
    return _to_floats(stacked, x.dtype)


def _to_integers(x: Float[Array, "*positions i"]) -> Array:
    """Reinterpret bfloat16 as integers; each holds two channels if their number is even.

    XLA on CPU converts bfloat16 to float32 and back merely to move it; integers are copied as they are.
    """
    if x.dtype != jnp.bfloat16:
        return x
    if x.shape[-1] % 2:
        return jax.lax.bitcast_convert_type(x, jnp.uint16)
    return jax.lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 2), jnp.uint32)


def _to_floats(x: Array, dtype: jnp.dtype) -> Array:
    """Invert `_to_integers`."""
    if x.dtype == dtype:
        return x
    floats = jax.lax.bitcast_convert_type(x, dtype)
    return floats if x.dtype == jnp.uint16 else floats.reshape(*x.shape[:-1], -1)


_MAX_TILES = 4096
"""Largest number of tiles computed at once, small enough that their 16 arrays stay in the cores' caches."""
_KERNEL_TRANSFORM = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)


def winograd_conv(x: Float[Array, "n h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "n h w o"]:
    """Convolve every frame, zero-padded to its own size."""
    count, height, width = x.shape[:3]
    tiles = -(-height // 2), -(-width // 2)
    margins = ((0, 0), *((1, 1 + 2 * tile - size) for tile, size in zip(tiles, (height, width), strict=True)), (0, 0))
    padded = jnp.pad(x, margins)
    transformed = jnp.einsum("ai,bj,ijco->abco", _KERNEL_TRANSFORM, _KERNEL_TRANSFORM, kernel)
    # Only the input is kept for the backward pass, as its transform takes four times the memory but little time.
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
