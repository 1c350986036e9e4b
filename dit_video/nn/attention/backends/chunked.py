"""Attention in blocks of queries and keys that skips the blocks which have nothing to do with each other.

Softmax is taken online over the key blocks of a query block (arXiv 2205.14135), and the backward pass computes the
scores again, so memory is linear in the row's length. Which key blocks a query block needs follows from the extremes of
its boxes and of the blocks' values (`patterns`): with clips of `n_i` tokens packed into a row the time goes with the
sum of `n_i²`, not with the square of the row. Nothing has to be contiguous for the result to be right; what lies
together is only faster, so tokens are sorted first where a pattern has axes of its own.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from dit_video.core.errors import UserError
from dit_video.nn.attention.api import Keys, Queries, named
from dit_video.nn.attention.backends.dense import MASKED
from dit_video.nn.attention.bias import Bias, RelativeBias
from dit_video.nn.attention.key_ranges import given_back, padded, sorting, stretches, taken
from dit_video.nn.attention.masks import Full, Pattern, Sight, sight, visible
from dit_video.nn.attention.tokens import Tokens
from dit_video.nn.cpu import segment_blocks

NOTHING = -MASKED
"""The logarithm of a sum of exponentials where nothing is seen: so far above all scores that the backward pass finds
weights of zero."""
_LEAST, _MOST = int(np.iinfo(np.int32).min), int(np.iinfo(np.int32).max)


@dataclass(frozen=True, kw_only=True)
class Chunked:
    """Blocks of `chunk` queries by `chunk` keys, in plain XLA: for every pattern and platform.

    It has a backward pass, but no forward-mode derivative (`jax.jvp`); `Dense` has both.

    Raises:
      UserError: a chunk below 1.
    """

    pattern: Pattern = Full()
    chunk: int = 256
    platform: str = field(default_factory=jax.default_backend, repr=False)
    """that it is for: on CPU, full attention takes the form of `segmentwise`"""

    def __post_init__(self):
        if self.chunk < 1:
            raise UserError(f"blocks of attention have at least 1 token, not {self.chunk}")

    def __call__(self, q: Queries, k: Keys, v: Keys, at: Tokens) -> Queries:
        q = q * q.shape[-1] ** -0.5
        if isinstance(self.pattern, Full) and at.bias is None and self.platform == "cpu":
            return segment_blocks.attend(q, k, v, at.q_segments, at.kv_segments, chunk=self.chunk)
        seen, bias = sight(self.pattern, at), at.bias
        if isinstance(self.pattern, Full):
            return _attend(q, k, v, seen, bias, self.chunk)
        if self.pattern.reach == "boxes":
            # The first box ends at a constant distance beyond a query's own value.
            order, key_order = sorting(seen.high[:, :, 0]), sorting(seen.at)
            seen = Sight(taken(seen.low, order), taken(seen.high, order), taken(seen.at, key_order))
        else:
            order, key_order, start, stop, _ = stretches(self.pattern, seen)
            # A key's place is a single axis: narrower extremes, and one comparison for the mask.
            places = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), k.shape[:2])
            seen = Sight(start[..., None, None], (stop - 1)[..., None, None], places[..., None])
        if bias is not None:
            at_queries, at_keys = taken(bias.q_coordinates, order), taken(bias.kv_coordinates, key_order)
            bias = replace(bias, q_coordinates=at_queries, kv_coordinates=at_keys)
        out = _attend(taken(q, order), taken(k, key_order), taken(v, key_order), seen, bias, self.chunk)
        return given_back(out, order)


def attend_part(
    q: Queries, k: Keys, v: Keys, at: Tokens, *, pattern: Pattern, chunk: int
) -> tuple[Queries, Float[Array, "B K N"]]:
    """What queries mix of these keys alone, and the logarithm of each one's sum of exponentials; both float32.

    Parts over all keys of a row add up to its attention: each counts by its exponentials. Where a query sees none of
    these keys the mixture is zero and the logarithm `NOTHING`.
    """
    ready = _Ready.of(q * q.shape[-1] ** -0.5, k, v, sight(pattern, at), at.bias, chunk)
    row = functools.partial(_row, ready.relative, dtype=jnp.float32)
    out, lse = _each_head(row, ready.blocks, ready.q, ready.k, ready.v, ready.table)
    length = q.shape[1]
    return jnp.moveaxis(out[:, :, :length], 1, 2), lse[:, :, :length]


def part_gradients(
    q: Queries,
    k: Keys,
    v: Keys,
    at: Tokens,
    *,
    pattern: Pattern,
    chunk: int,
    lse: Float[Array, "B K N"],
    delta: Float[Array, "B K N"],
    d_out: Queries,
) -> tuple[Queries, Keys, Keys, Float[Array, "T K"] | None]:
    """Gradients of queries, keys, values and a bias' table by these keys alone, in float32.

    `lse` is that of all keys, `delta` the sum of `out * d_out` over a head.
    """
    scale = q.shape[-1] ** -0.5
    ready = _Ready.of(q * scale, k, v, sight(pattern, at), at.bias, chunk)
    size = ready.blocks.low.shape[2]
    missing = -q.shape[1] % size
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, missing)), constant_values=NOTHING)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, missing)))
    d_heads = jnp.moveaxis(padded(d_out, size, 0), 2, 1)
    row = functools.partial(_row_backward, ready.relative)
    *heads, d_table = _each_head(row, ready.blocks, ready.q, ready.k, ready.v, ready.table, lse, delta, d_heads)
    lengths = q.shape[1], k.shape[1], k.shape[1]
    d_q, d_k, d_v = (jnp.moveaxis(x[:, :, :n], 1, 2) for x, n in zip(heads, lengths, strict=True))
    return d_q * scale, d_k, d_v, None if d_table is None else d_table.sum(axis=0).T


def _attend(q: Queries, k: Keys, v: Keys, seen: Sight, bias: Bias | None, chunk: int) -> Queries:
    """`q` is already scaled."""
    ready = _Ready.of(q, k, v, seen, bias, chunk)
    mixed = _blockwise(ready.relative, ready.q, ready.k, ready.v, ready.table, ready.blocks)
    return jnp.moveaxis(mixed[:, :, : q.shape[1]], 1, 2)


class _Ready(NamedTuple):
    """What the blocks are computed from: padded to whole blocks, heads first."""

    relative: RelativeBias | None
    q: Float[Array, "B K N d"]
    k: Float[Array, "B K M d"]
    v: Float[Array, "B K M d"]
    table: Float[Array, "B K T"] | None
    blocks: "_Blocks"

    @staticmethod
    def of(q: Queries, k: Keys, v: Keys, seen: Sight, bias: Bias | None, chunk: int) -> "_Ready":
        q_chunk, kv_chunk = min(chunk, q.shape[1]), min(chunk, k.shape[1])
        low, high = (padded(ends, q_chunk, fill) for ends, fill in ((seen.low, 1), (seen.high, 0)))
        # -1 is the segment of padding, and a place in no stretch.
        blocks = _in_blocks(Sight(low, high, padded(seen.at, kv_chunk, -1)), q_chunk, kv_chunk)
        table = relative = None
        if bias is not None:
            relative, heads = bias.relative, bias.table.T
            table = jnp.broadcast_to(heads, (q.shape[0], *heads.shape))
            pairs = (bias.q_coordinates, q_chunk), (bias.kv_coordinates, kv_chunk)
            places = [padded(at, size).reshape(at.shape[0], -1, size, 3) for at, size in pairs]
            blocks = blocks._replace(q_places=places[0], kv_places=places[1])
        q, k, v = (jnp.moveaxis(padded(x, size, 0), 2, 1) for x, size in ((q, q_chunk), (k, kv_chunk), (v, kv_chunk)))
        return _Ready(relative, q, k, v, table, blocks)


class _Blocks(NamedTuple):
    """A sight in `n` blocks of queries and `m` blocks of keys, with the extremes of each block."""

    low: Int[Array, "*B n b U A"]
    high: Int[Array, "*B n b U A"]
    at: Int[Array, "*B m c A"]
    lowest: Int[Array, "*B n U A"]
    highest: Int[Array, "*B n U A"]
    least: Int[Array, "*B m A"]
    most: Int[Array, "*B m A"]
    q_places: Float[Array, "*B n b 3"] | None = None
    kv_places: Float[Array, "*B m c 3"] | None = None
    """coordinates, where there is a bias"""

    def needed(self, index: Int[Array, ""]) -> tuple[Int[Array, " m"], Int[Array, ""]]:
        """Of one row: the key blocks that a query block may see, those first, and their number."""
        meets = (self.lowest[index] <= self.most[:, None]) & (self.least[:, None] <= self.highest[index])
        hit = meets.all(axis=-1).any(axis=-1)
        return jnp.argsort(~hit, stable=True).astype(jnp.int32), hit.sum(dtype=jnp.int32)

    def mask(self, query_block: Int[Array, ""], key_block: Int[Array, ""]) -> Bool[Array, "b c"]:
        """Of one row: who sees whom between two blocks."""
        pair = (self.low[query_block], self.high[query_block], self.at[key_block])
        return visible(Sight(*(part[None] for part in pair)))[0]

    def found(
        self, relative: RelativeBias | None, query_block: Int[Array, ""], key_block: Int[Array, ""]
    ) -> list[Int[Array, "b c"]]:
        """Of one row: the entries of a bias' table for what lies between two blocks."""
        if relative is None:
            return []
        assert self.q_places is not None
        assert self.kv_places is not None
        return relative.find(self.q_places[query_block], self.kv_places[key_block])


