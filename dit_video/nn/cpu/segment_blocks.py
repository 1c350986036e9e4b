"""Full attention within segments, with blocks aligned to segments: the fastest form on CPU.

As in `chunked`, softmax is computed online and the backward pass recomputes the scores (arXiv 2205.14135). The blocks
differ: a block of queries begins where the previous one ended, and ends with the last segment that fits completely, or
when it is full; a block of keys begins at the next key that any of these queries can see. A block therefore holds
several short segments, and long segments waste little of it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from dit_video.nn.attention.api import Keys, Queries, mark_checkpoint
from dit_video.nn.attention.dense import MASK_VALUE, dot

_NO_SEGMENT, _PADDING = -2, -1
"""Segment ids of tokens to ignore in the outer and the inner loop; they differ, so that no pair of them matches."""
_MIN_FILL = 0.75
"""Fraction of a block that must be filled for its size to be chosen over a smaller one."""
_MAX_ID = int(np.iinfo(np.int32).max)
State = TypeVar("State")


@dataclass(frozen=True)
class BlockSizes:
    """Block sizes of the outer and the inner loop, largest first; a block gets the first size that it fills.

    Products of a narrow block with a wide one are the fastest in XLA's CPU backend, where products of less than two
    chunks gain little from threads. The smaller sizes are for the ends of segments.
    """

    narrow: tuple[int, ...]
    wide: tuple[int, ...]

    @staticmethod
    def choose(length: int, other_length: int, chunk: int) -> "BlockSizes":
        number = max(1, round(length / (2 * chunk)))
        largest = -(-length // number)
        sizes = {min(size, other_length) for size in (8 * chunk, chunk, -(-chunk // 4))}
        return BlockSizes(_sort_descending({largest, -(-largest // 4)}), _sort_descending(sizes))


def _sort_descending(sizes: set[int]) -> tuple[int, ...]:
    return tuple(sorted(sizes, reverse=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(chunk: int, q: Queries, k: Keys, v: Keys, q_ids: Int[Array, "B N"], kv_ids: Int[Array, "B M"]) -> Queries:
    """Compute every token's attention to its own segment; `q` is already scaled."""
    return _forward(chunk, q, k, v, q_ids, kv_ids)[0]


def _forward(chunk, q, k, v, q_ids, kv_ids):
    blocks = BlockSizes.choose(q.shape[1], k.shape[1], chunk)
    out, lse = jax.lax.map(lambda row: _attend_row(blocks, *row), (q, k, v, q_ids, kv_ids))
    out, lse = mark_checkpoint((out, lse), queries=q.shape[1], keys=k.shape[1])
    return out.astype(v.dtype), (q, k, v, q_ids, kv_ids, out, lse)


def _backward(chunk, saved, d_out):
    q, k, v, q_ids, kv_ids, out, lse = saved
    blocks = BlockSizes.choose(k.shape[1], q.shape[1], chunk)
    rows = q, k, v, out, lse, d_out, q_ids, kv_ids
    gradients = jax.lax.map(lambda row: _attend_row_backward(blocks, *row), rows)
    return *(g.astype(x.dtype) for g, x in zip(gradients, (q, k, v), strict=True)), None, None


attend.defvjp(_forward, _backward)


