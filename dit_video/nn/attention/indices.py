"""Where tokens lie on the grid of their clip, from coordinates of any unit."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Coordinates = Float[Array, "B _ 3"] | Int[Array, "B _ 3"]
"""(t, h, w) of as many tokens as they come with"""


def grid_indices(coordinates: Coordinates, segments: Int[Array, "B N"]) -> Int[Array, "B N 3"]:
    """The index of every token along t, h and w, from 0 in each segment.

    Whole numbers are taken for indices as they are. Real coordinates (seconds, fractions of the picture) become ranks:
    a token's index along an axis is the number of smaller coordinates in its segment, counted once each, so that the
    frame before is the one before in the row's clip, however far apart in time.
    """
    if jnp.issubdtype(coordinates.dtype, jnp.integer):
        return coordinates
    ranks = jax.vmap(jax.vmap(_ranks, in_axes=(-1, None), out_axes=-1))
    return ranks(coordinates, segments)


def both_grid_indices(
    q_coordinates: Coordinates,
    kv_coordinates: Coordinates | None,
    q_segments: Int[Array, "B N"],
    kv_segments: Int[Array, "B M"],
) -> tuple[Int[Array, "B N 3"], Int[Array, "B M 3"]]:
    """The indices of queries and keys on one grid; keys without coordinates are the queries' own tokens."""
    if kv_coordinates is None:
        indices = grid_indices(q_coordinates, q_segments)
        return indices, indices
    if all(jnp.issubdtype(given.dtype, jnp.integer) for given in (q_coordinates, kv_coordinates)):
        return q_coordinates, kv_coordinates
    together = jnp.concatenate([q_coordinates, kv_coordinates], axis=1)
    indices = grid_indices(together, jnp.concatenate([q_segments, kv_segments], axis=1))
    return indices[:, : q_segments.shape[1]], indices[:, q_segments.shape[1] :]


def _ranks(values: Float[Array, " N"], ids: Int[Array, " N"]) -> Int[Array, " N"]:
    order = jnp.lexsort((values, ids))
    values, ids = values[order], ids[order]
    begins = jnp.pad(ids[1:] != ids[:-1], (1, 0), constant_values=True)
    steps = begins | jnp.pad(values[1:] != values[:-1], (1, 0))
    count = jnp.cumsum(steps, dtype=jnp.int32)
    ranks = count - jax.lax.cummax(jnp.where(begins, count, 0))
    return jnp.zeros_like(ranks).at[order].set(ranks)
