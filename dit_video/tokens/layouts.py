"""Layouts: the arrays in which the examples of a batch are placed.

Only a layout knows where an example's values lie. It spreads values of examples over their tokens, averages tokens per
example and draws noise, so that models and losses need not know how examples are placed.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from dit_video.core.typing import AnyArray
from dit_video.tokens.segments import compute_segment_offsets, expand_to_tokens, segment_max, segment_mean


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """The layout of packed rows: the segment that each token belongs to, and its place in the clip."""

    segments: Int[AnyArray, "*B N"]
    """Segment id of each token; 0 is padding."""
    positions: Float[AnyArray, "*B N 3"]
    """Positions (t, h, w) of each token."""
    count: int
    """Maximum number of segments in a row (G)."""

    def expand(self, values: Shaped[Array, "B G *rest"]) -> Shaped[Array, "B N *rest"]:
        """Return every token's value from one value per segment; padding gets the first segment's."""
        return expand_to_tokens(values, self.segments)

    def mean(self, values: Float[Array, "B N *rest"]) -> Float[Array, "B G *rest"]:
        """Return the mean over each segment's tokens; zero for a segment without any."""
        return segment_mean(values, self.segments, count=self.count)

    def max(self, values: Float[Array, "B N"]) -> Float[Array, "B G"]:
        """Return the largest value in each segment, without rounding; zero for a segment without tokens."""
        return segment_max(values, self.segments, count=self.count)

    def get_sequence_segments(self, length: int) -> Int[Array, "B _"]:
        """Return the segment ids of a field's tokens, of which every segment has `length`; 0 for absent segments."""
        ids = jnp.arange(1, self.count + 1)
        is_present = (jnp.asarray(self.segments)[..., None] == ids).any(axis=1)
        return jnp.repeat(jnp.where(is_present, ids, 0), length, axis=1)

    def sample_noise(self, keys: Key[Array, "B G"], width: int) -> Float[Array, "B N {width}"]:
        """Sample standard normal noise, which depends on an example's key and its tokens' order, but not on its row."""
        offsets = compute_segment_offsets(self.segments)

        def sample_token(row_keys, segment, offset):
            return jax.random.normal(jax.random.fold_in(row_keys[jnp.maximum(segment - 1, 0)], offset), (width,))

        return jax.vmap(jax.vmap(sample_token, in_axes=(None, 0, 0)))(keys, self.segments, offsets)

    def tree_flatten(self) -> tuple[tuple[Any, Any], int]:
        """Return the arrays, and the number of segments: the structure of this pytree."""
        return (self.segments, self.positions), self.count

    @classmethod
    def tree_unflatten(cls, count: int, arrays: tuple[Any, Any]) -> "PackedRows":
        """Return the layout of these arrays, which may be placeholders of JAX."""
        layout = object.__new__(cls)
        for name, value in zip(("segments", "positions", "count"), (*arrays, count), strict=True):
            object.__setattr__(layout, name, value)
        return layout