def _scan_blocks(
    sizes: BlockSizes,
    ids: Int[Array, " N"],
    other_ids: Int[Array, " M"],
    block_fn: Callable[..., State],
    carried: State,
) -> State:
    """Run `carried = block(size, start, own, scan_others, carried)` for all blocks of a row, in order.

    `own` marks the tokens from `start` on that belong to the block. `scan_others(step, state)` runs
    `state = step(start, mask, state)` for those blocks of the other row that have tokens of the block's segments;
    `mask` marks the pairs of tokens in the same segment. A row's last block is moved back to fit into it. The tokens
    that it shares with the previous block are not its own, or are masked.
    """
    length, other_length = ids.shape[0], other_ids.shape[0]
    index = jnp.arange(length + 1, dtype=jnp.int32)
    is_boundary = jnp.pad(ids[1:] != ids[:-1], 1, constant_values=True)
    last_boundary = jax.lax.cummax(jnp.where(is_boundary, index, 0))  # at or before each token
    # Indices are float32, exact up to 16 million, because XLA's CPU backend has a fast minimum for floats only.
    other_index = jnp.arange(other_length, dtype=jnp.float32)

    def find_stop(first, size):
        # A block ends at the last segment boundary inside it, or full if a single segment fills it.
        full = jnp.minimum(first + size, length)
        return jnp.where(last_boundary[full] > first, last_boundary[full], full)

    def run_block(size, state):
        first, carried = state
        stop = find_stop(first, size)
        start = jnp.minimum(first, length - size)
        own = _slice_tokens((index[:-1] >= first) & (index[:-1] < stop), start, size)
        block_ids = _slice_tokens(ids, start, size)
        block_ids = jnp.where(own & (block_ids > 0), block_ids, _NO_SEGMENT)
        lowest, highest = jnp.where(block_ids > 0, block_ids, _MAX_ID).min(), block_ids.max()
        # Index of every token of the other row whose id is in the block's range, `other_length` for all others: the
        # inner loop jumps to the smallest of them instead of visiting every block.
        candidates = jnp.where((lowest <= other_ids) & (other_ids <= highest), other_index, other_length)

        def find_next(first):
            return jnp.where(candidates >= first, candidates, other_length).min().astype(jnp.int32)

        def is_well_filled(first, size):
            is_inside = (candidates >= first) & (candidates < jnp.minimum(first + size, other_length))
            return jnp.where(is_inside, 1.0, 0.0).sum() > _MIN_FILL * size

        def scan_others(step, state):
            first = find_next(0)
            # XLA's shapes are static, so every block size has its own loop: large blocks while they are well filled,
            # then smaller ones for the rest.
            for size in sizes.wide:

                def continues(state, size=size):
                    return (state[0] < other_length) & (size == sizes.wide[-1] or is_well_filled(state[0], size))

                def run_step(state, size=size):
                    first, state = state
                    start = jnp.minimum(first, other_length - size)
                    step_ids = _slice_tokens(other_ids, start, size)
                    is_later = _slice_tokens(other_index, start, size) >= first
                    step_ids = jnp.where(is_later & (step_ids > 0), step_ids, _PADDING)
                    return find_next(first + size), step(start, block_ids[:, None] == step_ids, state)

                first, state = jax.lax.while_loop(continues, run_step, (first, state))
            return state

        return stop, block_fn(size, start, own, scan_others, carried)

    def choose_size(first):
        is_filled = [find_stop(first, size) - first > _MIN_FILL * size for size in sizes.narrow[:-1]]
        return jnp.argmax(jnp.array([*is_filled, True]))

    def run_all_sizes(state):
        for choice, size in enumerate(sizes.narrow):

            def continues(state, choice=choice):
                return (state[0] < length) & (choose_size(state[0]) == choice)

            state = jax.lax.while_loop(continues, functools.partial(run_block, size), state)
        return state

    return jax.lax.while_loop(lambda state: state[0] < length, run_all_sizes, (jnp.int32(0), carried))[1]


def _attend_row(
    sizes: BlockSizes,
    q: Float[Array, "N K d"],
    k: Float[Array, "M K d"],
    v: Float[Array, "M K d"],
    q_ids: Int[Array, " N"],
    kv_ids: Int[Array, " M"],
) -> tuple[Float[Array, "N K d"], Float[Array, "K N"]]:
    """Return a row's output, and the log-sum-exp of every query's scores, both float32. Heads run in sequence."""

    def head(index, carried):
        def block(size, start, own, scan_keys, carried):
            queries = _slice_head(q, start, size, index)

            def step(key_start, mask, state):
                maximum, total, mixed = state
                keys, values = (_slice_head(x, key_start, mask.shape[1], index) for x in (k, v))
                scores = jnp.where(mask, dot(queries, keys, 1, 1), MASK_VALUE)
                new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
                weights = jnp.exp(scores - new_maximum[:, None])
                rescale = jnp.exp(maximum - new_maximum)
                part = dot(weights.astype(v.dtype), values, 1, 0)
                return new_maximum, total * rescale + weights.sum(axis=-1), mixed * rescale[:, None] + part

            initial = jnp.full(size, MASK_VALUE), jnp.zeros(size), jnp.zeros((size, v.shape[-1]))
            maximum, total, mixed = scan_keys(step, initial)
            sees_any = maximum > MASK_VALUE
            out, lse = carried
            mixed = jnp.where(sees_any[:, None], mixed / total[:, None], 0.0)
            # Queries that see nothing get a value so far above all scores that their weights are zero in the backward
            # pass.
            block_lse = jnp.where(sees_any, maximum + jnp.log(total), -MASK_VALUE)
            # Tokens that are not the block's own keep the result of the previous block.
            previous_lse = jax.lax.dynamic_slice(lse, (index, start), (1, size))
            lse = jax.lax.dynamic_update_slice(lse, jnp.where(own, block_lse, previous_lse), (index, start))
            mixed = jnp.where(own[:, None], mixed, _slice_head(out, start, size, index))
            return _update_head(out, mixed, start, index), lse

        return _scan_blocks(sizes, q_ids, kv_ids, block, carried)

    heads = q.shape[1]
    return jax.lax.fori_loop(0, heads, head, (jnp.zeros((*q.shape[:2], v.shape[2])), jnp.zeros((heads, q.shape[0]))))


