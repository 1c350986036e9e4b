"""Attention among the tokens of a segment, in the form that is fastest on CPU: blocks begin where segments do.

As in `chunked`, softmax is taken online and the backward pass computes the scores again (arXiv 2205.14135). What
differs is where blocks lie. A block of queries begins where the one before ended, and ends with the last whole segment
that it has room for, or full; a block of keys begins at the next key that any of these queries may see. So blocks of
short segments hold several, and those of long ones waste little.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from dit_video.nn.attention.dense import MASKED
from dit_video.nn.attention.interface import Keys, Queries

_NOBODY, _PADDING = -2, -1
"""segments of queries that see nothing, and of keys that nobody sees"""
_MOST = int(np.iinfo(np.int32).max)
Carried = TypeVar("Carried")


@dataclass(frozen=True)
class Blocks:
    """How a row is cut: into so many queries at a time; and keys, in the first of these sizes that is well filled."""

    queries: int
    keys: tuple[int, ...]

    @staticmethod
    def of(length: int, keys: int, chunk: int) -> "Blocks":
        """From twice a chunk on: the CPU backend divides smaller products among threads to little avail."""
        number = max(1, round(length / (2 * chunk)))
        sizes = {min(size * chunk, keys) for size in (2, 8)}
        return Blocks(-(-length // number), tuple(sorted(sizes, reverse=True)))


def attend(
    q: Queries, k: Keys, v: Keys, q_segments: Int[Array, "B N"], kv_segments: Int[Array, "B M"], *, chunk: int
) -> Queries:
    """Every token attends to those of its own segment. `q` is already scaled."""
    q_ids = jnp.where(q_segments > 0, q_segments, _NOBODY)
    kv_ids = jnp.where(kv_segments > 0, kv_segments, _PADDING)
    return _mixed(Blocks.of(q.shape[1], k.shape[1], chunk), q, k, v, q_ids, kv_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(
    blocks: Blocks, q: Queries, k: Keys, v: Keys, q_ids: Int[Array, "B N"], kv_ids: Int[Array, "B M"]
) -> Queries:
    return _forward(blocks, q, k, v, q_ids, kv_ids)[0]


def _forward(blocks, q, k, v, q_ids, kv_ids):
    out, lse = jax.lax.map(lambda row: _row(blocks, *row), (q, k, v, q_ids, kv_ids))
    return out.astype(v.dtype), (q, k, v, q_ids, kv_ids, out, lse)


def _backward(blocks, saved, d_out):
    q, k, v, q_ids, kv_ids, out, lse = saved
    delta = jnp.moveaxis((out * d_out.astype(jnp.float32)).sum(axis=-1), 2, 1)
    rows = q, k, v, lse, delta, d_out, q_ids, kv_ids
    gradients = jax.lax.map(lambda row: _row_backward(blocks, *row), rows)
    return *(g.astype(x.dtype) for g, x in zip(gradients, (q, k, v), strict=True)), None, None


_mixed.defvjp(_forward, _backward)


def _walk(
    blocks: Blocks,
    q_ids: Int[Array, " N"],
    kv_ids: Int[Array, " M"],
    block: Callable[..., Carried],
    carried: Carried,
) -> Carried:
    """`carried = block(start, own, over_keys, carried)` for the blocks of queries in turn.

    `own` tells which queries from `start` on are the block's. `over_keys(step, state)` is
    `state = step(start, mask, state)` for its blocks of keys, `mask` telling who sees whom. At the row's end blocks
    begin earlier than they would, and what lies before is not their own, or is seen by nobody.
    """
    length, keys = q_ids.shape[0], kv_ids.shape[0]
    places = jnp.arange(length + 1, dtype=jnp.int32)
    begins = jnp.pad(q_ids[1:] != q_ids[:-1], 1, constant_values=True)
    boundary = jax.lax.cummax(jnp.where(begins, places, 0))
    # In floating point, as this is what the CPU backend has a fast minimum of; exact up to 16 million.
    key_places = jnp.arange(keys, dtype=jnp.float32)

    def outer(state):
        first, carried = state
        full = jnp.minimum(first + blocks.queries, length)
        stop = jnp.where(boundary[full] > first, boundary[full], full)
        start = jnp.minimum(first, length - blocks.queries)
        own = (places[:-1] >= first) & (places[:-1] < stop)
        own = _at(own, start, blocks.queries)
        ids = jnp.where(own, _at(q_ids, start, blocks.queries), _NOBODY)
        lowest, highest = jnp.where(ids > 0, ids, _MOST).min(), ids.max()
        wanted = jnp.where((lowest <= kv_ids) & (kv_ids <= highest), key_places, keys)

        def next_key(first):
            return jnp.where(wanted >= first, wanted, keys).min().astype(jnp.int32)

        def well_filled(first, size):
            inside = (wanted >= first) & (wanted < jnp.minimum(first + size, keys))
            return jnp.where(inside, 1.0, 0.0).sum() > 0.75 * size

        def over_keys(step, state):
            first = next_key(0)
            for size in blocks.keys:

                def more(state, size=size):
                    return (state[0] < keys) & (size == blocks.keys[-1] or well_filled(state[0], size))

                def inner(state, size=size):
                    first, state = state
                    start = jnp.minimum(first, keys - size)
                    unseen = jnp.where(_at(key_places, start, size) < first, _PADDING, _at(kv_ids, start, size))
                    return next_key(first + size), step(start, ids[:, None] == unseen, state)

                first, state = jax.lax.while_loop(more, inner, (first, state))
            return state

        return stop, block(start, own, over_keys, carried)

    return jax.lax.while_loop(lambda state: state[0] < length, outer, (jnp.int32(0), carried))[1]


def _row(
    blocks: Blocks,
    q: Float[Array, "N K d"],
    k: Float[Array, "M K d"],
    v: Float[Array, "M K d"],
    q_ids: Int[Array, " N"],
    kv_ids: Int[Array, " M"],
) -> tuple[Float[Array, "N K d"], Float[Array, "K N"]]:
    """What a row mixes, and the logarithm of every query's sum of exponentials; both float32. Heads take turns."""
    size = blocks.queries

    def head(index, carried):
        def block(start, own, over_keys, carried):
            queries = _of_head(q, start, size, index)

            def step(at, mask, state):
                top, total, mixed = state
                keys, values = (_of_head(x, at, mask.shape[1], index) for x in (k, v))
                scores = jnp.where(mask, _dot(queries, keys, 1, 1), MASKED)
                new_top = jnp.maximum(top, scores.max(axis=-1))
                weights = jnp.exp(scores - new_top[:, None])
                shrink = jnp.exp(top - new_top)
                part = _dot(weights.astype(v.dtype), values, 1, 0)
                return new_top, total * shrink + weights.sum(axis=-1), mixed * shrink[:, None] + part

            begin = jnp.full(size, MASKED), jnp.zeros(size), jnp.zeros((size, v.shape[-1]))
            top, total, mixed = over_keys(step, begin)
            sees = top > MASKED
            out, lse = carried
            mixed = jnp.where(sees[:, None], mixed / total[:, None], 0.0)
            # So far above all scores that the backward pass finds weights of zero where nothing is seen.
            at_most = jnp.where(sees, top + jnp.log(total), -MASKED)
            before = jax.lax.dynamic_slice(lse, (index, start), (1, size))
            lse = jax.lax.dynamic_update_slice(lse, jnp.where(own, at_most, before), (index, start))
            return _put(out, jnp.where(own[:, None], mixed, _of_head(out, start, size, index)), start, index), lse

        return _walk(blocks, q_ids, kv_ids, block, carried)

    heads = q.shape[1]
    return jax.lax.fori_loop(0, heads, head, (jnp.zeros((*q.shape[:2], v.shape[2])), jnp.zeros((heads, q.shape[0]))))


