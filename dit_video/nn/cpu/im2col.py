"""A convolution as one product over columns, each of all that an output sees (im2col), with a backward pass of its own.

For bfloat16 on CPU: XLA is quick there at plain products of two matrices that give float32, and at nothing else. So the
columns are moved as integers, no factor of a product is transposed in it, and what is differentiated is not the
forward pass: the gradient of the input is the convolution of the output's with the flipped kernel, that of the kernel
one product with the same columns, that of the bias a product with ones.
"""

import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

LIMIT = 2**26
"""Bytes of columns that are held at once, as long as a single frame's are fewer."""


def columns(
    x: Float[Array, "B T h w i"],
    kernel: Float[Array, "kt kh kw i o"],
    bias: Float[Array, " o"],
    dtype: DTypeLike = jnp.bfloat16,
) -> Float[Array, "B t h w o"]:
    """A convolution of stride 1: `t = T - kt + 1` frames, zero-padded in space.

    Args:
      x: of any dtype, which its gradient has too.
      kernel: of odd height and width.
      bias: what is added.
      dtype: of the factors; products are summed in float32.

    Returns:
      Float32, as the gradients of the kernel and the bias.
    """
    return _convolution(x, kernel, bias, jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _convolution(x: Array, kernel: Array, bias: Array, dtype: jnp.dtype) -> Array:
    return _forward(x, kernel, bias, dtype)[0]


def _forward(x: Array, kernel: Array, bias: Array, dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array, Array]]:
    rounded = x.astype(dtype)
    merged = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], -1, kernel.shape[-1])
    y = _spatial(_stacked(rounded, kernel.shape[0]), merged) + bias
    return y, (rounded, kernel, jnp.zeros((0,), x.dtype))


def _backward(dtype: jnp.dtype, kept: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    x, kernel, like = kept
    frames, high, wide, width, out = kernel.shape
    places = gradient.reshape(-1, out)
    of_bias = jnp.dot(jnp.ones((1, len(places)), places.dtype), places)[0]  # a sum, in a tenth of XLA's time for it
    gradient = gradient.astype(dtype)
    flipped = kernel[:, ::-1, ::-1].transpose(1, 2, 4, 0, 3).reshape(high, wide, out, frames * width)
    of_stacked = _spatial(gradient, flipped)
    later = x.shape[1] - gradient.shape[1]
    of_x = functools.reduce(  # every frame was stacked at each offset
        operator.add,
        (
            jnp.pad(part, ((0, 0), (offset, later - offset), (0, 0), (0, 0), (0, 0)))
            for offset, part in enumerate(jnp.split(of_stacked, frames, axis=-1))
        ),
    )
    of_merged = _of_kernel(_stacked(x, frames), gradient, (high, wide))
    of_kernel = jnp.moveaxis(of_merged.reshape(high, wide, frames, width, out), 2, 0)
    return of_x.astype(like.dtype), of_kernel, of_bias


_convolution.defvjp(_forward, _backward)


def _spatial(x: Float[Array, "B t h w i"], kernel: Float[Array, "kh kw i o"]) -> Float[Array, "B t h w o"]:
    """A 2-D convolution of every frame."""
    factor = kernel.astype(x.dtype).reshape(-1, kernel.shape[-1])

    def product(pictures: Array) -> Array:
        return _dot(_columns(pictures, kernel.shape[:2]), factor)

    parts = _parts(x, kernel.shape[:2])
    y = product(parts[0]) if len(parts) == 1 else jax.lax.map(product, parts)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _of_kernel(
    x: Float[Array, "B t h w i"], gradient: Float[Array, "B t h w o"], size: tuple[int, int]
) -> Float[Array, "k o"]:
    """The gradient of the kernel of such a convolution from that of its output."""
    parts = _parts(x, size)
    gradients = gradient.reshape(len(parts), -1, gradient.shape[-1])

    def product(part: tuple[Array, Array]) -> Array:
        return _dot(_transposed(part[1]), _columns(part[0], size))

    if len(parts) == 1:
        return product((parts[0], gradients[0])).T
    start = jnp.zeros((gradient.shape[-1], size[0] * size[1] * x.shape[-1]), jnp.float32)
    return jax.lax.scan(lambda total, part: (total + product(part), None), start, (parts, gradients))[0].T


def _dot(left: Float[Array, "p k"], right: Float[Array, "k o"]) -> Float[Array, "p o"]:
    """A product whose transpose XLA may not take for one of transposed factors."""
    return jax.lax.optimization_barrier(jnp.dot(left, right, preferred_element_type=jnp.float32))


def _transposed(x: Float[Array, "p o"]) -> Float[Array, "o p"]:
    """The transpose, in two halves, as XLA would have a product do it itself, of which bfloat16 is not capable."""
    half = x.shape[1] // 2
    return jnp.concatenate([x[:, :half].T, x[:, half:].T])


def _parts(x: Float[Array, "B t h w i"], size: Sequence[int]) -> Float[Array, "parts n h w i"]:
    """Frames, in parts whose columns are within the limit."""
    count = x.shape[0] * x.shape[1]
    frame = frame_bytes(x.shape[2:], size, x.dtype)
    at_once = max(n for n in range(1, count + 1) if count % n == 0 and (n == 1 or n * frame <= LIMIT))
    return x.reshape(count // at_once, at_once, *x.shape[2:])


def frame_bytes(frame: Sequence[int], kernel: Sequence[int], dtype: DTypeLike = jnp.bfloat16) -> int:
    """What the columns of one frame `[h w i]` take."""
    return math.prod((*frame, *kernel)) * jnp.dtype(dtype).itemsize


def _columns(x: Float[Array, "n h w i"], size: Sequence[int]) -> Float[Array, "p k"]:
    """What every place sees, zeros beyond the edges: first by row, then by column, then by channel."""
    (high, wide), (height, width) = size, x.shape[1:3]
    moved = _as_integers(x)
    padded = jnp.pad(moved, ((0, 0), (high // 2, high // 2), (wide // 2, wide // 2), (0, 0)))
    seen = [padded[:, row : row + height, column : column + width] for row in range(high) for column in range(wide)]
    found = _as_floats(jnp.concatenate(seen, axis=-1), x.dtype)
    return jax.lax.optimization_barrier(found.reshape(-1, found.shape[-1]))


def _stacked(x: Float[Array, "B T h w i"], frames: int) -> Float[Array, "B t h w c"]:
    """Every run of frames, as channels."""
    if frames == 1:
        return x
    moved, length = _as_integers(x), x.shape[1] - frames + 1
    return _as_floats(
        jnp.concatenate([moved[:, offset : offset + length] for offset in range(frames)], axis=-1), x.dtype
    )


def _as_integers(x: Float[Array, "*places i"]) -> Array:
    """The same bits, two channels in a number where they are even: XLA's CPU moves bfloat16 by way of float32."""
    if x.dtype != jnp.bfloat16:
        return x
    if x.shape[-1] % 2:
        return jax.lax.bitcast_convert_type(x, jnp.uint16)
    return jax.lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 2), jnp.uint32)


def _as_floats(x: Array, dtype: jnp.dtype) -> Array:
    """Their inverse."""
    if x.dtype == dtype:
        return x
    floats = jax.lax.bitcast_convert_type(x, dtype)
    return floats if x.dtype == jnp.uint16 else floats.reshape(*x.shape[:-1], -1)
