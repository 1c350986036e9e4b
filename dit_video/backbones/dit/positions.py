"""Where a token lies in its clip, as something added to it.

Rotary positions are relative: from noise alone, attention cannot tell where in the clip a token lies. Each class here
makes `features` of a row's coordinates, and the layer that takes them to the model's width, if there is one.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError
from dit_video.nn import Init, Linear, sinusoidal
from dit_video.tokens import even_split, segment_max, to_tokens

_DISTANCE_WIDTH = 32
"""of the sines and cosines of one distance"""


@dataclass(frozen=True, kw_only=True)
class EndDistances:
    """A token's distance to both ends of its clip along each axis: sines and cosines, then a linear map."""

    def check(self, width: int) -> None:
        """Fits every width."""

    def make(self, width: int, *, init: Init = "xavier", dtype: jnp.dtype, rngs: nnx.Rngs) -> Linear:
        return Linear(6 * _DISTANCE_WIDTH, width, init=init, dtype=dtype, rngs=rngs)

    def features(
        self, coordinates: Float[Array, "B N 3"], segments: Int[Array, "B N"], *, count: int, width: int
    ) -> Float[Array, "B N position"]:
        left = _extents(coordinates, segments, count=count) - coordinates
        both = jnp.concatenate([coordinates, left], axis=-1)
        return sinusoidal(both, _DISTANCE_WIDTH, period=100.0).reshape(*both.shape[:2], -1)


@dataclass(frozen=True, kw_only=True)
class SineCosine:
    """Sines and cosines of the coordinates, without parameters: the width is divided among the axes (arXiv 2212.09748).

    Coordinates count patches, so that a clip larger than those of the training has values that were not seen there.
    """

    period: float = 10_000.0

    def check(self, width: int) -> None:
        """Raises UserError where the width can't be divided into even parts."""
        if width % 2:
            raise UserError(f"sine-cosine positions need an even width, not {width}")

    def make(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module | None:
        return None

    def features(
        self, coordinates: Float[Array, "B N 3"], segments: Int[Array, "B N"], *, count: int, width: int
    ) -> Float[Array, "B N {width}"]:
        parts = [
            sinusoidal(coordinates[..., axis], part, period=self.period)
            for axis, part in enumerate(even_split(width))
            if part
        ]
        return jnp.concatenate(parts, axis=-1)


@dataclass(frozen=True, kw_only=True)
class ImageSineCosine:
    """Sines and cosines of column and row, without parameters: half of the width each (DiT, arXiv 2212.09748).

    Columns go first. Those of an image of another size than the trained one are drawn together or apart, so that they
    cover what was trained. Frames of a clip are told apart by nothing here.

    Raises:
      UserError: no token.
    """

    side: int = 16
    """height and width of the images of the training, in tokens"""
    period: float = 10_000.0

    def __post_init__(self):
        if self.side < 1:
            raise UserError(f"images are 1 token high and wide or more, not {self.side}")

    def check(self, width: int) -> None:
        """Raises UserError where the width can't be divided by 4."""
        if width % 4:
            raise UserError(f"sine-cosine positions of images need a width divisible by 4, not {width}")

    def make(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module | None:
        return None

    def features(
        self, coordinates: Float[Array, "B N 3"], segments: Int[Array, "B N"], *, count: int, width: int
    ) -> Float[Array, "B N {width}"]:
        stretched = coordinates * (self.side / (_extents(coordinates, segments, count=count) + 1))
        parts = []
        for axis in (2, 1):
            cosines, sines = jnp.split(sinusoidal(stretched[..., axis], width // 2, period=self.period), 2, axis=-1)
            parts += [sines, cosines]
        return jnp.concatenate(parts, axis=-1)


@dataclass(frozen=True, kw_only=True)
class Factorised:
    """A learned table for each axis, read at the fraction of the clip that lies before the token.

    A fraction between two entries takes both in proportion, so that clips of all sizes share the tables, larger ones
    than trained too (NaViT's factorised positions with fractional coordinates, arXiv 2307.06304, section 2.1).

    Raises:
      UserError: a table of fewer than two entries.
    """

    sizes: tuple[int, int, int] = (32, 64, 64)
    """entries along (t, h, w)"""

    def __post_init__(self):
        if min(self.sizes) < 2:
            raise UserError(f"a table of positions needs 2 entries or more along each axis, not {self.sizes}")

    def check(self, width: int) -> None:
        """Fits every width."""

    def make(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module | None:
        return AxisTables(self.sizes, width, rngs=rngs)

    def features(
        self, coordinates: Float[Array, "B N 3"], segments: Int[Array, "B N"], *, count: int, width: int
    ) -> Float[Array, "B N 3"]:
        extents = _extents(coordinates, segments, count=count)
        # One frame, row or column lies at the start; padding may lie anywhere, and says nothing.
        return jnp.clip(coordinates / jnp.where(extents > 0, extents, 1.0), 0.0, 1.0)


AbsolutePosition = EndDistances | SineCosine | ImageSineCosine | Factorised


class AxisTables(nnx.Module):
    """The sum over the axes of a table's entries, at fractions of its length."""

    def __init__(self, sizes: tuple[int, int, int], width: int, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.t, self.h, self.w = (nnx.Param(normal(rngs.params(), (size, width), jnp.float32)) for size in sizes)

    def __call__(self, fractions: Float[Array, "B N 3"]) -> Float[Array, "B N D"]:
        parts = []
        for axis, table in enumerate((self.t[...], self.h[...], self.w[...])):
            at = fractions[..., axis] * (len(table) - 1)
            low = jnp.clip(at.astype(jnp.int32), 0, len(table) - 2)
            above = (at - low)[..., None]
            parts.append((1 - above) * table[low] + above * table[low + 1])
        return parts[0] + parts[1] + parts[2]


def _extents(coordinates: Float[Array, "B N 3"], segments: Int[Array, "B N"], *, count: int) -> Float[Array, "B N 3"]:
    """The coordinates of the last token along each axis of a token's segment."""
    extents = jnp.stack([segment_max(coordinates[..., axis], segments, count=count) for axis in range(3)], axis=-1)
    return to_tokens(extents, segments)
