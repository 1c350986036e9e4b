"""Who sees whom among the tokens of a clip: small frozen objects, chosen in a config.

A pattern reads a token's grid index (t, h, w), computes from it a value along each of its own axes, and gives every
query boxes along these axes. A query sees the keys of its own segment that lie in one of its boxes:

    i sees j  <=>  segment_i = segment_j > 0  and  low_i <= at_j <= high_i along all axes, for one of the boxes.

Every backend reads a pattern in this form alone: the dense mask is the comparison itself, and whether two blocks of
tokens have anything to do with each other follows from the extremes of their boxes and values. The segment is the first
axis, so packing is part of the same comparison. Id 0 is padding: it sees nothing, is seen by nobody, and gets zeros.
"""

import functools
import operator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dit_video.core.errors import UserError
from dit_video.nn.attention.tokens import Tokens

BEFORE_ALL, AFTER_ALL = int(np.iinfo(np.int32).min), int(np.iinfo(np.int32).max)
"""The ends of a box that is open."""

Reach = Literal["group", "prefix", "boxes"]
"""What a query sees of keys in the order of their values: all with its own; those and all before them in its segment;
or anything else. Kernels that are told one stretch of keys for every query can do the first two."""


@runtime_checkable
class Pattern(Protocol):
    """What `Sight` is made from. `A` axes, one box or more."""

    @property
    def reach(self) -> Reach: ...

    @property
    def causal(self) -> bool:
        """Whether no frame sees a later one outside its chunk."""

    def axes(self, indices: Int[Array, "B N 3"]) -> tuple[Int[Array, "B N"], ...]:
        """The values along the pattern's axes; none of them: everything in the segment."""

    def boxes(self, value: Int[Array, "B N A"]) -> tuple[tuple[Int[Array, "B N A"], Int[Array, "B N A"]], ...]:
        """(low, high) of every box, both included, of queries with these values."""


@dataclass(frozen=True, kw_only=True)
class Full:
    """Every token of the clip: full spacetime attention. The only one that needs no coordinates."""

    reach: ClassVar[Reach] = "group"
    causal: ClassVar[bool] = False

    def axes(self, indices):
        return ()

    def boxes(self, value):
        return ((value, value),)


@dataclass(frozen=True, kw_only=True)
class SpaceOnly:
    """The tokens of one's own frame: the spatial half of factorised attention (Latte, arXiv 2401.03048)."""

    reach: ClassVar[Reach] = "group"
    causal: ClassVar[bool] = False

    def axes(self, indices):
        return (indices[..., 0],)

    def boxes(self, value):
        return ((value, value),)


@dataclass(frozen=True, kw_only=True)
class TimeOnly:
    """The tokens at one's own (h, w) in all frames: the temporal half of factorised attention."""

    reach: ClassVar[Reach] = "group"
    causal: ClassVar[bool] = False

    def axes(self, indices):
        return indices[..., 1], indices[..., 2]

    def boxes(self, value):
        return ((value, value),)