def _attend_row_backward(
    sizes: BlockSizes,
    q: Float[Array, "N K d"],
    k: Float[Array, "M K d"],
    v: Float[Array, "M K d"],
    out: Float[Array, "N K d"],
    lse: Float[Array, "K N"],
    d_out: Float[Array, "N K d"],
    q_ids: Int[Array, " N"],
    kv_ids: Int[Array, " M"],
) -> tuple[Float[Array, "N K d"], Float[Array, "M K d"], Float[Array, "M K d"]]:
    """Return a row's gradients in float32 (arXiv 2205.14135, appendix B.2).

    Keys are the outer loop and the first axis of the scores. Of the three products that follow, two then need no
    transposed factor instead of one. The queries' gradient is computed transposed, the fastest way in XLA on CPU.
    """
    delta = (out * d_out.astype(jnp.float32)).sum(axis=-1).T

    def head(index, carried):
        def block(size, start, own, scan_queries, carried):
            del own
            keys, values = (_slice_head(x, start, size, index) for x in (k, v))

            def step(query_start, mask, state):
                d_q, d_keys, d_values = state
                count = mask.shape[1]
                queries, d_mixed = (_slice_head(x, query_start, count, index) for x in (q, d_out))
                row_lse, row_delta = (jax.lax.dynamic_slice(x, (index, query_start), (1, count)) for x in (lse, delta))
                scores = jnp.where(mask, dot(keys, queries, 1, 1), MASK_VALUE)
                weights = jnp.exp(scores - row_lse)
                d_scores = (weights * (dot(values, d_mixed, 1, 1) - row_delta)).astype(k.dtype)
                d_values = d_values + dot(weights.astype(v.dtype), d_mixed, 1, 0)
                d_keys = d_keys + dot(d_scores, queries, 1, 0)
                d_queries = _slice_head(d_q, query_start, count, index) + dot(keys, d_scores, 0, 0).T
                return _update_head(d_q, d_queries, query_start, index), d_keys, d_values

            d_q, d_k, d_v = carried
            initial = d_q, jnp.zeros(keys.shape), jnp.zeros(values.shape)
            d_q, d_keys, d_values = scan_queries(step, initial)
            # Tokens that are not the block's own have gradients of zero here, so adding is safe.
            d_k = _update_head(d_k, _slice_head(d_k, start, size, index) + d_keys, start, index)
            return d_q, d_k, _update_head(d_v, _slice_head(d_v, start, size, index) + d_values, start, index)

        return _scan_blocks(sizes, kv_ids, q_ids, block, carried)

    return jax.lax.fori_loop(0, q.shape[1], head, tuple(jnp.zeros(x.shape) for x in (q, k, v)))


def _slice_tokens(row: Shaped[Array, " N"], start: Int[Array, ""], size: int) -> Shaped[Array, " n"]:
    return jax.lax.dynamic_slice_in_dim(row, start, size)


def _slice_head(
    rows: Float[Array, "N K d"], start: Int[Array, ""], size: int, head: Int[Array, ""]
) -> Float[Array, "{size} d"]:
    return jax.lax.dynamic_slice(rows, (start, head, 0), (size, 1, rows.shape[2]))[:, 0]


def _update_head(
    rows: Float[Array, "N K d"], block: Float[Array, "n d"], start: Int[Array, ""], head: Int[Array, ""]
) -> Float[Array, "N K d"]:
    return jax.lax.dynamic_update_slice(rows, block[:, None], (start, head, 0))
