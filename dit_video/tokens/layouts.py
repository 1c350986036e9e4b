"""Layouts: the arrays in which the examples of a batch are placed.

Only a layout knows where an example's values lie. It spreads values of examples over their tokens, averages tokens per
example and draws noise, so that models and losses need not know how examples are placed. In every layout the tokens of
a row, or of a canvas, are one axis, on which the tokens of an example follow one another in (t, h, w) order.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from dit_video.core.grid import Grid
from dit_video.core.typing import AnyArray
from dit_video.tokens.segments import (
    compute_segment_offsets,
    expand_to_tokens,
    segment_max,
    segment_mean,
    segment_quantile,
    take_tokens,
)


@jax.tree_util.register_pytree_with_keys_class
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

    def quantile(self, values: Float[Array, "B N *rest"], quantile: float) -> Float[Array, "B G"]:
        """Return a quantile of each segment's values, interpolated linearly; zero for a segment without tokens."""
        return segment_quantile(values, self.segments, quantile, count=self.count)

    def compute_offsets(self) -> Int[Array, "B N"]:
        """Return the index of every token within its example."""
        return compute_segment_offsets(self.segments)

    def get_sequence_segments(self, length: int) -> Int[Array, "B _"]:
        """Return the segment ids of a field's tokens, `length` for each segment; 0 for absent segments."""
        ids = jnp.arange(1, self.count + 1)
        is_present = (jnp.asarray(self.segments)[..., None] == ids).any(axis=1)
        return jnp.repeat(jnp.where(is_present, ids, 0), length, axis=1)

    def take(self, kept: Int[Array, "B K"]) -> "PackedRows":
        """Return the layout of some of the tokens, by their numbers in increasing order."""
        segments, positions = (take_tokens(jnp.asarray(each), kept) for each in (self.segments, self.positions))
        return PackedRows(segments=segments, positions=positions, count=self.count)

    def sample_noise(self, keys: Key[Array, "B G"], width: int) -> Float[Array, "B N {width}"]:
        """Sample standard normal noise, which depends on an example's key and its tokens' order, but not on its row."""

        def sample_token(row_keys, segment, offset):
            return jax.random.normal(jax.random.fold_in(row_keys[jnp.maximum(segment - 1, 0)], offset), (width,))

        sample_row = jax.vmap(sample_token, in_axes=(None, 0, 0))
        return jax.vmap(sample_row)(keys, self.segments, self.compute_offsets())

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[tuple[str, Any], ...]]:
        """Return the arrays with their names, and the other fields: the structure of this pytree."""
        arrays = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in ("segments", "positions"))
        return arrays, tuple(item for item in vars(self).items() if item[0] not in ("segments", "positions"))

    @classmethod
    def tree_unflatten(cls, rest: tuple[tuple[str, Any], ...], arrays: tuple[Any, Any]) -> "PackedRows":
        """Return the layout of these arrays, which may be JAX's placeholders."""
        layout = object.__new__(cls)
        for name, value in {"segments": arrays[0], "positions": arrays[1], **dict(rest)}.items():
            object.__setattr__(layout, name, value)
        return layout


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, kw_only=True)
class Canvas(PackedRows):
    """The layout of canvases: several examples of any sizes in one dense array, with padding between them.

    The positions of the array, in (t, h, w) order, are the tokens. A convolution keeps examples apart if the padding is
    as wide as its reach, and is set to zero before it.
    """

    size: Grid
    """Number of positions of the array along (t, h, w)."""

    def mask_padding(self, array: Float[Array, "B t h w D"]) -> Float[Array, "B t h w D"]:
        """Return a dense array of features, with zeros where there is no example."""
        return jnp.where(self.to_array(jnp.asarray(self.segments))[..., None] > 0, array, 0)

    def to_array(self, values: Shaped[Array, "B N *rest"]) -> Shaped[Array, "B t h w *rest"]:
        """Return values of positions as a dense array."""
        return values.reshape(values.shape[0], *self.size, *values.shape[2:])

    def from_array(self, array: Shaped[Array, "B t h w *rest"]) -> Shaped[Array, "B N *rest"]:
        """Invert `to_array`."""
        return array.reshape(array.shape[0], self.size.volume, *array.shape[4:])

    def coarsen(self, factor: Grid) -> "Canvas":
        """Return the canvas at a lower resolution, where every `factor` positions become one.

        Examples lie at multiples of `factor`, and their sizes are multiples of it.
        """
        t, h, w = factor
        size = Grid(self.size.t // t, self.size.h // h, self.size.w // w)
        coarse = (self.to_array(jnp.asarray(each))[:, ::t, ::h, ::w] for each in (self.segments, self.positions))
        segments, positions = (each.reshape(each.shape[0], size.volume, *each.shape[4:]) for each in coarse)
        return type(self)(segments=segments, positions=positions, count=self.count, size=size)

    def compute_offsets(self) -> Int[Array, "B N"]:
        """Return the index of every token within its example; 0 for padding."""
        is_member = jnp.asarray(self.segments)[..., None] == jnp.arange(1, self.count + 1)
        rank = jnp.cumsum(is_member, axis=1) - 1
        return jnp.where(is_member, rank, 0).sum(axis=-1)

    def to_rows(self) -> "RowView":
        """Return a view of the canvas as a packed row: one example after the other, then padding."""
        ids = jnp.where(jnp.asarray(self.segments) > 0, self.segments, self.count + 1)
        order = jnp.argsort(ids, axis=1, stable=True)
        segments, positions = (_take(jnp.asarray(each), order) for each in (self.segments, self.positions))
        layout = PackedRows(segments=segments, positions=positions, count=self.count)
        return RowView(layout, order, jnp.argsort(order, axis=1))


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, kw_only=True)
class DenseBatch(Canvas):
    """The layout of dense batches: one example fills the array."""

    def mask_padding(self, array: Float[Array, "B t h w D"]) -> Float[Array, "B t h w D"]:
        """Return the array as it is."""
        return array

    def compute_offsets(self) -> Int[Array, "B N"]:
        """Return the index of every token within its example."""
        return jnp.broadcast_to(jnp.arange(self.size.volume), self.segments.shape)

    def to_rows(self) -> "RowView":
        """Return a view of the batch as packed rows of one example each."""
        return RowView(PackedRows(segments=self.segments, positions=self.positions, count=self.count))


class RowView(NamedTuple):
    """A canvas as a packed row."""

    layout: PackedRows
    order: Int[Array, "B N"] | None = None
    """Canvas position of each token in the row; None if the two orders are the same."""
    inverse: Int[Array, "B N"] | None = None
    """Row token of each position on the canvas."""

    def pack(self, values: Shaped[Array, "B N *rest"]) -> Shaped[Array, "B N *rest"]:
        """Return the row's values, given the canvas's."""
        return values if self.order is None else _take(values, self.order)

    def unpack(self, values: Shaped[Array, "B N *rest"]) -> Shaped[Array, "B N *rest"]:
        """Invert `pack`."""
        return values if self.inverse is None else _take(values, self.inverse)


def _take(values: Shaped[Array, "B N *rest"], indices: Int[Array, "B N"]) -> Shaped[Array, "B N *rest"]:
    return jnp.take_along_axis(values, indices.reshape(*indices.shape, *(1,) * (values.ndim - 2)), axis=1)
