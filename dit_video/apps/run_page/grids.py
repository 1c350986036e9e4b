"""Grids of samples and reconstructions that a run has written, by step: the only files that the page serves."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.experiment.monitors import TILES_FILE

KINDS = ("samples", "reconstructions")
"""Names of folders of grids in the folder of a training."""
_FILE = re.compile(r"(\d{1,12})\.(mp4|webm|png|gif|apng)")
"""Name of a grid: its step and format. Files that are being written have other names."""
_MAX_TILES, _MAX_TEXT = 64, 300
"""Maximum number of tiles, and of characters of their texts, that the page shows."""


class GridTile(NamedTuple):
    """A clip in a grid."""

    text: str
    """Prompt, or name of the clip."""
    left: int
    """Distance from the grid's left edge in pixels."""
    top: int
    """Distance from the grid's upper edge in pixels."""


class GridFile(NamedTuple):
    """A grid of one step."""

    step: int
    path: Path
    version: int
    """Time of its last change in nanoseconds; another step's grid never has the same name."""

    @property
    def is_video(self) -> bool:
        """Return whether it is shown as a video rather than as an image."""
        return self.path.suffix in (".mp4", ".webm")


@dataclass(frozen=True, kw_only=True)
class GridSeries:
    """Grids of the same clips at several steps of a training."""

    training: str
    """Name of the training."""
    kind: str
    """One of `KINDS`."""
    files: tuple[GridFile, ...]
    """Grids by step; at least one."""
    size: tuple[int, int] | None
    """Height and width of a grid in pixels; None if it is not known where its clips lie."""
    tile_size: tuple[int, int]
    """Height and width of a clip in pixels."""
    tiles: tuple[GridTile, ...]
    """Clips of a grid; none if it is not known where they lie."""

    def get_url(self, file: GridFile) -> str:
        """Return the address of a grid."""
        return f"/run/media/{self.training}/{self.kind}/{file.path.name}?v={file.version}"


def list_grids(run: Path, training: str) -> tuple[GridSeries, ...]:
    """Return the grids that a training has written.

    Args:
      run: folder of the run, outside of which no file is listed.
      training: name of the training's folder in it.
    """
    series = (_list_series(run, training, kind) for kind in KINDS)
    return tuple(each for each in series if each is not None)


def _list_series(run: Path, training: str, kind: str) -> GridSeries | None:
    folder, root = run / training / kind, run.resolve()
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        return None
    files = []
    for path in paths:
        match = _FILE.fullmatch(path.name)
        try:
            if match is None or not path.is_file() or not path.resolve().is_relative_to(root):
                continue
            files.append(GridFile(int(match[1]), path, path.stat().st_mtime_ns))
        except OSError:  # it was just removed
            continue
    if not files:
        return None
    size, tile_size, tiles = _read_tiles(folder / TILES_FILE)
    return GridSeries(
        training=training, kind=kind, files=tuple(sorted(files)), size=size, tile_size=tile_size, tiles=tiles
    )


def _read_tiles(path: Path) -> tuple[tuple[int, int] | None, tuple[int, int], tuple[GridTile, ...]]:
    """Return the sizes of grid and tile, and the tiles; none of a file that is missing or invalid."""
    try:
        document: Mapping[str, Any] = read_json(path)
        sizes = [int(document[name]) for name in ("height", "width", "tile_height", "tile_width")]
        tiles = tuple(
            GridTile(str(each["text"])[:_MAX_TEXT], int(each["left"]), int(each["top"]))
            for each in document["tiles"][:_MAX_TILES]
        )
    except (UserError, OSError, ValueError, TypeError, KeyError, OverflowError):
        return None, (1, 1), ()
    if min(sizes) < 1 or any(min(tile.left, tile.top) < 0 for tile in tiles):
        return None, (1, 1), ()
    return (sizes[0], sizes[1]), (sizes[2], sizes[3]), tiles
