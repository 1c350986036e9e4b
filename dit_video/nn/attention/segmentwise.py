"""Attention among the tokens of a segment, in the form that is fastest on CPU: blocks begin where segments do.

As in `chunked`, softmax is taken online and the backward pass computes the scores again (arXiv 2205.14135). What
differs is where blocks lie. A block of queries begins where the one before ended, and ends with the last whole segment
that it has room for, or full; a block of keys begins at the next key that any of these queries may see. So blocks of
short segments hold several, and those of long ones waste little. The heads are divided among as many loops as there are
threads to run them: XLA's CPU backend runs independent loops side by side, while within a loop it uses little more than
one thread for products of this size.
"""

import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from dit_video.nn.attention.dense import MASKED
from dit_video.nn.attention.interface import Keys, Queries

_NOBODY, _PADDING = -2, -1
"""segments of queries that see nothing, and of keys that nobody sees"""
_MOST_LOOPS = 8
"""as each is compiled for itself"""
_MOST = int(np.iinfo(np.int32).max)
Carried = TypeVar("Carried")


@dataclass(frozen=True)
class Blocks:
    """How a row is cut: into queries and keys at a time, with how many loops side by side."""

    queries: int
    keys: int
    loops: int

    @staticmethod
    def of(length: int, keys: int, heads: int, chunk: int) -> "Blocks":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Blocks(min(chunk, length), min(2 * chunk, keys), min(heads, cores, _MOST_LOOPS))


def attend(
    q: Queries, k: Keys, v: Keys, q_segments: Int[Array, "B N"], kv_segments: Int[Array, "B M"], *, chunk: int
) -> Queries:
    """Every token attends to those of its own segment. `q` is already scaled."""
    length, keys = q.shape[1], k.shape[1]
    blocks = Blocks.of(length, keys, q.shape[2], chunk)
    # Room for blocks that begin anywhere.
    q, k, v = (_heads_first(x, size) for x, size in ((q, blocks.queries), (k, blocks.keys), (v, blocks.keys)))
    q_ids = _extended(q_segments, blocks.queries, _NOBODY)
    kv_ids = _extended(jnp.where(kv_segments > 0, kv_segments, _PADDING), blocks.keys, _PADDING)
    return jnp.moveaxis(_mixed(blocks, q, k, v, q_ids, kv_ids)[:, :, :length], 1, 2).astype(v.dtype)


def _extended(rows: Shaped[Array, "B N *rest"], by: int, fill: int) -> Shaped[Array, "B M *rest"]:
    return jnp.pad(rows, ((0, 0), (0, by), *((0, 0),) * (rows.ndim - 2)), constant_values=fill)


