"""Overlapping tiles of a picture, and the weights that blend them, which sum to one everywhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from dit_video.core.errors import UserError
from dit_video.tokens import Grid


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of the tiles of a picture that does not fit in memory, in multiples of the autoencoder's spatial stride.

    A tile does not see pixels beyond its border, which changes its own pixels there; blending spreads the difference
    over the overlap. It is smaller for larger overlaps; `measure_tiling_error` computes it.

    Raises:
      UserError: a tile that is not larger than twice its overlap.
    """

    height: int
    """Height of a tile in pixels."""
    width: int
    """Width of a tile in pixels."""
    overlap: int
    """Pixels shared by neighbouring tiles."""

    def __post_init__(self):
        if self.overlap < 0 or min(self.height, self.width) <= 2 * self.overlap:
            raise UserError(
                f"overlap={self.overlap} is invalid for tiles of {self.height}x{self.width} pixels: use less than half "
                "a side"
            )


class Tile(NamedTuple):
    """The position and size of a tile, in latent positions."""

    row: int
    column: int
    height: int
    width: int


def cut_tiles(height: int, width: int, tiles: Tiles | None, stride: Grid) -> list[Tile]:
    """Return the tiles of a picture of `height` by `width` latent positions: all of one size, one tile if None.

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
            raise UserError(f"the tiles' {name} {length} is not divisible by the spatial stride {step}; use a multiple")
    rows = _compute_starts(height, tiles.height // stride.h, tiles.overlap // stride.h)
    columns = _compute_starts(width, tiles.width // stride.w, tiles.overlap // stride.w)
    size = min(height, tiles.height // stride.h), min(width, tiles.width // stride.w)
    return [Tile(row, column, *size) for row in rows for column in columns]


def compute_blend_weights(
    tiles: Sequence[Tile], tile: Tile, scale: tuple[int, int] = (1, 1)
) -> Float32[np.ndarray, "H W"]:
    """Return the blend weight of each pixel of a tile, with `scale` pixels (rows, columns) per latent position.

    Linear ramps over the overlaps with neighbours (as in diffusers' tiled autoencoders), one elsewhere.
    """
    rows = _compute_ramp(sorted({other.row for other in tiles}), tile.row, tile.height, scale[0])
    columns = _compute_ramp(sorted({other.column for other in tiles}), tile.column, tile.width, scale[1])
    return rows[:, None] * columns[None]


def _compute_starts(length: int, size: int, overlap: int) -> list[int]:
    """Return the first positions of tiles; the last tile ends at the border."""
    if length <= size:
        return [0]
    count = -(-(length - overlap) // (size - overlap))
    return [min(index * (size - overlap), length - size) for index in range(count)]


def _compute_ramp(starts: Sequence[int], start: int, size: int, scale: int) -> Float32[np.ndarray, " n"]:
    """Return the normalised weights along one axis of the tile at `start`."""
    offsets = np.arange(start * scale, (start + size) * scale) - scale * np.asarray(starts)[:, None]
    inside = (offsets >= 0) & (offsets < size * scale)
    # They rise linearly from both borders of each tile; dividing by the sum keeps only the overlap's ramp.
    tents = np.where(inside, np.minimum(offsets + 0.5, size * scale - offsets - 0.5), 0.0)
    return (tents[list(starts).index(start)] / tents.sum(0)).astype(np.float32)
