"""Metadata of attention's queries and keys: segment ids, indices on the clip's grid, and a bias of the scores."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError
from dit_video.nn.attention.bias import Bias

Coordinates = Float[Array, "B N 3"] | Int[Array, "B N 3"]
"""Coordinates (t, h, w) of tokens, in any unit."""

GLOBAL = -1
"""Grid index, along all axes, of tokens without a position in a clip: registers, and text in joint attention."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class ContiguousSegments:
    """Order of rows in which the tokens of a segment follow one another, and those of a sole segment begin the row.

    Kernels that take the lengths of segments instead of ids need it. It is part of a pytree's structure.
    """

    count: int
    """Largest segment id of a row."""


class AttentionInputs(NamedTuple):
    """The metadata of attention's queries and keys.

    Segment id 0 is padding. Grid indices are those of `compute_grid_indices`, queries and keys on one grid; only
    patterns other than `Full` read them. In self-attention the keys are the same tokens as the queries and their fields
    are None, which tells a backend that every token with a segment sees at least itself. Keys that are not queries, of
    a text or a cache, have fields of their own.
    """

    q_segments: Int[Array, "B N"]
    context_segments: Int[Array, "B M"] | None = None
    """Segment ids of the keys; None in self-attention."""
    q_indices: Int[Array, "B N 3"] | None = None
    context_indices: Int[Array, "B M 3"] | None = None
    bias: Bias | None = None
    """Bias that is added to the scores, for backends that support it."""
    contiguous: ContiguousSegments | None = None
    """Order of queries and of keys; None in any other order."""

    @classmethod
    def self_attention(
        cls,
        segments: Int[Array, "B N"],
        indices: Int[Array, "B N 3"] | None = None,
        *,
        bias: Bias | None = None,
        segment_count: int | None = None,
    ) -> "AttentionInputs":
        """Return the inputs of self-attention, whose queries and keys are the same tokens.

        Args:
          segments: segment ids.
          indices: grid indices, for patterns other than `Full`.
          bias: bias of the scores.
          segment_count: largest segment id of a row whose segments are contiguous; None in any other order.
        """
        contiguous = None if segment_count is None else ContiguousSegments(segment_count)
        return cls(segments, q_indices=indices, bias=bias, contiguous=contiguous)

    def with_context(self, segments: Int[Array, "B M"]) -> "AttentionInputs":
        """Return the inputs of these queries' attention to a context, whose segments are contiguous if theirs are."""
        return AttentionInputs(self.q_segments, segments, contiguous=self.contiguous)

    @property
    def segment_count(self) -> int | None:
        """Return the largest segment id of contiguous segments; None in any other order."""
        return None if self.contiguous is None else self.contiguous.count

    @property
    def kv_segments(self) -> Int[Array, "B M"]:
        return self.q_segments if self.context_segments is None else self.context_segments

    @property
    def kv_indices(self) -> Int[Array, "B M 3"] | None:
        return self.q_indices if self.context_segments is None else self.context_indices

    def require_no_bias(self, backend: str) -> "AttentionInputs":
        """Return these inputs unchanged.

        Raises:
          UserError: there is a bias, which this backend does not support.
        """
        if self.bias is not None:
            raise UserError(f"{backend} attention cannot add a bias to its scores; use the backend chunked or dense")
        return self


def compute_grid_indices(positions: Coordinates, segments: Int[Array, "B N"]) -> Int[Array, "B N 3"]:
    """Return the index of every token along t, h and w, from 0 in each segment.

    Integer positions are returned as they are. Real ones (seconds, fractions of the frame size) become ranks: the
    number of distinct smaller positions along that axis in the token's segment. So neighbouring frames differ by 1,
    however far apart they are in time.
    """
    if jnp.issubdtype(positions.dtype, jnp.integer):
        return positions
    ranks = jax.vmap(jax.vmap(_compute_ranks, in_axes=(-1, None), out_axes=-1))
    return ranks(positions, segments)


def _compute_ranks(values: Float[Array, " N"], ids: Int[Array, " N"]) -> Int[Array, " N"]:
    order = jnp.lexsort((values, ids))
    values, ids = values[order], ids[order]
    begins = jnp.pad(ids[1:] != ids[:-1], (1, 0), constant_values=True)
    steps = begins | jnp.pad(values[1:] != values[:-1], (1, 0))
    count = jnp.cumsum(steps, dtype=jnp.int32)
    ranks = count - jax.lax.cummax(jnp.where(begins, count, 0))
    return jnp.zeros_like(ranks).at[order].set(ranks)
