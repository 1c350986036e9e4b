"""Attention patterns: small frozen configs that define which tokens of a clip see each other.

A pattern computes a value along each of its own axes from a token's grid index (t, h, w), and for every query one or
more boxes along these axes. A query sees the keys of its own segment that lie in one of its boxes:

    i sees j  <=>  segment_i = segment_j > 0  and  low_i <= value_j <= high_i along all axes, for one of the boxes.

Backends use a pattern in this form only: the dense mask is the comparison itself, and the extremes of boxes and values
tell whether a block of queries sees any key in a block. The segment is the first axis, so packing is part of the same
comparison. Id 0 is padding: it sees nothing, is not seen, and gets zeros.
"""

import functools
import itertools
import operator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dit_video.core.errors import UserError, check_at_least
from dit_video.nn.attention.api import AttentionInputs

OPEN_LOW, OPEN_HIGH = int(np.iinfo(np.int32).min), int(np.iinfo(np.int32).max)
"""Lower and upper end of a box that is unbounded along an axis."""

Locality = Literal["group", "prefix", "boxes"]
"""Locality of a pattern: the keys that a query sees once keys are sorted by their values. These are all keys with the
query's own value ("group"), those and all earlier keys in its segment ("prefix"), or anything else ("boxes"). Kernels
that take one range of keys per query support the first two."""


@runtime_checkable
class Pattern(Protocol):
    """A rule that decides which tokens see each other, given as `A` axes and one or more boxes (see `MaskBoxes`)."""

    @property
    def locality(self) -> Locality: ...

    @property
    def causal(self) -> bool:
        """Return True if no frame sees a later one outside its chunk."""

    def compute_axes(self, indices: Int[Array, "B N 3"]) -> tuple[Int[Array, "B N"], ...]:
        """Return the values along the pattern's axes; without axes a query sees its whole segment."""

    def compute_boxes(self, values: Int[Array, "B N A"]) -> tuple[tuple[Int[Array, "B N A"], Int[Array, "B N A"]], ...]:
        """Return (low, high), both inclusive, for every box of queries with these values."""


class _Groups:
    """Base of patterns in which tokens see each other if they agree along `axes`."""

    axes: ClassVar[tuple[int, ...]] = ()
    locality: ClassVar[Locality] = "group"
    causal: ClassVar[bool] = False

    def compute_axes(self, indices):
        return tuple(indices[..., axis] for axis in self.axes)

    def compute_boxes(self, values):
        return ((values, values),)


@dataclass(frozen=True, kw_only=True)
class Full(_Groups):
    """Full spacetime attention: a token sees its whole clip. No other pattern works without grid indices."""


@dataclass(frozen=True, kw_only=True)
class SpaceOnly(_Groups):
    """Spatial attention within a frame: the spatial half of factorised attention (Latte, arXiv 2401.03048)."""

    axes = (0,)


@dataclass(frozen=True, kw_only=True)
class TimeOnly(_Groups):
    """Temporal attention among the tokens at the same (h, w): the temporal half of factorised attention."""

    axes = (1, 2)