def _row_backward(
    blocks: Blocks,
    q: Float[Array, "N K d"],
    k: Float[Array, "M K d"],
    v: Float[Array, "M K d"],
    lse: Float[Array, "K N"],
    delta: Float[Array, "K N"],
    d_out: Float[Array, "N K d"],
    q_ids: Int[Array, " N"],
    kv_ids: Int[Array, " M"],
) -> tuple[Float[Array, "N K d"], Float[Array, "M K d"], Float[Array, "M K d"]]:
    """Gradients of a row, in float32 (arXiv 2205.14135, appendix B.2).

    Scores are taken keys first: two of the three products that follow are then plain ones, instead of one, and the
    gradient of the queries is summed turned round, as that is how XLA's CPU backend multiplies by them the fastest.
    """
    size = blocks.queries

    def head(index, carried):
        def block(start, own, over_keys, carried):
            queries, d_mixed = (_of_head(x, start, size, index) for x in (q, d_out))
            own_lse, own_delta = (jax.lax.dynamic_slice(x, (index, start), (1, size)) for x in (lse, delta))

            def step(at, mask, state):
                d_turned, d_k, d_v = state
                count = mask.shape[1]
                keys, values = (_of_head(x, at, count, index) for x in (k, v))
                scores = jnp.where(mask.T, _dot(keys, queries, 1, 1), MASKED)
                weights = jnp.exp(scores - own_lse)
                d_scores = (weights * (_dot(values, d_mixed, 1, 1) - own_delta)).astype(k.dtype)
                d_values = _of_head(d_v, at, count, index) + _dot(weights.astype(v.dtype), d_mixed, 1, 0)
                d_keys = _of_head(d_k, at, count, index) + _dot(d_scores, queries, 1, 0)
                return (
                    d_turned + _dot(keys, d_scores, 0, 0),
                    _put(d_k, d_keys, at, index),
                    _put(d_v, d_values, at, index),
                )

            d_q, d_k, d_v = carried
            d_turned, d_k, d_v = over_keys(step, (jnp.zeros(queries.shape[::-1]), d_k, d_v))
            d_queries = jnp.where(own[:, None], d_turned.T, _of_head(d_q, start, size, index))
            return _put(d_q, d_queries, start, index), d_k, d_v

        return _walk(blocks, q_ids, kv_ids, block, carried)

    return jax.lax.fori_loop(0, q.shape[1], head, tuple(jnp.zeros(x.shape) for x in (q, k, v)))


def _dot(left: Float[Array, "_ _"], right: Float[Array, "_ _"], left_axis: int, right_axis: int) -> Float[Array, "_ _"]:
    """A matrix product over these axes, summed in float32."""
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)


def _at(row: Shaped[Array, " N"], start: Int[Array, ""], size: int) -> Shaped[Array, " n"]:
    return jax.lax.dynamic_slice_in_dim(row, start, size)


def _of_head(
    rows: Float[Array, "N K d"], start: Int[Array, ""], size: int, head: Int[Array, ""]
) -> Float[Array, "{size} d"]:
    return jax.lax.dynamic_slice(rows, (start, head, 0), (size, 1, rows.shape[2]))[:, 0]


def _put(
    rows: Float[Array, "N K d"], block: Float[Array, "n d"], start: Int[Array, ""], head: Int[Array, ""]
) -> Float[Array, "N K d"]:
    return jax.lax.dynamic_update_slice(rows, block[:, None], (start, head, 0))