def _in_blocks(seen: Sight, q_chunk: int, kv_chunk: int) -> _Blocks:
    low, high = (ends.reshape(ends.shape[0], -1, q_chunk, *ends.shape[2:]) for ends in (seen.low, seen.high))
    at = seen.at.reshape(seen.at.shape[0], -1, kv_chunk, seen.at.shape[-1])
    # Padding must not widen the extremes of the blocks that it lies in.
    empty = (low > high).any(axis=-1, keepdims=True)
    nobody = at[..., :1] < 0
    return _Blocks(
        low=low,
        high=high,
        at=at,
        lowest=jnp.where(empty, _MOST, low).min(axis=2),
        highest=jnp.where(empty, _LEAST, high).max(axis=2),
        least=jnp.where(nobody, _MOST, at).min(axis=2),
        most=jnp.where(nobody, _LEAST, at).max(axis=2),
    )


def _each_head(row: Callable[..., Any], blocks: _Blocks, *arrays: Shaped[Array, "B K ..."] | None) -> Any:
    """`row(blocks, ...)` for the heads of every row: one at a time on CPU, where matrices of two dimensions are the
    fastest, and together elsewhere. Rows differ in which blocks they need, so they take turns."""
    if jax.default_backend() != "cpu":
        heads = jax.vmap(row, in_axes=(None, *(0 for _ in arrays)))
        return jax.lax.map(lambda given: heads(*given), (blocks, *arrays))
    return jax.lax.map(lambda given: jax.lax.map(lambda head: row(given[0], *head), given[1:]), (blocks, *arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(
    relative: RelativeBias | None,
    q: Float[Array, "B K N d"],
    k: Float[Array, "B K M d"],
    v: Float[Array, "B K M d"],
    table: Float[Array, "B K T"] | None,
    blocks: _Blocks,
) -> Float[Array, "B K N d"]:
    return _each_head(functools.partial(_row, relative), blocks, q, k, v, table)[0]


def _forward(relative, q, k, v, table, blocks):
    out, lse = _each_head(functools.partial(_row, relative), blocks, q, k, v, table)
    out, lse = named((out, lse), queries=q.shape[2], keys=k.shape[2])
    return out, (q, k, v, table, blocks, out, lse)


def _backward(relative, saved, d_out):
    q, k, v, table, blocks, out, lse = saved
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1)
    row = functools.partial(_row_backward, relative)
    *gradients, d_table = _each_head(row, blocks, q, k, v, table, lse, delta, d_out)
    return *(g.astype(x.dtype) for g, x in zip(gradients, (q, k, v), strict=True)), d_table, None


_blockwise.defvjp(_forward, _backward)


def _row(
    relative: RelativeBias | None,
    blocks: _Blocks,
    q: Float[Array, "N d"],
    k: Float[Array, "M d"],
    v: Float[Array, "M d"],
    table: Float[Array, " T"] | None,
    dtype: Any = None,
) -> tuple[Float[Array, "N d"], Float[Array, " N"]]:
    """One head of one row: what it mixes, and the logarithm of every query's sum of exponentials (float32).

    The mixture is in `dtype`, that of the values if None.
    """
    number, size = blocks.low.shape[:2]

    def block(index):
        queries = _block(q, index, size)
        wanted, count = blocks.needed(index)

        def step(at, state):
            top, total, mixed = state
            key_block = wanted[at]
            found = blocks.found(relative, index, key_block)
            scores = _scores(relative, table, found, queries, _key_block(k, blocks, key_block))
            scores = jnp.where(blocks.mask(index, key_block), scores, MASKED)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            weights = jnp.exp(scores - new_top[:, None])
            shrink = jnp.exp(top - new_top)
            total = total * shrink + weights.sum(axis=-1)
            part = _dot(weights.astype(v.dtype), _key_block(v, blocks, key_block), 1, 0)
            return new_top, total, mixed * shrink[:, None] + part

        begin = jnp.full(size, MASKED), jnp.zeros(size), jnp.zeros((size, v.shape[-1]))
        top, total, mixed = jax.lax.fori_loop(0, count, step, begin)
        sees = top > MASKED
        out = jnp.where(sees[:, None], mixed / total[:, None], 0.0).astype(dtype or v.dtype)
        return out, jnp.where(sees, top + jnp.log(total), NOTHING)

    out, lse = jax.lax.map(block, jnp.arange(number))
    return out.reshape(number * size, -1), lse.reshape(-1)


def _row_backward(
    relative: RelativeBias | None,
    blocks: _Blocks,
    q: Float[Array, "N d"],
    k: Float[Array, "M d"],
    v: Float[Array, "M d"],
    table: Float[Array, " T"] | None,
    lse: Float[Array, " N"],
    delta: Float[Array, " N"],
    d_out: Float[Array, "N d"],
) -> tuple[Float[Array, "N d"], Float[Array, "M d"], Float[Array, "M d"], Float[Array, " T"] | None]:
    """Gradients of one head of one row, in float32 (arXiv 2205.14135, appendix B.2)."""
    number, size = blocks.low.shape[:2]

    def block(gradients, index):
        queries, d_mixed = _block(q, index, size), _block(d_out, index, size)
        own_lse, own_delta = _block(lse, index, size), _block(delta, index, size)
        wanted, count = blocks.needed(index)

        def step(at, state):
            d_q, d_k, d_v, d_table = state
            key_block = wanted[at]
            keys, values = _key_block(k, blocks, key_block), _key_block(v, blocks, key_block)
            found = blocks.found(relative, index, key_block)
            scores = _scores(relative, table, found, queries, keys)
            scores = jnp.where(blocks.mask(index, key_block), scores, MASKED)
            weights = jnp.exp(scores - own_lse[:, None])
            d_scores = weights * (_dot(d_mixed, values, 1, 1) - own_delta[:, None])
            if relative is not None:
                d_table = d_table + relative.gradient(d_scores, found)
            weights, d_scores = weights.astype(v.dtype), d_scores.astype(k.dtype)
            d_v = _added(d_v, blocks, key_block, _dot(weights, d_mixed, 0, 0))
            d_k = _added(d_k, blocks, key_block, _dot(d_scores, queries, 0, 0))
            return d_q + _dot(d_scores, keys, 1, 0), d_k, d_v, d_table

        d_q, *gradients = jax.lax.fori_loop(0, count, step, (jnp.zeros(queries.shape), *gradients))
        return tuple(gradients), d_q

    zeros = jnp.zeros(k.shape), jnp.zeros(v.shape), None if table is None else jnp.zeros_like(table)
    gradients, d_q = jax.lax.scan(block, zeros, jnp.arange(number))
    return d_q.reshape(q.shape), *gradients


def _scores(
    relative: RelativeBias | None,
    table: Float[Array, " T"] | None,
    found: list[Int[Array, "b c"]],
    queries: Float[Array, "b d"],
    keys: Float[Array, "c d"],
) -> Float[Array, "b c"]:
    scores = _dot(queries, keys, 1, 1)
    if relative is None:
        return scores
    assert table is not None
    return scores + relative.read(table, found)


def _dot(left: Float[Array, "_ _"], right: Float[Array, "_ _"], left_axis: int, right_axis: int) -> Float[Array, "_ _"]:
    """A matrix product over these axes, summed in float32."""
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)


def _block(rows: Shaped[Array, "N *rest"], index: Int[Array, ""], size: int) -> Shaped[Array, "b *rest"]:
    return jax.lax.dynamic_slice_in_dim(rows, index * size, size)


def _key_block(rows: Shaped[Array, "M *rest"], blocks: _Blocks, index: Int[Array, ""]) -> Shaped[Array, "c *rest"]:
    return _block(rows, index, blocks.at.shape[1])


def _added(
    rows: Float[Array, "M d"], blocks: _Blocks, index: Int[Array, ""], block: Float[Array, "c d"]
) -> Float[Array, "M d"]:
    start = index * blocks.at.shape[1]
    return jax.lax.dynamic_update_slice_in_dim(rows, _key_block(rows, blocks, index) + block, start, axis=0)
