"""Shapes of layouts: how much a row, a canvas or a dense array holds, and where examples lie in it."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from dit_video.core.errors import UserError
from dit_video.core.grid import Grid
from dit_video.tokens.layouts import Canvas, DenseBatch, PackedRows
from dit_video.tokens.positions import infer_grid

TokenIndices = slice | Int[np.ndarray, " _"]
"""Where an example's tokens lie in a row."""


class LayoutShape(abc.ABC):
    """The capacity of one row, canvas or dense array: it fixes the shapes of a batch, and so the compiled program."""

    tokens: int
    """Number of video tokens, padding included (N)."""
    text: int
    """Maximum number of text tokens (S)."""
    segments: int
    """Maximum number of clips (G)."""

    @abc.abstractmethod
    def fits(self, grids: Sequence[Grid], texts: Sequence[int]) -> bool:
        """Return True if examples of these sizes, in tokens, fit together."""

    @abc.abstractmethod
    def place(self, positions: Sequence[Float32[np.ndarray, "_ 3"]]) -> list[TokenIndices]:
        """Return where the tokens of each example lie, from the positions of the examples' tokens.

        Raises:
          UserError: If the examples do not fit.
        """

    @abc.abstractmethod
    def make_layout(self, segments: Any, positions: Any) -> PackedRows:
        """Return the layout of a row with these segment ids and positions."""

    @abc.abstractmethod
    def enlarge(self, grid: Grid) -> "LayoutShape":
        """Return the shape for a single example of this size, which is larger than this shape."""

    def pad_tokens(self, multiple: int) -> "LayoutShape":
        """Return the shape, padded so that `multiple` devices can share the tokens; a dense array is not padded."""
        return self


@dataclass(frozen=True, kw_only=True)
class PackedShape(LayoutShape):
    """Capacity of a packed row."""

    tokens: int
    """Maximum number of video tokens (N)."""
    text: int
    """Maximum number of text tokens (S)."""
    segments: int
    """Maximum number of clips (G)."""

    def fits(self, grids: Sequence[Grid], texts: Sequence[int]) -> bool:
        has_room = sum(grid.volume for grid in grids) <= self.tokens and sum(texts) <= self.text
        return has_room and len(grids) <= self.segments

    def place(self, positions: Sequence[Float32[np.ndarray, "_ 3"]]) -> list[TokenIndices]:
        ends = np.cumsum([len(each) for each in positions]).tolist()
        return [slice(end - len(each), end) for each, end in zip(positions, ends, strict=True)]

    def make_layout(self, segments: Any, positions: Any) -> PackedRows:
        return PackedRows(segments=segments, positions=positions, count=self.segments)

    def enlarge(self, grid: Grid) -> "PackedShape":
        return PackedShape(tokens=grid.volume, text=self.text, segments=self.segments)

    def pad_tokens(self, multiple: int) -> "PackedShape":
        return replace(self, tokens=self.tokens + -self.tokens % multiple)


@dataclass(frozen=True, kw_only=True)
class CanvasShape(LayoutShape):
    """Capacity of a canvas, on which clips of several sizes lie apart from each other.

    Raises:
      UserError: If the cells do not divide the canvas, a size is below 1, or the padding is negative.
    """

    size: Grid
    """Positions of the latents along (t, h, w)."""
    text: int
    """Maximum number of text tokens (S)."""
    segments: int
    """Maximum number of clips (G)."""
    cell: Grid
    """Unit of the clips' sizes and places: the backbone's `size_multiple`."""
    padding: Grid
    """Minimum number of positions between two clips: the backbone's `canvas_padding`."""

    def __post_init__(self):
        if (
            min(*self.cell, *self.size) < 1
            or min(self.padding) < 0
            or any(side % unit for side, unit in zip(self.size, self.cell, strict=True))
        ):
            raise UserError(
                f"size={tuple(self.size)}, padding={tuple(self.padding)} is invalid: sides must be multiples of "
                f"cell={tuple(self.cell)}, and positive, and padding not negative. Use such a size."
            )

    @property
    def tokens(self) -> int:  # type: ignore[override]
        return self.size.volume

    def fits(self, grids: Sequence[Grid], texts: Sequence[int]) -> bool:
        is_counted = len(grids) <= self.segments and sum(texts) <= self.text
        return is_counted and self.find_corners(grids) is not None

    def place(self, positions: Sequence[Float32[np.ndarray, "_ 3"]]) -> list[TokenIndices]:
        grids = [infer_grid(each) for each in positions]
        if (corners := self.find_corners(grids)) is None:
            sizes = ", ".join(map(str, grids))
            raise UserError(
                f"clips of {sizes} do not fit a canvas of {self.size} with padding of {self.padding} between them; use "
                "a larger canvas or fewer clips"
            )
        all_indices = np.arange(self.size.volume).reshape(self.size)
        return [
            all_indices[tuple(slice(start, start + side) for start, side in zip(corner, grid, strict=True))].reshape(-1)
            for corner, grid in zip(corners, grids, strict=True)
        ]

    def find_corners(self, grids: Sequence[Grid]) -> list[Grid] | None:
        """Return the first position of every clip; None if they do not fit.

        Raises:
          UserError: If a side of a clip is not a multiple of `cell`.
        """
        corners, fill = [Grid(0, 0, 0)] * len(grids), CanvasFill(self)
        for index in sort_grids(grids):
            if (corner := fill.add(grids[index])) is None:
                return None
            corners[index] = corner
        return corners

    def make_layout(self, segments: Any, positions: Any) -> Canvas:
        return Canvas(segments=segments, positions=positions, count=self.segments, size=self.size)

    def enlarge(self, grid: Grid) -> "DenseShape":
        return DenseShape(size=grid, text=self.text)


