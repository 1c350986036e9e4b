"""Values of segments and of their tokens, in packed rows.

Sums and copies are computed as products with one-hot matrices, which have an explicit precision: by default TPUs round
the operands of a float32 product to bfloat16, and GPUs to TF32.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from dit_video.core.typing import AnyArray


def expand_to_tokens(values: Shaped[Array, "B G *rest"], segments: Int[AnyArray, "B N"]) -> Shaped[Array, "B N *rest"]:
    """Return every token's value from one value per segment; padding gets the first segment's."""
    indices = jnp.maximum(segments - 1, 0)
    is_differentiable = jnp.issubdtype(values.dtype, jnp.inexact)
    return (_gather_differentiable if is_differentiable else _gather)(values, indices)


def take_tokens(values: Shaped[Array, "B N *rest"], kept: Int[Array, "B K"]) -> Shaped[Array, "B K *rest"]:
    """Return the values of each row's tokens with the numbers `kept`."""
    return jnp.take_along_axis(values, kept.reshape(*kept.shape, *(1,) * (values.ndim - 2)), axis=1)


_MAX_SELECTED_SEGMENTS = 8
"""Segments per row up to which accelerators select among the values instead of gathering them. Selection is fused into
the operation that reads the values, whereas the result of a gather is written to memory first."""


def _gather(values: Shaped[Array, "B G *rest"], indices: Int[Array, "B N"]) -> Shaped[Array, "B N *rest"]:
    count, shape = values.shape[1], (*indices.shape, *values.shape[2:])
    if count == 1:
        return jnp.broadcast_to(values, shape)
    if count > _MAX_SELECTED_SEGMENTS or jax.default_backend() == "cpu":
        return jax.vmap(lambda row, index: row[index])(values, indices)
    indices = indices.reshape(*indices.shape, *(1,) * (values.ndim - 2))
    gathered = jnp.broadcast_to(values[:, :1], shape)
    for segment in range(1, count):
        gathered = jnp.where(indices == segment, values[:, segment : segment + 1], gathered)
    return gathered


_gather_differentiable = jax.custom_jvp(_gather)


@_gather_differentiable.defjvp
def _gather_jvp(primals, tangents):
    # A product with a one-hot matrix, whose transpose is a product, too. The transpose of a gather is a scatter, which
    # adds the tokens' gradients one by one.
    values, indices = primals
    one_hot = jax.nn.one_hot(indices, values.shape[1], dtype=values.dtype)
    multiply = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    if len(values) == 1:  # XLA's CPU backend takes ten times as long for the gradient with an axis of size 1.
        tangent = multiply("ng,g...->n...", one_hot[0], tangents[0][0])[None]
    else:
        tangent = multiply("bng,bg...->bn...", one_hot, tangents[0])
    return _gather_differentiable(values, indices), tangent


def segment_mean(
    values: Float[Array, "B N *rest"], segments: Int[AnyArray, "B N"], *, count: int
) -> Float[Array, "B {count} *rest"]:
    """Return the mean over each segment's tokens; zero for a segment without any."""
    member = (segments[..., None] == jnp.arange(1, count + 1)).astype(values.dtype)  # B N G
    total = jnp.einsum("bn...,bng->bg...", values, member, precision=jax.lax.Precision.HIGHEST)
    number = jnp.maximum(member.sum(axis=1), 1)
    return total / number.reshape(number.shape + (1,) * (values.ndim - 2))


def segment_max(
    values: Float[Array, "B N"], segments: Int[AnyArray, "B N"], *, count: int
) -> Float[Array, "B {count}"]:
    """Return the largest value in each segment, without rounding; zero for a segment without tokens."""
    member = segments[..., None] == jnp.arange(1, count + 1)
    largest = jnp.where(member, values[..., None], -jnp.inf).max(axis=1)
    return jnp.where(member.any(axis=1), largest, 0.0)


def segment_quantile(
    values: Float[Array, "B N *rest"], segments: Int[AnyArray, "B N"], quantile: float, *, count: int
) -> Float[Array, "B {count}"]:
    """Return a quantile of the values of each segment's tokens, interpolated linearly; zero for an absent segment."""
    values = values.reshape(*values.shape[:2], -1)
    member = segments[:, None, :, None] == jnp.arange(1, count + 1)[:, None, None]
    # Values of other segments come last. The position of the quantile counts the segment's own values.
    ordered = jnp.sort(jnp.where(member, values[:, None], jnp.inf).reshape(len(values), count, -1), axis=-1)
    last = jnp.maximum(member.sum(axis=(2, 3)) * values.shape[-1] - 1, 0)
    position = quantile * last
    low = jnp.floor(position).astype(jnp.int32)
    high = jnp.minimum(low + 1, last)
    below, above = (jnp.take_along_axis(ordered, index[..., None], axis=-1)[..., 0] for index in (low, high))
    return jnp.where(member.any(axis=(2, 3)), below + (position - low) * (above - below), 0.0)


def compute_segment_offsets(segments: Int[AnyArray, "B N"]) -> Int[Array, "B N"]:
    """Return the index of every token within its segment, or within its run of padding."""
    index = jnp.arange(segments.shape[1])[None]
    starts = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1) != segments
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