def _heads_first(x: Float[Array, "B N K d"], by: int) -> Float[Array, "B K M d"]:
    return jnp.moveaxis(_extended(x, by, 0), 2, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(
    blocks: Blocks,
    q: Float[Array, "B K N d"],
    k: Float[Array, "B K M d"],
    v: Float[Array, "B K M d"],
    q_ids: Int[Array, "B N"],
    kv_ids: Int[Array, "B M"],
) -> Float[Array, "B K N d"]:
    return _each_head(functools.partial(_head, blocks), blocks, (q, k, v), (q_ids, kv_ids))[0]


def _forward(blocks, q, k, v, q_ids, kv_ids):
    out, lse = _each_head(functools.partial(_head, blocks), blocks, (q, k, v), (q_ids, kv_ids))
    return out, (q, k, v, q_ids, kv_ids, out, lse)


def _backward(blocks, saved, d_out):
    q, k, v, q_ids, kv_ids, out, lse = saved
    delta = (out * d_out).sum(axis=-1)
    arrays = q, k, v, lse, delta, d_out.astype(v.dtype)
    gradients = _each_head(functools.partial(_head_backward, blocks), blocks, arrays, (q_ids, kv_ids))
    return *(g.astype(x.dtype) for g, x in zip(gradients, (q, k, v), strict=True)), None, None


_mixed.defvjp(_forward, _backward)


def _each_head(
    function: Callable[..., Any],
    blocks: Blocks,
    heads: tuple[Shaped[Array, "B K ..."], ...],
    rows: tuple[Int[Array, "B _"], ...],
) -> Any:
    """`function(*heads, *rows)` of every head: some of them in each loop, one after the other; rows take turns."""
    number = heads[0].shape[1]
    ends = [number * loop // blocks.loops for loop in range(blocks.loops + 1)]

    def of_row(given):
        heads, ids = given
        parts = [
            jax.lax.map(lambda head: function(*head, *ids), tuple(x[first:last] for x in heads))
            for first, last in itertools.pairwise(ends)
        ]
        return jax.tree.map(lambda *part: jnp.concatenate(part), *parts)

    return jax.lax.map(of_row, (heads, rows))


def _walk(
    blocks: Blocks,
    q_ids: Int[Array, " N"],
    kv_ids: Int[Array, " M"],
    block: Callable[..., Carried],
    carried: Carried,
) -> Carried:
    """`carried = block(start, ids, over_keys, carried)` for the blocks of queries in turn.

    `ids` are the segments of its queries; what lies behind the block's end belongs to the next, and is `_NOBODY` here.
    `over_keys(step, state)` is `state = step(start, mask, state)` for its blocks of keys, `mask` telling who sees whom.
    """
    length = q_ids.shape[0] - blocks.queries
    keys = kv_ids.shape[0] - blocks.keys
    places = jnp.arange(length + 1, dtype=jnp.int32)
    begins = jnp.pad(q_ids[1:length] != q_ids[: length - 1], 1, constant_values=True)
    boundary = jax.lax.cummax(jnp.where(begins, places, 0))
    # In floating point, as this is what the CPU backend has a fast minimum of; exact up to 16 million.
    key_places = jnp.arange(kv_ids.shape[0], dtype=jnp.float32)

    def outer(state):
        start, carried = state
        full = jnp.minimum(start + blocks.queries, length)
        stop = jnp.where(boundary[full] > start, boundary[full], full)
        ids = _at(q_ids, start, blocks.queries)
        ids = jnp.where((jnp.arange(blocks.queries) + start < stop) & (ids > 0), ids, _NOBODY)
        lowest, highest = jnp.where(ids > 0, ids, _MOST).min(), ids.max()
        wanted = jnp.where((lowest <= kv_ids) & (kv_ids <= highest), key_places, keys)

        def next_key(first):
            return jnp.where(wanted >= first, wanted, keys).min().astype(jnp.int32)

        def over_keys(step, begin):
            def inner(state):
                at, state = state
                mask = ids[:, None] == _at(kv_ids, at, blocks.keys)
                return next_key(at + blocks.keys), step(at, mask, state)

            return jax.lax.while_loop(lambda state: state[0] < keys, inner, (next_key(0), begin))[1]

        return stop, block(start, ids, over_keys, carried)

    return jax.lax.while_loop(lambda state: state[0] < length, outer, (jnp.int32(0), carried))[1]


def _head(
    blocks: Blocks,
    q: Float[Array, "N d"],
    k: Float[Array, "M d"],
    v: Float[Array, "M d"],
    q_ids: Int[Array, " N"],
    kv_ids: Int[Array, " M"],
) -> tuple[Float[Array, "N d"], Float[Array, " N"]]:
    """What one head of one row mixes, and the logarithm of every query's sum of exponentials (float32)."""
    size = blocks.queries

    def block(start, ids, over_keys, carried):
        del ids
        queries = _at(q, start, size)

        def step(at, mask, state):
            top, total, mixed = state
            scores = jnp.where(mask, _dot(queries, _at(k, at, blocks.keys), 1, 1), MASKED)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            weights = jnp.exp(scores - new_top[:, None])
            shrink = jnp.exp(top - new_top)
            part = _dot(weights.astype(v.dtype), _at(v, at, blocks.keys), 1, 0)
            return new_top, total * shrink + weights.sum(axis=-1), mixed * shrink[:, None] + part

        begin = jnp.full(size, MASKED), jnp.zeros(size), jnp.zeros((size, v.shape[-1]))
        top, total, mixed = over_keys(step, begin)
        sees = top > MASKED
        out, lse = carried
        # So far above all scores that the backward pass finds weights of zero where nothing is seen.
        lse = _put(lse, jnp.where(sees, top + jnp.log(total), -MASKED), start)
        return _put(out, jnp.where(sees[:, None], mixed / total[:, None], 0.0), start), lse

    return _walk(blocks, q_ids, kv_ids, block, (jnp.zeros((q.shape[0], v.shape[1])), jnp.zeros(q.shape[0])))


def _head_backward(
    blocks: Blocks,
    q: Float[Array, "N d"],
    k: Float[Array, "M d"],
    v: Float[Array, "M d"],
    lse: Float[Array, " N"],
    delta: Float[Array, " N"],
    d_out: Float[Array, "N d"],
    q_ids: Int[Array, " N"],
    kv_ids: Int[Array, " M"],
) -> tuple[Float[Array, "N d"], Float[Array, "M d"], Float[Array, "M d"]]:
    """Gradients of one head of one row, in float32 (arXiv 2205.14135, appendix B.2).

    Scores are taken keys first: of three products over them two are then plain ones, instead of one.
    """
    size = blocks.queries

    def block(start, ids, over_keys, carried):
        del ids
        queries, d_mixed, own_lse, own_delta = (_at(x, start, size) for x in (q, d_out, lse, delta))

        def step(at, mask, state):
            d_queries, d_k, d_v = state
            keys, values = _at(k, at, blocks.keys), _at(v, at, blocks.keys)
            scores = jnp.where(mask.T, _dot(keys, queries, 1, 1), MASKED)
            weights = jnp.exp(scores - own_lse)
            d_scores = (weights * (_dot(values, d_mixed, 1, 1) - own_delta)).astype(k.dtype)
            d_v = _put(d_v, _at(d_v, at, blocks.keys) + _dot(weights.astype(v.dtype), d_mixed, 1, 0), at)
            d_k = _put(d_k, _at(d_k, at, blocks.keys) + _dot(d_scores, queries, 1, 0), at)
            return d_queries + _dot(d_scores, keys, 0, 0), d_k, d_v

        d_q, d_k, d_v = carried
        d_queries, d_k, d_v = over_keys(step, (jnp.zeros(queries.shape), d_k, d_v))
        return _put(d_q, d_queries, start), d_k, d_v

    return _walk(blocks, q_ids, kv_ids, block, tuple(jnp.zeros(x.shape) for x in (q, k, v)))


def _dot(left: Float[Array, "_ _"], right: Float[Array, "_ _"], left_axis: int, right_axis: int) -> Float[Array, "_ _"]:
    """A matrix product over these axes, summed in float32."""
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)


def _at(rows: Shaped[Array, "N *rest"], start: Int[Array, ""], size: int) -> Shaped[Array, "n *rest"]:
    return jax.lax.dynamic_slice_in_dim(rows, start, size)


def _put(rows: Shaped[Array, "N *rest"], block: Shaped[Array, "n *rest"], start: Int[Array, ""]) -> Any:
    return jax.lax.dynamic_update_slice_in_dim(rows, block, start, axis=0)