class CanvasFill:
    """A canvas that is filled clip by clip, in the order of `sort_grids`.

    Clips are put into columns, in which they follow one another in time; columns stand on shelves: first fit by
    decreasing height (Coffman et al., SIAM J. Comput. 9(4), 1980). A clip never moves once it is placed.
    """

    def __init__(self, shape: CanvasShape):
        self._shape = shape
        self._shelves: list[_Shelf] = []

    def add(self, grid: Grid) -> Grid | None:
        """Add a clip, and return its first position; None if there is no room.

        Raises:
          UserError: If a side of the clip is not a multiple of the canvas's `cell`.
        """
        size, cell = self._shape.size, self._shape.cell
        if any(side % unit for side, unit in zip(grid, cell, strict=True)):
            raise UserError(
                f"a clip of {tuple(grid)} positions is invalid: its sides must be multiples of cell={tuple(cell)}. "
                "Use other clip sizes, or a backbone that divides less."
            )
        for shelf in self._shelves:
            for column in shelf.columns if grid.h <= shelf.height else ():
                if grid.h <= column.height and grid.w <= column.width and column.next_frame + grid.t <= size.t:
                    return self._stack(shelf, column, grid)
        for shelf in self._shelves:
            if grid.h <= shelf.height and shelf.next_column + grid.w <= size.w and grid.t <= size.t:
                return self._open_column(shelf, grid)
        top = self._get_next(1, self._shelves[-1].top + self._shelves[-1].height) if self._shelves else 0
        if top + grid.h > size.h or grid.w > size.w or grid.t > size.t:
            return None
        self._shelves.append(_Shelf(top, grid.h))
        return self._open_column(self._shelves[-1], grid)

    def _open_column(self, shelf: "_Shelf", grid: Grid) -> Grid:
        column = _Column(shelf.next_column, grid.h, grid.w)
        shelf.columns.append(column)
        shelf.next_column = self._get_next(2, column.left + grid.w)
        return self._stack(shelf, column, grid)

    def _stack(self, shelf: "_Shelf", column: "_Column", grid: Grid) -> Grid:
        corner = Grid(column.next_frame, shelf.top, column.left)
        column.next_frame = self._get_next(0, corner.t + grid.t)
        return corner

    def _get_next(self, axis: int, end: int) -> int:
        """Return the first place along an axis for a clip that follows one ending at `end`."""
        unit = self._shape.cell[axis]
        return -(-(end + self._shape.padding[axis]) // unit) * unit


@dataclass(eq=False)
class _Column:
    left: int
    height: int
    width: int
    next_frame: int = 0


@dataclass(eq=False)
class _Shelf:
    top: int
    height: int
    next_column: int = 0
    columns: list[_Column] = field(default_factory=list)


def sort_grids(grids: Sequence[Grid]) -> list[int]:
    """Return the indices of clips in the order in which they are placed: the tallest first."""
    return sorted(range(len(grids)), key=lambda index: (-grids[index].h, -grids[index].w, -grids[index].t, index))


@dataclass(frozen=True, kw_only=True)
class DenseShape(LayoutShape):
    """Capacity of a dense array, which one clip fills."""

    size: Grid
    """Size of the clip in positions along (t, h, w)."""
    text: int
    """Maximum number of text tokens (S)."""
    segments = 1

    @property
    def tokens(self) -> int:  # type: ignore[override]
        return self.size.volume

    def fits(self, grids: Sequence[Grid], texts: Sequence[int]) -> bool:
        return len(grids) <= 1 and all(grid == self.size for grid in grids) and sum(texts) <= self.text

    def place(self, positions: Sequence[Float32[np.ndarray, "_ 3"]]) -> list[TokenIndices]:
        for each in positions:
            if (grid := infer_grid(each)) != self.size:
                raise UserError(f"a clip of {grid} does not fill an array of {self.size}; use a clip of that size")
        return [slice(0, self.tokens)] * len(positions)

    def make_layout(self, segments: Any, positions: Any) -> DenseBatch:
        return DenseBatch(segments=segments, positions=positions, count=1, size=self.size)

    def enlarge(self, grid: Grid) -> "DenseShape":
        return DenseShape(size=grid, text=self.text)
