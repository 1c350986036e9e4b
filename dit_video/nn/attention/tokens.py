"""What attention is told of its tokens: whose they are, and where they lie on the grid of their clip."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError
from dit_video.nn.attention.bias import Bias

Coordinates = Float[Array, "B N 3"] | Int[Array, "B N 3"]
"""(t, h, w), in any unit"""

NOWHERE = -1
"""The grid index, along all axes, of what has no place in a clip: registers, texts in joint attention."""


class Tokens(NamedTuple):
    """The queries and the keys of an attention, besides their values.

    Segment id 0 is padding. Grid indices are those of `grid_indices`, queries and keys on one grid; only a pattern
    other than `Full` reads them. In self-attention (`among`) keys are the same tokens as queries, and only these are
    given: so a backend knows that whoever has a segment sees something.
    """

    q_segments: Int[Array, "B N"]
    context_segments: Int[Array, "B M"] | None = None
    """of keys that are other tokens"""
    q_indices: Int[Array, "B N 3"] | None = None
    context_indices: Int[Array, "B M 3"] | None = None
    bias: Bias | None = None
    """added to the scores, where the backend can"""

    @classmethod
    def among(
        cls, segments: Int[Array, "B N"], indices: Int[Array, "B N 3"] | None = None, *, bias: Bias | None = None
    ) -> "Tokens":
        """Of self-attention: queries and keys are the same tokens."""
        return cls(segments, q_indices=indices, bias=bias)

    @property
    def kv_segments(self) -> Int[Array, "B M"]:
        return self.q_segments if self.context_segments is None else self.context_segments

    @property
    def kv_indices(self) -> Int[Array, "B M 3"] | None:
        return self.q_indices if self.context_segments is None else self.context_indices

    def without_bias(self, backend: str) -> "Tokens":
        """Raises UserError where there is a bias."""
        if self.bias is not None:
            raise UserError(f"{backend} attention cannot add a bias to its scores; use the backend chunked or dense")
        return self


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


def _ranks(values: Float[Array, " N"], ids: Int[Array, " N"]) -> Int[Array, " N"]:
    order = jnp.lexsort((values, ids))
    values, ids = values[order], ids[order]
    begins = jnp.pad(ids[1:] != ids[:-1], (1, 0), constant_values=True)
    steps = begins | jnp.pad(values[1:] != values[:-1], (1, 0))
    count = jnp.cumsum(steps, dtype=jnp.int32)
    ranks = count - jax.lax.cummax(jnp.where(begins, count, 0))
    return jnp.zeros_like(ranks).at[order].set(ranks)
