"""Blockwise attention in plain XLA that skips pairs of blocks without visible keys.

Softmax is computed online over the key blocks of a query block (arXiv 2205.14135), and the backward pass recomputes the
scores, so memory is linear in the row's length. The key blocks that a query block needs follow from the extremes of its
boxes and of the blocks' values (see `masks`): with clips of `n_i` tokens packed into a row, time grows with the sum of
`n_i²`, not with the square of the row. The result is right in any order of tokens, but fewer blocks are visited if
tokens that see each other are adjacent. Patterns with axes of their own therefore sort the tokens first.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from dit_video.core.errors import UserError, check_at_least
from dit_video.nn.attention.api import AttentionInputs, Bias, Keys, Queries, RelativeBias, mark_checkpoint, name_calls
from dit_video.nn.attention.dense import MASK_VALUE, dot
from dit_video.nn.attention.masks import Full, MaskBoxes, Pattern, dense_mask, mask_boxes
from dit_video.nn.cpu import segment_blocks


def require_key_ranges(pattern: Pattern, backend: str) -> None:
    """Raise an error for a pattern whose queries see more than one range of keys.

    Raises:
      UserError: If the pattern is of locality "boxes".
    """
    if pattern.locality == "boxes":
        raise UserError(f"{backend} attention cannot do {pattern}, with several ranges of keys; use chunked or dense")


class KeyRanges(NamedTuple):
    """Orders that sort queries and keys, and for every sorted query its range `start <= j < stop` of sorted keys."""

    query_order: Int[Array, "B N"]
    key_order: Int[Array, "B M"]
    start: Int[Array, "B N"]
    stop: Int[Array, "B N"]
    group_starts: Int[Array, "B M"]
    """Index of the first sorted key with the same values, which identifies a group; "prefix" ignores the last axis."""


def find_key_ranges(pattern: Pattern, boxes: MaskBoxes) -> KeyRanges:
    """Return the key ranges of a pattern of locality "group" or "prefix"."""
    # Such a pattern has one box, which ends at the query's own value, so its upper end sorts the queries.
    order, key_order = compute_sort_order(boxes.high[:, :, 0]), compute_sort_order(boxes.values)
    values = reorder(boxes.values, key_order)
    start, stop = find_bounds(reorder(boxes.low[:, :, 0], order), reorder(boxes.high[:, :, 0], order), values)
    group_values = values[..., :-1] if pattern.locality == "prefix" else values
    changes = (group_values[:, 1:] != group_values[:, :-1]).any(axis=-1)
    is_start = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    index = jnp.arange(values.shape[1], dtype=jnp.int32)
    return KeyRanges(order, key_order, start, stop, jax.lax.cummax(jnp.where(is_start, index, 0), axis=1))


def reorder(rows: Shaped[Array, "B N *rest"], order: Int[Array, "B N"]) -> Shaped[Array, "B N *rest"]:
    """Reorder the tokens of every row."""
    return jax.vmap(lambda row, indices: row[indices])(rows, order)


def restore_order(rows: Shaped[Array, "B N *rest"], order: Int[Array, "B N"]) -> Shaped[Array, "B N *rest"]:
    """Invert `reorder`."""
    return reorder(rows, jnp.argsort(order, axis=1))


def compute_sort_order(values: Int[Array, "B N A"]) -> Int[Array, "B N"]:
    """Return the stable order that sorts the tokens of a row by their first value, then by the second and so on."""
    return jax.vmap(lambda row: jnp.lexsort(tuple(row.T[::-1])).astype(jnp.int32))(values)


def find_bounds(
    low: Int[Array, "B N A"], high: Int[Array, "B N A"], values: Int[Array, "B M A"]
) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
    """Return the range of sorted keys whose values lie from `low` to `high` in lexicographic order.

    No step is quadratic: the ends are sorted together with the keys, and the keys before each end are counted. An
    empty box has `stop <= start`.
    """

    def find_row_bounds(low, high, starts):
        queries, keys = low.shape[0], starts.shape[0]
        rows = jnp.concatenate([starts, low, high])
        side = jnp.concatenate([jnp.full(keys, 1), jnp.full(queries, 0), jnp.full(queries, 2)])
        order = jnp.lexsort((side, *rows.T[::-1]))  # among equals: low ends, then keys, then high ends
        keys_before = jnp.cumsum(side[order] == 1, dtype=jnp.int32)
        count = jnp.zeros_like(keys_before).at[order].set(keys_before)
        return count[keys : keys + queries], count[keys + queries :]

    return jax.vmap(find_row_bounds)(low, high, values)


def pad_to_blocks(rows: Shaped[Array, "B N *rest"], size: int, fill: int = 0) -> Shaped[Array, "B M *rest"]:
    """Pad rows to a multiple of `size` tokens."""
    missing = -rows.shape[1] % size
    return jnp.pad(rows, ((0, 0), (0, missing), *((0, 0),) * (rows.ndim - 2)), constant_values=fill)


EMPTY_LSE = -MASK_VALUE
"""Log-sum-exp of a query that sees nothing: so far above all scores that its weights are zero in the backward pass."""
_MIN_INT, _MAX_INT = int(np.iinfo(np.int32).min), int(np.iinfo(np.int32).max)


@dataclass(frozen=True, kw_only=True)
class ChunkedAttention:
    """Attention in blocks of `chunk` queries by `chunk` keys in plain XLA, for every pattern and platform.

    It has a backward pass, but no forward-mode derivative (`jax.jvp`); `DenseAttention` has both.

    Raises:
      UserError: If the chunk is below 1.
    """

    pattern: Pattern = Full()
    chunk: int = 256
    platform: str = field(default_factory=jax.default_backend, repr=False)
    """Platform that the program is compiled for; on "cpu", `segment_blocks` computes full attention."""

    def __post_init__(self):
        check_at_least(1, chunk=self.chunk)

    @name_calls("chunked")
    def __call__(self, q: Queries, k: Keys, v: Keys, inputs: AttentionInputs) -> Queries:
        q = q * q.shape[-1] ** -0.5
        if isinstance(self.pattern, Full) and inputs.bias is None and self.platform == "cpu":
            return segment_blocks.attend(self.chunk, q, k, v, inputs.q_segments, inputs.kv_segments)
        boxes, bias = mask_boxes(self.pattern, inputs), inputs.bias
        if isinstance(self.pattern, Full):
            return _attend(q, k, v, boxes, bias, self.chunk)
        if self.pattern.locality == "boxes":
            # The first box's upper end lies at a constant distance from the query's own value, so sorting by it puts
            # queries in the order of the keys.
            order, key_order = compute_sort_order(boxes.high[:, :, 0]), compute_sort_order(boxes.values)
            boxes = MaskBoxes(reorder(boxes.low, order), reorder(boxes.high, order), reorder(boxes.values, key_order))
        else:
            order, key_order, start, stop, _ = find_key_ranges(self.pattern, boxes)
            # The key's index becomes the only axis: blocks have narrower extremes, and the mask takes one comparison.
            index = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), k.shape[:2])
            boxes = MaskBoxes(start[..., None, None], (stop - 1)[..., None, None], index[..., None])
        if bias is not None:
            q_positions, kv_positions = reorder(bias.q_positions, order), reorder(bias.kv_positions, key_order)
            bias = replace(bias, q_positions=q_positions, kv_positions=kv_positions)
        out = _attend(reorder(q, order), reorder(k, key_order), reorder(v, key_order), boxes, bias, self.chunk)
        return restore_order(out, order)


def attend_part(
    q: Queries, k: Keys, v: Keys, inputs: AttentionInputs, *, pattern: Pattern, chunk: int
) -> tuple[Queries, Float[Array, "B K N"]]:
    """Return attention to these keys alone, and the log-sum-exp of every query's scores, both float32.

    The weights `exp(lse)` combine parts with different keys of a row into the row's attention. If a query sees none of
    these keys, its output is zero and its log-sum-exp is `EMPTY_LSE`.
    """
    arrays = _BlockedArrays.create(q * q.shape[-1] ** -0.5, k, v, mask_boxes(pattern, inputs), inputs.bias, chunk)
    row = functools.partial(_attend_head, arrays.bias_config, dtype=jnp.float32)
    out, lse = _map_heads(row, arrays.blocks, arrays.q, arrays.k, arrays.v, arrays.table)
    length = q.shape[1]
    return jnp.moveaxis(out[:, :, :length], 1, 2), lse[:, :, :length]


def compute_part_gradients(
    q: Queries,
    k: Keys,
    v: Keys,
    inputs: AttentionInputs,
    *,
    pattern: Pattern,
    chunk: int,
    lse: Float[Array, "B K N"],
    delta: Float[Array, "B K N"],
    d_out: Queries,
) -> tuple[Queries, Keys, Keys, Float[Array, "T K"] | None]:
    """Return the float32 gradients of queries, keys, values and a bias table through these keys alone.

    `lse` is the log-sum-exp over all keys, `delta` the sum of `out * d_out` over a head's width.
    """
    scale = q.shape[-1] ** -0.5
    arrays = _BlockedArrays.create(q * scale, k, v, mask_boxes(pattern, inputs), inputs.bias, chunk)
    size = arrays.blocks.low.shape[2]
    missing = -q.shape[1] % size
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, missing)), constant_values=EMPTY_LSE)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, missing)))
    d_heads = jnp.moveaxis(pad_to_blocks(d_out, size, 0), 2, 1)
    row = functools.partial(_attend_head_backward, arrays.bias_config)
    *heads, d_table = _map_heads(row, arrays.blocks, arrays.q, arrays.k, arrays.v, arrays.table, lse, delta, d_heads)
    lengths = q.shape[1], k.shape[1], k.shape[1]
    d_q, d_k, d_v = (jnp.moveaxis(x[:, :, :n], 1, 2) for x, n in zip(heads, lengths, strict=True))
    return d_q * scale, d_k, d_v, None if d_table is None else d_table.sum(axis=0).T


def _attend(q: Queries, k: Keys, v: Keys, boxes: MaskBoxes, bias: Bias | None, chunk: int) -> Queries:
    """Compute attention; `q` is already scaled."""
    arrays = _BlockedArrays.create(q, k, v, boxes, bias, chunk)
    mixed = _attend_blocks(arrays.bias_config, arrays.q, arrays.k, arrays.v, arrays.table, arrays.blocks)
    return jnp.moveaxis(mixed[:, :, : q.shape[1]], 1, 2)


class _BlockedArrays(NamedTuple):
    """Arrays padded to whole blocks, with the heads' axis before the tokens' axis."""

    bias_config: RelativeBias | None
    q: Float[Array, "B K N d"]
    k: Float[Array, "B K M d"]
    v: Float[Array, "B K M d"]
    table: Float[Array, "B K T"] | None
    blocks: "_Blocks"

    @staticmethod
    def create(q: Queries, k: Keys, v: Keys, boxes: MaskBoxes, bias: Bias | None, chunk: int) -> "_BlockedArrays":
        q_chunk, kv_chunk = min(chunk, q.shape[1]), min(chunk, k.shape[1])
        low, high = (pad_to_blocks(ends, q_chunk, fill) for ends, fill in ((boxes.low, 1), (boxes.high, 0)))
        # Keys are padded with -1, which is the segment of padding and, as a key index, lies in no range.
        blocks = _split_blocks(MaskBoxes(low, high, pad_to_blocks(boxes.values, kv_chunk, -1)), q_chunk, kv_chunk)
        table = relative = None
        if bias is not None:
            relative, heads = bias.config, bias.table.T
            table = jnp.broadcast_to(heads, (q.shape[0], *heads.shape))
            pairs = (bias.q_positions, q_chunk), (bias.kv_positions, kv_chunk)
            positions = [pad_to_blocks(x, size).reshape(x.shape[0], -1, size, 3) for x, size in pairs]
            blocks = blocks._replace(q_positions=positions[0], kv_positions=positions[1])
        padded = (pad_to_blocks(x, size) for x, size in ((q, q_chunk), (k, kv_chunk), (v, kv_chunk)))
        q, k, v = (jnp.moveaxis(x, 2, 1) for x in padded)
        return _BlockedArrays(relative, q, k, v, table, blocks)


class _Blocks(NamedTuple):
    """Mask boxes in `n` blocks of queries and `m` blocks of keys, with the extremes of each block."""

    low: Int[Array, "*B n b U A"]
    high: Int[Array, "*B n b U A"]
    values: Int[Array, "*B m c A"]
    query_min: Int[Array, "*B n U A"]
    query_max: Int[Array, "*B n U A"]
    key_min: Int[Array, "*B m A"]
    key_max: Int[Array, "*B m A"]
    q_positions: Float[Array, "*B n b 3"] | None = None
    kv_positions: Float[Array, "*B m c 3"] | None = None
    """Coordinates of the keys; like `q_positions`, only present with a bias."""

    def find_key_blocks(self, index: Int[Array, ""]) -> tuple[Int[Array, " m"], Int[Array, ""]]:
        """Return the key blocks of one row, with those that a query block may see first, and the number of these."""
        overlaps = (self.query_min[index] <= self.key_max[:, None]) & (self.key_min[:, None] <= self.query_max[index])
        needed = overlaps.all(axis=-1).any(axis=-1)
        return jnp.argsort(~needed, stable=True).astype(jnp.int32), needed.sum(dtype=jnp.int32)

    def compute_scores(
        self,
        bias_config: RelativeBias | None,
        table: Float[Array, " T"] | None,
        queries: Float[Array, "b d"],
        keys: Float[Array, "c d"],
        query_block: Int[Array, ""],
        key_block: Int[Array, ""],
    ) -> tuple[Float[Array, "b c"], list[Int[Array, "b c"]]]:
        """Return the masked scores of a query block and a key block, and the entries of their bias."""
        scores, entries = dot(queries, keys, 1, 1), list[Array]()
        if bias_config is not None:
            assert table is not None
            assert self.q_positions is not None
            assert self.kv_positions is not None
            entries = bias_config.find_entries(self.q_positions[query_block], self.kv_positions[key_block])
            scores = scores + bias_config.read_bias(table, entries)
        pair = (self.low[query_block], self.high[query_block], self.values[key_block])
        mask = dense_mask(MaskBoxes(*(part[None] for part in pair)))[0]
        return jnp.where(mask, scores, MASK_VALUE), entries


def _split_blocks(boxes: MaskBoxes, q_chunk: int, kv_chunk: int) -> _Blocks:
    low, high = (ends.reshape(ends.shape[0], -1, q_chunk, *ends.shape[2:]) for ends in (boxes.low, boxes.high))
    values = boxes.values.reshape(boxes.values.shape[0], -1, kv_chunk, boxes.values.shape[-1])
    # Padding must not widen the extremes of its block, which would then overlap more blocks than it sees.
    empty = (low > high).any(axis=-1, keepdims=True)
    is_padding = values[..., :1] < 0
    return _Blocks(
        low=low,
        high=high,
        values=values,
        query_min=jnp.where(empty, _MAX_INT, low).min(axis=2),
        query_max=jnp.where(empty, _MIN_INT, high).max(axis=2),
        key_min=jnp.where(is_padding, _MAX_INT, values).min(axis=2),
        key_max=jnp.where(is_padding, _MIN_INT, values).max(axis=2),
    )


def _map_heads(attend_head: Callable[..., Any], blocks: _Blocks, *arrays: Shaped[Array, "B K ..."] | None) -> Any:
    """Return `row(blocks, ...)` for the heads of every row.

    Heads run one at a time on CPU, where products of 2-D matrices are the fastest, and together on other platforms.
    Rows run in sequence because they need different blocks: each loop then has its own row's length, not the longest
    row's.
    """
    if jax.default_backend() != "cpu":
        heads = jax.vmap(attend_head, in_axes=(None, *(0 for _ in arrays)))
        return jax.lax.map(lambda inputs: heads(*inputs), (blocks, *arrays))
    return jax.lax.map(lambda row: jax.lax.map(lambda head: attend_head(row[0], *head), row[1:]), (blocks, *arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_blocks(
    bias_config: RelativeBias | None,
    q: Float[Array, "B K N d"],
    k: Float[Array, "B K M d"],
    v: Float[Array, "B K M d"],
    table: Float[Array, "B K T"] | None,
    blocks: _Blocks,
) -> Float[Array, "B K N d"]:
    return _map_heads(functools.partial(_attend_head, bias_config), blocks, q, k, v, table)[0]


def _forward(bias_config, q, k, v, table, blocks):
    out, lse = _map_heads(functools.partial(_attend_head, bias_config), blocks, q, k, v, table)
    out, lse = mark_checkpoint((out, lse), queries=q.shape[2], keys=k.shape[2])
    return out, (q, k, v, table, blocks, out, lse)


def _backward(bias_config, saved, d_out):
    q, k, v, table, blocks, out, lse = saved
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1)
    row = functools.partial(_attend_head_backward, bias_config)
    *gradients, d_table = _map_heads(row, blocks, q, k, v, table, lse, delta, d_out)
    return *(g.astype(x.dtype) for g, x in zip(gradients, (q, k, v), strict=True)), d_table, None


_attend_blocks.defvjp(_forward, _backward)


def _attend_head(
    bias_config: RelativeBias | None,
    blocks: _Blocks,
    q: Float[Array, "N d"],
    k: Float[Array, "M d"],
    v: Float[Array, "M d"],
    table: Float[Array, " T"] | None,
    dtype: Any = None,
) -> tuple[Float[Array, "N d"], Float[Array, " N"]]:
    """Return the output of one head of one row, and the log-sum-exp of every query's scores (float32).

    The output is in `dtype`, by default the dtype of the values.
    """
    number, size = blocks.low.shape[:2]

    def block(index):
        queries = _slice_block(q, index, size)
        key_blocks, count = blocks.find_key_blocks(index)

        def step(step_index, state):
            maximum, total, mixed = state
            key_block = key_blocks[step_index]
            keys = _slice_key_block(k, blocks, key_block)
            scores, _ = blocks.compute_scores(bias_config, table, queries, keys, index, key_block)
            new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
            weights = jnp.exp(scores - new_maximum[:, None])
            rescale = jnp.exp(maximum - new_maximum)
            total = total * rescale + weights.sum(axis=-1)
            part = dot(weights.astype(v.dtype), _slice_key_block(v, blocks, key_block), 1, 0)
            return new_maximum, total, mixed * rescale[:, None] + part

        initial = jnp.full(size, MASK_VALUE), jnp.zeros(size), jnp.zeros((size, v.shape[-1]))
        maximum, total, mixed = jax.lax.fori_loop(0, count, step, initial)
        sees_any = maximum > MASK_VALUE
        out = jnp.where(sees_any[:, None], mixed / total[:, None], 0.0).astype(dtype or v.dtype)
        return out, jnp.where(sees_any, maximum + jnp.log(total), EMPTY_LSE)

    out, lse = jax.lax.map(block, jnp.arange(number))
    return out.reshape(number * size, -1), lse.reshape(-1)


def _attend_head_backward(
    bias_config: RelativeBias | None,
    blocks: _Blocks,
    q: Float[Array, "N d"],
    k: Float[Array, "M d"],
    v: Float[Array, "M d"],
    table: Float[Array, " T"] | None,
    lse: Float[Array, " N"],
    delta: Float[Array, " N"],
    d_out: Float[Array, "N d"],
) -> tuple[Float[Array, "N d"], Float[Array, "M d"], Float[Array, "M d"], Float[Array, " T"] | None]:
    """Return the float32 gradients of one head of one row (arXiv 2205.14135, appendix B.2)."""
    number, size = blocks.low.shape[:2]

    def block(gradients, index):
        queries, d_mixed = _slice_block(q, index, size), _slice_block(d_out, index, size)
        block_lse, block_delta = _slice_block(lse, index, size), _slice_block(delta, index, size)
        key_blocks, count = blocks.find_key_blocks(index)

        def step(step_index, state):
            d_q, d_k, d_v, d_table = state
            key_block = key_blocks[step_index]
            keys, values = _slice_key_block(k, blocks, key_block), _slice_key_block(v, blocks, key_block)
            scores, entries = blocks.compute_scores(bias_config, table, queries, keys, index, key_block)
            weights = jnp.exp(scores - block_lse[:, None])
            d_scores = weights * (dot(d_mixed, values, 1, 1) - block_delta[:, None])
            if bias_config is not None:
                d_table = d_table + bias_config.compute_table_gradient(d_scores, entries)
            weights, d_scores = weights.astype(v.dtype), d_scores.astype(k.dtype)
            d_v = _add_to_block(d_v, blocks, key_block, dot(weights, d_mixed, 0, 0))
            d_k = _add_to_block(d_k, blocks, key_block, dot(d_scores, queries, 0, 0))
            return d_q + dot(d_scores, keys, 1, 0), d_k, d_v, d_table

        d_q, *gradients = jax.lax.fori_loop(0, count, step, (jnp.zeros(queries.shape), *gradients))
        return tuple(gradients), d_q

    zeros = jnp.zeros(k.shape), jnp.zeros(v.shape), None if table is None else jnp.zeros_like(table)
    gradients, d_q = jax.lax.scan(block, zeros, jnp.arange(number))
    return d_q.reshape(q.shape), *gradients


def _slice_block(rows: Shaped[Array, "N *rest"], index: Int[Array, ""], size: int) -> Shaped[Array, "b *rest"]:
    return jax.lax.dynamic_slice_in_dim(rows, index * size, size)


def _slice_key_block(
    rows: Shaped[Array, "M *rest"], blocks: _Blocks, index: Int[Array, ""]
) -> Shaped[Array, "c *rest"]:
    return _slice_block(rows, index, blocks.values.shape[1])


def _add_to_block(
    rows: Float[Array, "M d"], blocks: _Blocks, index: Int[Array, ""], block: Float[Array, "c d"]
) -> Float[Array, "M d"]:
    start = index * blocks.values.shape[1]
    return jax.lax.dynamic_update_slice_in_dim(rows, _slice_key_block(rows, blocks, index) + block, start, axis=0)
