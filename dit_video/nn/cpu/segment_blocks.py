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

from dit_video.nn.attention.api import Keys, Queries, named
from dit_video.nn.attention.backends.dense import MASKED

_NOBODY, _PADDING = -2, -1
"""segments of tokens that don't count, of the outer and of the inner loop: equal to no other"""
_FILLED = 0.75
"""what part of a well filled block is its own"""
_MOST = int(np.iinfo(np.int32).max)
Carried = TypeVar("Carried")


@dataclass(frozen=True)
class Blocks:
    """How two rows are cut: blocks of one of them, and for each those of the other, have the first of these sizes that
    is well filled. Products of a narrow block with a wide one are the fastest in XLA's CPU backend, which divides those
    of less than two chunks among threads to little avail; the smaller sizes are for the ends of segments."""

    narrow: tuple[int, ...]
    wide: tuple[int, ...]

    @staticmethod
    def of(length: int, other: int, chunk: int) -> "Blocks":
        number = max(1, round(length / (2 * chunk)))
        most = -(-length // number)
        sizes = {min(size, other) for size in (8 * chunk, chunk, -(-chunk // 4))}
        return Blocks(_descending({most, -(-most // 4)}), _descending(sizes))


def _descending(sizes: set[int]) -> tuple[int, ...]:
    return tuple(sorted(sizes, reverse=True))


def attend(
    q: Queries, k: Keys, v: Keys, q_segments: Int[Array, "B N"], kv_segments: Int[Array, "B M"], *, chunk: int
) -> Queries:
    """Every token attends to those of its own segment. `q` is already scaled."""
    return _mixed(chunk, q, k, v, q_segments, kv_segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(chunk: int, q: Queries, k: Keys, v: Keys, q_ids: Int[Array, "B N"], kv_ids: Int[Array, "B M"]) -> Queries:
    return _forward(chunk, q, k, v, q_ids, kv_ids)[0]


def _forward(chunk, q, k, v, q_ids, kv_ids):
    blocks = Blocks.of(q.shape[1], k.shape[1], chunk)
    out, lse = jax.lax.map(lambda row: _row(blocks, *row), (q, k, v, q_ids, kv_ids))
    out, lse = named((out, lse), queries=q.shape[1], keys=k.shape[1])
    return out.astype(v.dtype), (q, k, v, q_ids, kv_ids, out, lse)


def _backward(chunk, saved, d_out):
    q, k, v, q_ids, kv_ids, out, lse = saved
    blocks = Blocks.of(k.shape[1], q.shape[1], chunk)
    delta = jnp.moveaxis((out * d_out.astype(jnp.float32)).sum(axis=-1), 2, 1)
    rows = q, k, v, lse, delta, d_out, q_ids, kv_ids
    gradients = jax.lax.map(lambda row: _row_backward(blocks, *row), rows)
    return *(g.astype(x.dtype) for g, x in zip(gradients, (q, k, v), strict=True)), None, None


_mixed.defvjp(_forward, _backward)


def _walk(
    blocks: Blocks,
    ids: Int[Array, " N"],
    other_ids: Int[Array, " M"],
    block: Callable[..., Carried],
    carried: Carried,
) -> Carried:
    """`carried = block(start, own, over_others, carried)` for the blocks of a row of tokens in turn.

    `own` tells which tokens from `start` on are the block's. `over_others(step, state)` is
    `state = step(start, mask, state)` for the blocks of the other row that have tokens of its segments; `mask` tells
    which tokens of the two are of one segment. At a row's end blocks begin earlier than they would: what lies before
    is not their own, or masked.
    """
    length, others = ids.shape[0], other_ids.shape[0]
    places = jnp.arange(length + 1, dtype=jnp.int32)
    begins = jnp.pad(ids[1:] != ids[:-1], 1, constant_values=True)
    boundary = jax.lax.cummax(jnp.where(begins, places, 0))
    # In floating point, as this is what the CPU backend has a fast minimum of; exact up to 16 million.
    other_places = jnp.arange(others, dtype=jnp.float32)

    def stops(first, size):
        full = jnp.minimum(first + size, length)
        return jnp.where(boundary[full] > first, boundary[full], full)

    def outer(size, state):
        first, carried = state
        stop = stops(first, size)
        start = jnp.minimum(first, length - size)
        own = _at((places[:-1] >= first) & (places[:-1] < stop), start, size)
        block_ids = _at(ids, start, size)
        block_ids = jnp.where(own & (block_ids > 0), block_ids, _NOBODY)
        lowest, highest = jnp.where(block_ids > 0, block_ids, _MOST).min(), block_ids.max()
        wanted = jnp.where((lowest <= other_ids) & (other_ids <= highest), other_places, others)

        def next_wanted(first):
            return jnp.where(wanted >= first, wanted, others).min().astype(jnp.int32)

        def well_filled(first, size):
            inside = (wanted >= first) & (wanted < jnp.minimum(first + size, others))
            return jnp.where(inside, 1.0, 0.0).sum() > _FILLED * size

        def over_others(step, state):
            first = next_wanted(0)
            for size in blocks.wide:

                def more(state, size=size):
                    return (state[0] < others) & (size == blocks.wide[-1] or well_filled(state[0], size))

                def inner(state, size=size):
                    first, state = state
                    start = jnp.minimum(first, others - size)
                    theirs = _at(other_ids, start, size)
                    theirs = jnp.where((_at(other_places, start, size) >= first) & (theirs > 0), theirs, _PADDING)
                    return next_wanted(first + size), step(start, block_ids[:, None] == theirs, state)

                first, state = jax.lax.while_loop(more, inner, (first, state))
            return state

        return stop, block(size, start, own, over_others, carried)

    def size_at(first):
        filled = [stops(first, size) - first > _FILLED * size for size in blocks.narrow[:-1]]
        return jnp.argmax(jnp.array([*filled, True]))

    def of_all_sizes(state):
        for place, size in enumerate(blocks.narrow):

            def more(state, place=place):
                return (state[0] < length) & (size_at(state[0]) == place)

            state = jax.lax.while_loop(more, functools.partial(outer, size), state)
        return state

    return jax.lax.while_loop(lambda state: state[0] < length, of_all_sizes, (jnp.int32(0), carried))[1]


def _row(
    blocks: Blocks,
    q: Float[Array, "N K d"],
    k: Float[Array, "M K d"],
    v: Float[Array, "M K d"],
    q_ids: Int[Array, " N"],
    kv_ids: Int[Array, " M"],
) -> tuple[Float[Array, "N K d"], Float[Array, "K N"]]:
    """What a row mixes, and the logarithm of every query's sum of exponentials; both float32. Heads take turns."""

    def head(index, carried):
        def block(size, start, own, over_keys, carried):
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

    Keys are the outer loop, and scores are taken keys first: so two of the three products that follow are plain ones,
    instead of one. That of the queries' gradient is taken turned round, as XLA's CPU backend does it the fastest.
    """

    def head(index, carried):
        def block(size, start, own, over_queries, carried):
            del own
            keys, values = (_of_head(x, start, size, index) for x in (k, v))

            def step(at, mask, state):
                d_q, d_keys, d_values = state
                count = mask.shape[1]
                queries, d_mixed = (_of_head(x, at, count, index) for x in (q, d_out))
                own_lse, own_delta = (jax.lax.dynamic_slice(x, (index, at), (1, count)) for x in (lse, delta))
                scores = jnp.where(mask, _dot(keys, queries, 1, 1), MASKED)
                weights = jnp.exp(scores - own_lse)
                d_scores = (weights * (_dot(values, d_mixed, 1, 1) - own_delta)).astype(k.dtype)
                d_values = d_values + _dot(weights.astype(v.dtype), d_mixed, 1, 0)
                d_keys = d_keys + _dot(d_scores, queries, 1, 0)
                d_queries = _of_head(d_q, at, count, index) + _dot(keys, d_scores, 0, 0).T
                return _put(d_q, d_queries, at, index), d_keys, d_values

            d_q, d_k, d_v = carried
            begin = d_q, jnp.zeros(keys.shape), jnp.zeros(values.shape)
            d_q, d_keys, d_values = over_queries(step, begin)
            # What is not the block's own has gradients of zero here.
            d_k = _put(d_k, _of_head(d_k, start, size, index) + d_keys, start, index)
            return d_q, d_k, _put(d_v, _of_head(d_v, start, size, index) + d_values, start, index)

        return _walk(blocks, kv_ids, q_ids, block, carried)

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