@dataclass(frozen=True, kw_only=True)
class CausalFrames:
    """All frames up to one's own, in chunks of `chunk` frames: those of one chunk see each other.

    Raises:
      UserError: a chunk below 1.
    """

    chunk: int = 1

    reach: ClassVar[Reach] = "prefix"
    causal: ClassVar[bool] = True

    def __post_init__(self):
        if self.chunk < 1:
            raise UserError(f"a causal chunk has at least 1 frame, not {self.chunk}")

    def axes(self, indices):
        return (indices[..., 0] // self.chunk,)

    def boxes(self, value):
        return ((jnp.full_like(value, BEFORE_ALL), value),)


@dataclass(frozen=True, kw_only=True)
class SparseCausal:
    """One's own, the previous and the first frame (Tune-A-Video, arXiv 2212.11565, with one's own added)."""

    reach: ClassVar[Reach] = "boxes"
    causal: ClassVar[bool] = True

    def axes(self, indices):
        return (indices[..., 0],)

    def boxes(self, value):
        # The first frame's box is empty where the other has it already: no key is in two boxes.
        first = jnp.zeros_like(value)
        return (value - 1, value), (first, jnp.where(value > 1, first, first - 1))


@dataclass(frozen=True, kw_only=True)
class SlidingWindow:
    """Tokens at most `radius` tiles of `tile` latent tokens away along (t, h, w); None: any distance along that axis.

    With tiles of one token it slides token by token; with larger ones all tokens of a tile see the same keys, which
    blocks can follow exactly (sliding tile attention, arXiv 2502.04507). Radius 0 is attention inside a tile.

    Raises:
      UserError: a negative radius, a tile below 1, or no axis with a radius.
    """

    radius: tuple[int | None, int | None, int | None]
    tile: tuple[int, int, int] = (1, 1, 1)

    causal: ClassVar[bool] = False

    def __post_init__(self):
        if any(radius is not None and radius < 0 for radius in self.radius):
            raise UserError(f"radius {self.radius} of a sliding window must not be negative; use None for no limit")
        if min(self.tile) < 1:
            raise UserError(f"tile {self.tile} of a sliding window must be at least 1 along each axis")
        if not self._limited:
            raise UserError("a sliding window without a radius along any axis is Full()")

    @property
    def _limited(self) -> list[int]:
        return [axis for axis, radius in enumerate(self.radius) if radius is not None]

    @property
    def reach(self) -> Reach:
        return "boxes" if any(self.radius) else "group"

    def axes(self, indices):
        return tuple(indices[..., axis] // self.tile[axis] for axis in self._limited)

    def boxes(self, value):
        radius = jnp.asarray([self.radius[axis] for axis in self._limited], value.dtype)
        return ((value - radius, value + radius),)


PatternChoice = Full | SpaceOnly | TimeOnly | CausalFrames | SparseCausal | SlidingWindow
"""What a config can hold."""


@dataclass(frozen=True, kw_only=True)
class WithPlaceless:
    """A pattern among tokens some of which lie nowhere (`NOWHERE`): registers, and texts in joint attention.

    All of their segment see these. They see all of their segment, too; or each other alone, where through them a frame
    would learn of later ones.
    """

    pattern: Pattern
    seeing: bool

    reach: ClassVar[Reach] = "boxes"

    @property
    def causal(self) -> bool:
        return self.pattern.causal and not self.seeing

    def axes(self, indices):
        placed = indices[..., 0] >= 0
        return placed.astype(jnp.int32), *self.pattern.axes(indices)

    def boxes(self, value):
        placed = value[..., :1]
        every = jnp.zeros_like(value[..., 1:])
        first, last = every + BEFORE_ALL, every + AFTER_ALL
        of_placed = placed > 0
        # From 1 to 0: an empty box.
        seen_last = jnp.where(of_placed | self.seeing, 1, 0)
        boxes = [
            (
                jnp.concatenate([jnp.ones_like(placed), jnp.where(of_placed, low, first)], axis=-1),
                jnp.concatenate([seen_last, jnp.where(of_placed, high, last)], axis=-1),
            )
            for low, high in self.pattern.boxes(value[..., 1:])
        ]
        nowhere = jnp.zeros_like(placed)
        return *boxes, (jnp.concatenate([nowhere, first], axis=-1), jnp.concatenate([nowhere, last], axis=-1))


class Sight(NamedTuple):
    """What queries see: key `j` where `at[j]` is in one of query `i`'s `U` boxes along all axes, the segment first."""

    low: Int[Array, "B N U A"]
    high: Int[Array, "B N U A"]
    at: Int[Array, "B M A"]


def sight(pattern: Pattern, at: Tokens) -> Sight:
    """The boxes of queries and the values of keys; a pattern with axes needs the tokens' indices.

    Padding among the keys lies in segment -1, padding among the queries has an empty box, from 1 to 0.
    """
    queries, keys = _axes(pattern, at.q_segments, at.q_indices), _axes(pattern, at.kv_segments, at.kv_indices)
    own = at.q_segments[..., None]
    first, last = jnp.where(own > 0, own, 1), jnp.where(own > 0, own, 0)
    boxes = [
        (jnp.concatenate([first, low], axis=-1), jnp.concatenate([last, high], axis=-1))
        for low, high in pattern.boxes(queries)
    ]
    low, high = (jnp.stack(ends, axis=-2) for ends in zip(*boxes, strict=True))
    theirs = jnp.where(at.kv_segments > 0, at.kv_segments, -1)[..., None]
    return Sight(low, high, jnp.concatenate([theirs, keys], axis=-1))


def _axes(pattern: Pattern, segments: Int[Array, "B N"], indices: Int[Array, "B N 3"] | None) -> Int[Array, "B N A"]:
    if isinstance(pattern, Full):
        return jnp.zeros((*segments.shape, 0), jnp.int32)
    if indices is None:
        raise UserError(f"{type(pattern).__name__} reads where tokens lie: give the attention their grid indices")
    return jnp.stack(pattern.axes(indices), axis=-1)


def visible(seen: Sight) -> Bool[Array, "B N M"]:
    """The dense mask."""
    # Box by box and axis by axis: two-dimensional comparisons, which XLA fuses into what uses the mask.
    boxes = (
        functools.reduce(operator.and_, (_between(seen, box, axis) for axis in range(seen.at.shape[-1])))
        for box in range(seen.low.shape[-2])
    )
    return functools.reduce(operator.or_, boxes)


def _between(seen: Sight, box: int, axis: int) -> Bool[Array, "B N M"]:
    at = seen.at[:, None, :, axis]
    return (seen.low[:, :, None, box, axis] <= at) & (at <= seen.high[:, :, None, box, axis])