@dataclass(frozen=True, kw_only=True)
class CausalFrames:
    """Causal attention over time: a frame sees its own chunk of `chunk` frames and all earlier frames.

    Raises:
      UserError: If the chunk is below 1.
    """

    chunk: int = 1
    locality: ClassVar[Locality] = "prefix"
    causal: ClassVar[bool] = True

    def __post_init__(self):
        check_at_least(1, chunk=self.chunk)

    def compute_axes(self, indices):
        return (indices[..., 0] // self.chunk,)

    def compute_boxes(self, values):
        return ((jnp.full_like(values, OPEN_LOW), values),)


@dataclass(frozen=True, kw_only=True)
class SparseCausal:
    """Attention to the own, the previous and the first frame (Tune-A-Video, arXiv 2212.11565, plus the own frame)."""

    locality: ClassVar[Locality] = "boxes"
    causal: ClassVar[bool] = True

    def compute_axes(self, indices):
        return (indices[..., 0],)

    def compute_boxes(self, values):
        # The first frame's box is empty where the other box contains that frame, so that no key is in two boxes.
        first = jnp.zeros_like(values)
        return (values - 1, values), (first, jnp.where(values > 1, first, first - 1))


@dataclass(frozen=True, kw_only=True)
class SlidingWindow:
    """Attention to tokens at most `radius` tiles of `tile` tokens away along (t, h, w); None is any distance.

    With tiles of one token the window slides token by token; with larger ones all tokens of a tile see the same keys,
    which fits blocks exactly (sliding tile attention, arXiv 2502.04507). Radius 0 is attention within a tile.

    Raises:
      UserError: If a radius is negative, a tile is below 1, or no axis has a radius.
    """

    radius: tuple[int | None, int | None, int | None]
    tile: tuple[int, int, int] = (1, 1, 1)

    causal: ClassVar[bool] = False

    def __post_init__(self):
        if any(radius is not None and radius < 0 for radius in self.radius):
            raise UserError(f"sliding window radius {self.radius} must not be negative; use None for no limit")
        check_at_least(1, tile=min(self.tile))
        if not self._limited_axes:
            raise UserError(f"sliding window radius {self.radius} limits no axis; limit one, or use pattern Full()")

    @property
    def _limited_axes(self) -> list[int]:
        return [axis for axis, radius in enumerate(self.radius) if radius is not None]

    @property
    def locality(self) -> Locality:
        return "boxes" if any(self.radius) else "group"

    def compute_axes(self, indices):
        return tuple(indices[..., axis] // self.tile[axis] for axis in self._limited_axes)

    def compute_boxes(self, values):
        radius = jnp.asarray([self.radius[axis] for axis in self._limited_axes], values.dtype)
        return ((values - radius, values + radius),)


PatternChoice = Full | SpaceOnly | TimeOnly | CausalFrames | SparseCausal | SlidingWindow
"""Patterns that a config can hold."""


@dataclass(frozen=True, kw_only=True)
class WithGlobalTokens:
    """A pattern extended to tokens without a position (`GLOBAL`): registers, and text in joint attention.

    Every token sees the global tokens of its segment. Global tokens see their whole segment. In causal patterns they
    see only each other, because frames would otherwise learn about later ones through them.
    """

    pattern: Pattern
    globals_see_all: bool

    locality: ClassVar[Locality] = "boxes"

    @property
    def causal(self) -> bool:
        return self.pattern.causal and not self.globals_see_all

    def compute_axes(self, indices):
        has_position = indices[..., 0] >= 0
        return has_position.astype(jnp.int32), *self.pattern.compute_axes(indices)

    def compute_boxes(self, values):
        # The first axis is 1 for tokens with a position and 0 for global ones.
        kind = values[..., :1]
        zeros = jnp.zeros_like(values[..., 1:])
        lowest, highest = zeros + OPEN_LOW, zeros + OPEN_HIGH
        has_position = kind > 0
        # The pattern's boxes go from 1 to 1 along the first axis, and from 1 to 0 for a global token that must not
        # look.
        kind_end = jnp.where(has_position | self.globals_see_all, 1, 0)
        boxes = [
            (
                jnp.concatenate([jnp.ones_like(kind), jnp.where(has_position, low, lowest)], axis=-1),
                jnp.concatenate([kind_end, jnp.where(has_position, high, highest)], axis=-1),
            )
            for low, high in self.pattern.compute_boxes(values[..., 1:])
        ]
        # Every query also gets a box with all global tokens.
        is_global = jnp.zeros_like(kind)
        return *boxes, (jnp.concatenate([is_global, lowest], axis=-1), jnp.concatenate([is_global, highest], axis=-1))


class MaskBoxes(NamedTuple):
    """The mask in the form of boxes: query `i` sees key `j` if `values[j]` is in one of its `U` boxes along all axes.

    The first of the A axes is the segment.
    """

    low: Int[Array, "B N U A"]
    high: Int[Array, "B N U A"]
    values: Int[Array, "B M A"]


def mask_boxes(pattern: Pattern, inputs: AttentionInputs) -> MaskBoxes:
    """Return the boxes of queries and the values of keys; a pattern with axes needs the tokens' grid indices.

    Padding has segment -1 among the keys, and an empty box, from 1 to 0, among the queries.
    """
    queries = _stack_axes(pattern, inputs.q_segments, inputs.q_indices)
    keys = _stack_axes(pattern, inputs.kv_segments, inputs.kv_indices)
    q_segments = inputs.q_segments[..., None]
    first, last = jnp.where(q_segments > 0, q_segments, 1), jnp.where(q_segments > 0, q_segments, 0)
    boxes = [
        (jnp.concatenate([first, low], axis=-1), jnp.concatenate([last, high], axis=-1))
        for low, high in pattern.compute_boxes(queries)
    ]
    low, high = (jnp.stack(ends, axis=-2) for ends in zip(*boxes, strict=True))
    kv_segments = jnp.where(inputs.kv_segments > 0, inputs.kv_segments, -1)[..., None]
    return MaskBoxes(low, high, jnp.concatenate([kv_segments, keys], axis=-1))


def _stack_axes(
    pattern: Pattern, segments: Int[Array, "B N"], indices: Int[Array, "B N 3"] | None
) -> Int[Array, "B N A"]:
    if isinstance(pattern, Full):
        return jnp.zeros((*segments.shape, 0), jnp.int32)
    if indices is None:
        name = type(pattern).__name__
        raise UserError(f"{name} needs grid indices; give q_indices, and context_indices for other keys")
    return jnp.stack(pattern.compute_axes(indices), axis=-1)


def dense_mask(boxes: MaskBoxes) -> Bool[Array, "B N M"]:
    """Return the dense mask."""

    # Box by box and axis by axis: XLA fuses such two-dimensional comparisons into the operation that uses the mask.
    def is_between(box: int, axis: int) -> Bool[Array, "B N M"]:
        values = boxes.values[:, None, :, axis]
        return (boxes.low[:, :, None, box, axis] <= values) & (values <= boxes.high[:, :, None, box, axis])

    axes = range(boxes.values.shape[-1])
    masks = (
        functools.reduce(operator.and_, (is_between(box, axis) for axis in axes)) for box in range(boxes.low.shape[-2])
    )
    return functools.reduce(operator.or_, masks)


@functools.lru_cache(maxsize=65_536)
def count_pairs(pattern: Pattern, grid: tuple[int, int, int]) -> int:
    """Count the visible (query, key) pairs in a clip of (t, h, w) tokens: the ones in its dense mask.

    Keys are counted by their values along the pattern's A axes, and the counts are accumulated along each axis. The
    number of keys in a query's box is then a signed sum of 2^A entries. Time and memory are linear in the number of
    tokens.
    """
    indices = jnp.asarray(np.indices(grid, np.int32).reshape(3, 1, -1).transpose(1, 2, 0))
    axes = pattern.compute_axes(indices)
    if not axes:
        return int(np.prod(grid, dtype=np.int64)) ** 2
    values = jnp.stack(axes, axis=-1)
    keys = np.asarray(values, np.int64)[0]
    first, size = keys.min(axis=0), np.ptp(keys, axis=0) + 1
    counts = np.zeros(size + 1, np.int64)  # keys whose values are smaller along every axis, after the loop
    np.add.at(counts, tuple((keys - first + 1).T), 1)
    for axis in range(counts.ndim):
        counts = counts.cumsum(axis=axis)
    total = 0
    for low, high in pattern.compute_boxes(values):
        begin = np.clip(np.asarray(low, np.int64)[0] - first, 0, size)
        end = np.maximum(np.clip(np.asarray(high, np.int64)[0] - first + 1, 0, size), begin)
        # Inclusion-exclusion over the corners of every query's box.
        for corner in itertools.product((False, True), repeat=counts.ndim):
            indices_of_corner = np.where(corner, end, begin)
            total += (-1) ** (counts.ndim - sum(corner)) * int(counts[tuple(indices_of_corner.T)].sum())
    return total
