"""Overlapping tiles of a picture, and the weights that blend them: they sum to one everywhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from dit_video.core.errors import UserError
from dit_video.tokens import Grid


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a picture that does not fit is cut: sizes in pixels, multiples of the autoencoder's spatial stride.

    What a tile does not see beyond its border changes its pixels there, which the blend spreads over the overlap. The
    wider the overlap, the smaller the difference from the whole picture; `tiling_error` measures it.

    Raises:
      UserError: a tile that is not larger than twice its overlap.
    """

    height: int
    width: int
    overlap: int

    def __post_init__(self):
        if self.overlap < 0 or min(self.height, self.width) <= 2 * self.overlap:
            raise UserError(
                f"tiles of {self.height}x{self.width} pixels overlap by {self.overlap}; use less than half a side"
            )


class Tile(NamedTuple):
    """One tile, in latent positions."""

    row: int
    column: int
    height: int
    width: int


def cut(height: int, width: int, tiles: Tiles | None, stride: Grid) -> list[Tile]:
    """The tiles of a picture of `height` by `width` latent positions: all of one size, the whole picture if None.

    Raises:
      UserError: tiles that the stride does not divide.
    """
    if tiles is None:
        return [Tile(0, 0, height, width)]
    for name, length, step in (
        ("height", tiles.height, stride.h),
        ("width", tiles.width, stride.w),
        ("overlap", tiles.overlap, stride.h),
        ("overlap", tiles.overlap, stride.w),
    ):
        if length % step:
            raise UserError(f"the tiles' {name} {length} is not divisible by the spatial stride {step}")
    rows = _starts(height, tiles.height // stride.h, tiles.overlap // stride.h)
    columns = _starts(width, tiles.width // stride.w, tiles.overlap // stride.w)
    size = min(height, tiles.height // stride.h), min(width, tiles.width // stride.w)
    return [Tile(row, column, *size) for row in rows for column in columns]


def weights(tiles: Sequence[Tile], tile: Tile, scale: tuple[int, int] = (1, 1)) -> Float32[np.ndarray, "H W"]:
    """How much a tile counts at each of its pixels, `scale` pixels (rows, columns) to a latent position.

    Linear ramps over the overlaps with the neighbours (as in diffusers' tiled autoencoders), one elsewhere.
    """
    rows = _ramp(sorted({other.row for other in tiles}), tile.row, tile.height, scale[0])
    columns = _ramp(sorted({other.column for other in tiles}), tile.column, tile.width, scale[1])
    return rows[:, None] * columns[None]


def _starts(length: int, size: int, overlap: int) -> list[int]:
    """Where tiles begin; the last one ends at the border."""
    if length <= size:
        return [0]
    count = -(-(length - overlap) // (size - overlap))
    return [min(index * (size - overlap), length - size) for index in range(count)]


def _ramp(starts: Sequence[int], start: int, size: int, scale: int) -> Float32[np.ndarray, " n"]:
    """The share of the tile at `start` among all tiles along one axis."""

    def tent(first: int) -> np.ndarray:
        """Rises from each border inwards; what tiles have beyond the overlap is cut by the share."""
        place = np.arange(start * scale, (start + size) * scale) - first * scale
        inside = (place >= 0) & (place < size * scale)
        return np.where(inside, np.minimum(place + 0.5, size * scale - place - 0.5), 0.0)

    total = sum(tent(first) for first in starts)
    return (tent(start) / total).astype(np.float32)
