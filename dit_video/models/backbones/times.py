"""Times of tokens of which only two per clip differ: that of its noisy tokens, and 0, that of its clean ones.

A model projects modulations of several times its width from a time. For a clip of 27,000 tokens and a width of 3,072
those of all tokens take 2 GB, and those of its two times 150 kB, which are spread over the tokens where they are used.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dit_video.tokens import PackedRows


class ClipTimes(NamedTuple):
    """Diffusion times of tokens: 0 of clean tokens, and their clip's of all others."""

    values: Float[Array, "B G"]
    """Time of each clip's noisy tokens."""
    is_clean: Bool[Array, "B N"]

    @classmethod
    def from_tokens(cls, time: Float[Array, "B N"], is_clean: Bool[Array, "B N"], layout: PackedRows) -> "ClipTimes":
        """Return the times of tokens, of which a clip's noisy ones have the same."""
        return cls(layout.max(jnp.where(is_clean, 0, time)), is_clean)

    @property
    def distinct(self) -> Float[Array, "B M"]:
        """Return the times that differ: each clip's, followed by 0 for each clip."""
        return jnp.concatenate([self.values, jnp.zeros_like(self.values)], axis=1)

    def get_numbers(self, layout: PackedRows) -> Int[Array, "B N"]:
        """Return the number of each token's time in `distinct`, from 1 on; 0 for padding."""
        segments = jnp.asarray(layout.segments)
        return jnp.where(self.is_clean & (segments > 0), segments + layout.count, segments)

    def expand(self, layout: PackedRows) -> Float[Array, "B N"]:
        """Return the time of every token."""
        return jnp.where(self.is_clean, 0, layout.expand(self.values))
