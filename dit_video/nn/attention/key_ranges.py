"""Keys sorted so that what a query sees is one stretch of them: the form that kernels of accelerators take."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from dit_video.core.errors import UserError
from dit_video.nn.attention.masks import Pattern, Sight


def require_stretches(pattern: Pattern, backend: str) -> None:
    """Raise for a pattern whose queries see more than one stretch of keys.

    Raises:
      UserError: such a pattern.
    """
    if pattern.reach == "boxes":
        raise UserError(
            f"{backend} attention cannot do {pattern}: its queries see keys in several stretches; "
            "use the backend chunked or dense"
        )


class Stretches(NamedTuple):
    """Orders to take queries and keys in, and for every query in its order the keys `start <= j < stop` in theirs."""

    order: Int[Array, "B N"]
    key_order: Int[Array, "B M"]
    start: Int[Array, "B N"]
    stop: Int[Array, "B N"]
    groups: Int[Array, "B M"]
    """of every key in its order: where the stretch begins that it belongs to"""


def stretches(pattern: Pattern, seen: Sight) -> Stretches:
    """For a pattern of reach "group" or "prefix"."""
    # The first box ends at a query's own value.
    order, key_order = sorting(seen.high[:, :, 0]), sorting(seen.at)
    at = taken(seen.at, key_order)
    start, stop = bounds(taken(seen.low[:, :, 0], order), taken(seen.high[:, :, 0], order), at)
    within = at[..., :-1] if pattern.reach == "prefix" else at
    begins = jnp.pad((within[:, 1:] != within[:, :-1]).any(axis=-1), ((0, 0), (1, 0)), constant_values=True)
    places = jnp.arange(at.shape[1], dtype=jnp.int32)
    return Stretches(order, key_order, start, stop, jax.lax.cummax(jnp.where(begins, places, 0), axis=1))


def taken(rows: Shaped[Array, "B N *rest"], order: Int[Array, "B N"]) -> Shaped[Array, "B N *rest"]:
    """Every row in an order of its own."""
    return jax.vmap(lambda row, places: row[places])(rows, order)


def given_back(rows: Shaped[Array, "B N *rest"], order: Int[Array, "B N"]) -> Shaped[Array, "B N *rest"]:
    """The inverse of `taken`."""
    return taken(rows, jnp.argsort(order, axis=1))


def sorting(values: Int[Array, "B N A"]) -> Int[Array, "B N"]:
    """The order that sorts the tokens of a row by their first value, then the second, …; equal ones keep theirs."""
    return jax.vmap(lambda row: jnp.lexsort(tuple(row.T[::-1])).astype(jnp.int32))(values)


def bounds(
    low: Int[Array, "B N A"], high: Int[Array, "B N A"], at: Int[Array, "B M A"]
) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
    """The stretch of sorted keys whose values lie, in dictionary order, from `low` to `high`.

    Nothing quadratic: the ends are sorted in among the keys, and the keys before them counted. An empty box has
    `stop <= start`.
    """

    def of_row(low, high, at):
        queries, keys = low.shape[0], at.shape[0]
        rows = jnp.concatenate([at, low, high])
        side = jnp.concatenate([jnp.full(keys, 1), jnp.full(queries, 0), jnp.full(queries, 2)])
        order = jnp.lexsort((side, *rows.T[::-1]))  # among equals: low ends, then keys, then high ends
        before = jnp.cumsum(side[order] == 1, dtype=jnp.int32)
        count = jnp.zeros_like(before).at[order].set(before)
        return count[keys : keys + queries], count[keys + queries :]

    return jax.vmap(of_row)(low, high, at)


def padded(rows: Shaped[Array, "B N *rest"], size: int, fill: int = 0) -> Shaped[Array, "B M *rest"]:
    """Rows of whole blocks of `size`."""
    missing = -rows.shape[1] % size
    return jnp.pad(rows, ((0, 0), (0, missing), *((0, 0),) * (rows.ndim - 2)), constant_values=fill)
