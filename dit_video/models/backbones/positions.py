"""Absolute position embeddings, which are added to the tokens.

Rotary embedding is relative: attention alone cannot tell the absolute position of a token in pure noise.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError, check_at_least
from dit_video.nn import Init, Linear, Partitioner, sinusoidal_embedding
from dit_video.tokens import expand_to_tokens, segment_max, split_evenly

_DISTANCE_WIDTH = 32
"""Number of sines and cosines for one distance."""


class PositionEmbedding(ABC):
    """Config of an embedding of positions that is added to the tokens.

    It computes features from a row's positions, and makes the layer, if any, that maps them to the model's width.
    """

    needs_extent: ClassVar[bool] = True
    """False if a token's features do not depend on its clip's size, so that frames can be computed one by one."""

    @property
    def linear_features(self) -> int:
        """Return the number of features that a linear layer maps to the width, for the count of FLOPs."""
        return 0

    def check(self, width: int) -> None:  # noqa: B027 (most serve every width)
        """Check that a model of this width can use the embedding.

        Raises:
          UserError: If the width does not suit the embedding.
        """

    def make(self, width: int, *, dtype: jnp.dtype, partitioner: Partitioner, rngs: nnx.Rngs) -> nnx.Module | None:
        """Make the layer that maps features to the width: a linear one; None if the features already have it."""
        if not self.linear_features:
            return None
        return Linear(self.linear_features, width, dtype=dtype, partitioner=partitioner, rngs=rngs)

    @abstractmethod
    def compute_features(
        self, positions: Float[Array, "B N 3"], segments: Int[Array, "B N"], *, count: int, width: int
    ) -> Float[Array, "B N position"]:
        """Compute the features of tokens in rows with up to `count` segments. Positions of padding are arbitrary."""


@dataclass(frozen=True, kw_only=True)
class BoundaryEmbedding(PositionEmbedding):
    """Embedding of the distances to both ends of a clip along each axis: sines and cosines, then a linear layer."""

    @property
    def linear_features(self) -> int:
        return 6 * _DISTANCE_WIDTH

    def make(
        self, width: int, *, init: Init = "xavier", dtype: jnp.dtype, partitioner: Partitioner, rngs: nnx.Rngs
    ) -> Linear:
        return Linear(self.linear_features, width, init=init, dtype=dtype, partitioner=partitioner, rngs=rngs)

    def compute_features(
        self, positions: Float[Array, "B N 3"], segments: Int[Array, "B N"], *, count: int, width: int
    ) -> Float[Array, "B N position"]:
        from_end = _compute_extents(positions, segments, count=count) - positions
        distances = jnp.concatenate([positions, from_end], axis=-1)
        return sinusoidal_embedding(distances, _DISTANCE_WIDTH, max_period=100.0).reshape(*distances.shape[:2], -1)


@dataclass(frozen=True, kw_only=True)
class SineCosine(PositionEmbedding):
    """Sines and cosines of the positions, without parameters; the width is divided among the axes (arXiv 2212.09748).

    Coordinates count patches, so a clip larger than any in training has untrained values.
    """

    max_period: float = 10_000.0
    needs_extent: ClassVar[bool] = False

    def check(self, width: int) -> None:
        """Check that the width is even.

        Raises:
          UserError: If the width is odd.
        """
        if width % 2:
            raise UserError(f"sine-cosine positions need an even width, not {width}")

    def compute_features(
        self, positions: Float[Array, "B N 3"], segments: Int[Array, "B N"], *, count: int, width: int
    ) -> Float[Array, "B N {width}"]:
        axes = [(axis, part) for axis, part in enumerate(split_evenly(width)) if part]
        parts = [sinusoidal_embedding(positions[..., axis], part, max_period=self.max_period) for axis, part in axes]
        return jnp.concatenate(parts, axis=-1)


@dataclass(frozen=True, kw_only=True)
class ImageSineCosine(PositionEmbedding):
    """Sines and cosines of column and row, without parameters; half of the width each (DiT, arXiv 2212.09748).

    Columns come first. For images whose size differs from training, coordinates are scaled to the trained range. The
    embedding does not depend on time.

    Raises:
      UserError: If `side` is below 1.
    """

    side: int = 16
    """Height and width of the training images, in tokens."""
    max_period: float = 10_000.0

    def __post_init__(self):
        check_at_least(1, side=self.side)

    def check(self, width: int) -> None:
        """Check that the width is divisible by 4.

        Raises:
          UserError: If the width is not divisible by 4.
        """
        if width % 4:
            raise UserError(f"sine-cosine positions of images need a width divisible by 4, not {width}")

    def compute_features(
        self, positions: Float[Array, "B N 3"], segments: Int[Array, "B N"], *, count: int, width: int
    ) -> Float[Array, "B N {width}"]:
        scaled = positions * (self.side / (_compute_extents(positions, segments, count=count) + 1))
        parts = []
        for axis in (2, 1):
            encoding = sinusoidal_embedding(scaled[..., axis], width // 2, max_period=self.max_period)
            cosines, sines = jnp.split(encoding, 2, axis=-1)
            parts += [sines, cosines]
        return jnp.concatenate(parts, axis=-1)


@dataclass(frozen=True, kw_only=True)
class FactorizedEmbedding(PositionEmbedding):
    """Learned tables, one per axis, read at the token's fractional position in its clip.

    Between two entries the tables are interpolated linearly, so clips of all sizes share them, including clips larger
    than in training (NaViT's factorised positions with fractional positions, arXiv 2307.06304, section 2.1).

    Raises:
      UserError: If a table has fewer than two entries.
    """

    sizes: tuple[int, int, int] = (32, 64, 64)
    """Number of entries along (t, h, w)."""

    def __post_init__(self):
        if min(self.sizes) < 2:
            raise UserError(f"position table sizes {self.sizes} are invalid; use at least 2 entries for each axis")

    def make(self, width: int, *, dtype: jnp.dtype, partitioner: Partitioner, rngs: nnx.Rngs) -> nnx.Module | None:
        return AxisTables(self.sizes, width, rngs=rngs)

    def compute_features(
        self, positions: Float[Array, "B N 3"], segments: Int[Array, "B N"], *, count: int, width: int
    ) -> Float[Array, "B N 3"]:
        extents = _compute_extents(positions, segments, count=count)
        # A single frame, row or column has fraction 0. Padding has arbitrary positions, so the result is clipped.
        return jnp.clip(positions / jnp.where(extents > 0, extents, 1.0), 0.0, 1.0)


class AxisTables(nnx.Module):
    """Learned tables, one per axis, whose interpolated entries are summed."""

    def __init__(self, sizes: tuple[int, int, int], width: int, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.t, self.h, self.w = (nnx.Param(normal(rngs.params(), (size, width), jnp.float32)) for size in sizes)

    def __call__(self, fractions: Float[Array, "B N 3"]) -> Float[Array, "B N D"]:
        parts = []
        for axis, table in enumerate((self.t[...], self.h[...], self.w[...])):
            entry = fractions[..., axis] * (len(table) - 1)
            low = jnp.clip(entry.astype(jnp.int32), 0, len(table) - 2)
            weight = (entry - low)[..., None]
            parts.append((1 - weight) * table[low] + weight * table[low + 1])
        return parts[0] + parts[1] + parts[2]


def _compute_extents(
    positions: Float[Array, "B N 3"], segments: Int[Array, "B N"], *, count: int
) -> Float[Array, "B N 3"]:
    """Return for every token the largest coordinate along each axis in its segment."""
    extents = jnp.stack([segment_max(positions[..., axis], segments, count=count) for axis in range(3)], axis=-1)
    return expand_to_tokens(extents, segments)
