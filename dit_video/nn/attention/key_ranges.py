"""Sorting of keys such that every query sees one contiguous range of them, as GPU and TPU kernels need it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from dit_video.core.errors import UserError
from dit_video.nn.attention.masks import MaskBoxes, Pattern


def require_key_ranges(pattern: Pattern, backend: str) -> None:
    """Raise an error for a pattern whose queries see more than one range of keys.

    Raises:
      UserError: such a pattern.
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
    # In such patterns the only box ends at the query's own value, so its upper end sorts the queries.
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
