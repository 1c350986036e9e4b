"""Clips that are exported: those that are trained on and meet a condition, each with the path of its file."""

import math
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from dit_video.core.errors import UserError
from dit_video.curation.export.stored_clips import StoredClips, detect_media_type
from dit_video.data.clips import find_kept
from dit_video.data.ingest.formats.types import MEDIA, SPLITS

_PLACES = {"file", "offset", "length", "crc32", "outcome", "reason", "transient", "chosen", "why", "captions", "id"}
"""Columns that are about the data set's own files, or alike for all that are exported."""
RESERVED = {"file_name", "path", "text", "video", "video_path", "file_path", "caption", "prompt"}
"""Names of columns that an ingest would take for paths and captions."""
_BATCH = 256


class ExportedClip(NamedTuple):
    """A clip, and what is written of it."""

    row: int
    """Number of its row in the table."""
    name: str
    split: str
    captions: tuple[str, ...]
    content: bytes
    """Encoded file."""
    path: str
    """Path of its file: its name; that of a part of a file, `a.mp4#3`, is `a#3.mp4`."""
    values: Mapping[str, Any]
    """Values of the other columns as JSON: None if missing."""


@dataclass(frozen=True, eq=False)
class ExportContents:
    """The clips of an export, which are read when they are used.

    Raises:
      UserError: there is no clip, or a name leads out of the folder.
    """

    clips: StoredClips
    title: str
    """Name of the data set."""
    license: str
    rows: np.ndarray
    """Rows of the table."""

    @classmethod
    def select(
        cls, clips: StoredClips, *, title: str, license: str = "unknown", where: str = "", splits: Sequence[str] = ()
    ) -> "ExportContents":
        """Return the clips that are trained on, meet a condition, and are in one of the splits, if any is named.

        Raises:
          UserError: the condition is invalid, there is no such split, or there is no clip.
        """
        table = clips.table
        kept = find_kept(table)
        rows = table.select(where) if where.strip() else np.arange(len(table))
        rows = rows[kept[rows]]
        names = np.asarray(table.arrow("split").take(pa.array(rows)).to_pylist(), object)
        if unknown := sorted(set(splits) - set(table.arrow("split").unique().to_pylist())):
            raise UserError(f"splits={unknown[0]} is invalid: no clip is in it. Use splits of the data set.")
        rows = rows[np.isin(names, list(splits))] if splits else rows
        if not len(rows):
            raise UserError(f"where={where!r} selects no clip of {table.folder}. Use a wider condition.")
        return cls(clips, title, license, rows)

    @property
    def columns(self) -> list[str]:
        """Return the names of the columns that are written besides path and captions."""
        return [name for name in self.clips.table.names if name not in _PLACES]

    @property
    def splits(self) -> list[str]:
        """Return the splits that have clips: train, validation and test first."""
        names = set(self.read_column("split"))
        return sorted(
            names, key=lambda name: (list(SPLITS.values()).index(name) if name in SPLITS.values() else 99, name)
        )

    def read_column(self, name: str) -> list[Any]:
        """Return the values of a column."""
        return self.clips.table.arrow(name).take(pa.array(self.rows)).to_pylist()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ExportedClip]:
        """Yield the clips in the order of the table."""
        table, names = self.clips.table, [*self.columns, *({"captions"} & set(self.clips.table.names))]
        hashes = {
            name for name in names if pa.uint64() in (table.types[name], getattr(table.types[name], "value_type", None))
        }
        for first in range(0, len(self.rows), _BATCH):
            rows = self.rows[first : first + _BATCH]
            columns = {name: table.arrow(name).take(pa.array(rows)).to_pylist() for name in names}
            for index, row in enumerate(rows):
                values = {name: _to_json(column[index], is_hash=name in hashes) for name, column in columns.items()}
                captions = tuple(values.pop("captions", None) or ())
                content = self.clips.read(int(row))
                path = make_path(values["name"], content)
                values = {f"{name}_column" if name in RESERVED else name: value for name, value in values.items()}
                yield ExportedClip(int(row), values["name"], values["split"], captions, content, path, values)


class WrittenFiles(NamedTuple):
    """Files of an export, as a data card tells of them."""

    patterns: Mapping[str, Sequence[str]]
    """Patterns of the files of each split."""
    features: Sequence[Mapping[str, Any]] = ()
    """Types of the fields as Hugging Face writes them; none if its readers find them in the files."""


class PathRegister:
    """The paths of an export, of which no two are equal, even where upper and lower case are alike."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def add(self, path: str, name: str) -> None:
        """Note the path of a clip.

        Raises:
          UserError: another clip has it.
        """
        other = self._names.setdefault(path.lower(), name)
        if other != name:
            raise UserError(
                f"the clips {other!r} and {name!r} would have the same file {path}. Export them apart: "
                f'--where "name != {name!r}".'
            )


def make_path(name: str, content: bytes) -> str:
    """Return the path of a clip's file.

    Raises:
      UserError: the name leads out of the folder.
    """
    file, mark, part = name.partition("#")
    parts = file.split("/")
    if name.startswith("/") or ".." in parts or "\0" in name or not parts[-1]:
        raise UserError(f"the clip's name {name!r} is no path inside of a folder. Leave it out: --where 'name != …'.")
    stem, suffix = posixpath.splitext(file)
    if mark or suffix.lower() not in MEDIA:
        return f"{stem if suffix.lower() in MEDIA else file}{mark}{part}{detect_media_type(content).suffix}"
    return name


def _to_json(value: Any, *, is_hash: bool) -> Any:
    """Return a value as JSON; hashes as texts, as many readers have no integers of 64 bits without a sign."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [_to_json(each, is_hash=is_hash) for each in value]
    is_json = isinstance(value, str | float | bool | None) or (isinstance(value, int) and not is_hash)
    return value if is_json else str(value)
