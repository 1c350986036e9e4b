"""Clips that are exported: those that are trained on and meet a condition, each with the path of its file."""

import base64
import itertools
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
from dit_video.data.ingest.formats.listing import MEDIA, SPLITS
from dit_video.data.tables import Table, take_rows

CAPTIONS = "captions"
"""Column of the captions of the source."""
MAX_SHOWN_VALUES = 24
"""Maximum number of numbers of a list that is read by people."""


def find_caption_columns(types: Mapping[str, pa.DataType]) -> tuple[str, ...]:
    """Return the columns of captions: `captions` first, then those of texts or lists of texts named `captions_*`.

    Columns of errors, `captions_*_error`, are none.

    Args:
      types: Types of the columns by name.
    """
    others = (name for name in types if name.startswith(f"{CAPTIONS}_") and not name.endswith("_error"))
    return tuple(name for name in (CAPTIONS, *others) if name in types and is_text(types[name]))


def is_text(type: pa.DataType) -> bool:
    """Return whether values are texts or lists of texts."""
    if pa.types.is_list(type) or pa.types.is_large_list(type):
        type = type.value_type
    return pa.types.is_string(type) or pa.types.is_large_string(type)


def is_list(type: pa.DataType) -> bool:
    """Return whether values are lists, also those of one length."""
    return pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type)


def is_binary(type: pa.DataType) -> bool:
    """Return whether values are bytes."""
    return pa.types.is_binary(type) or pa.types.is_large_binary(type) or pa.types.is_fixed_size_binary(type)


def is_bulky(table: Table, name: str) -> bool:
    """Return whether a column holds bytes, or lists of more than 24 numbers on average, which nobody reads."""
    type = table.types[name]
    if is_binary(type):
        return True
    if not is_list(type) or not (pa.types.is_integer(type.value_type) or pa.types.is_floating(type.value_type)):
        return False
    if pa.types.is_fixed_size_list(type):
        return type.list_size > MAX_SHOWN_VALUES
    if type.value_type in (pa.uint8(), pa.int8()):
        return True
    chunks = [chunk for chunk in table.arrow(name).chunks if len(chunk)]
    values = sum(chunk.offsets[-1].as_py() - chunk.offsets[0].as_py() for chunk in chunks)
    return values > MAX_SHOWN_VALUES * sum(len(chunk) - chunk.null_count for chunk in chunks)


_PLACES = {"file", "offset", "length", "crc32", "outcome", "reason", "transient", "chosen", "why", "id"}
"""Columns that are about the data set's own files, or alike for all that are exported."""
RESERVED = {"file_name", "path", "text", "video", "video_path", "file_path", "caption", "prompt"}
"""Names of columns that an ingest would take for paths and captions."""
_BATCH = 1024
"""Number of clips whose values are read at once."""


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
      UserError: If there is no clip, or a name leads out of the folder.
    """

    clips: StoredClips
    title: str
    """Name of the data set."""
    license: str
    rows: np.ndarray
    """Rows of the table, in ascending order."""
    captions: tuple[str, ...]
    """Columns of captions, which become the captions of a clip in this order."""
    vectors: tuple[str, ...] = ()
    """Columns of vectors and bytes that are written too."""

    @classmethod
    def select(
        cls,
        clips: StoredClips,
        *,
        title: str,
        license: str = "unknown",
        where: str = "",
        splits: Sequence[str] = (),
        captions: Sequence[str] = (),
        vectors: Sequence[str] = (),
    ) -> "ExportContents":
        """Return the clips that are trained on, meet a condition, and are in one of the splits, if any is named.

        Args:
          clips: The data set.
          title: Name of the data set.
          license: License of the clips.
          where: Condition; empty for all clips.
          splits: Splits; all if empty.
          captions: Columns of captions; if empty, `captions` and all columns of texts named `captions_*`.
          vectors: Columns of vectors and bytes that are written too, such as `embedding`.

        Raises:
          UserError: If the condition is invalid, there is no such split or column, or there is no clip.
        """
        table = clips.table
        _check_columns(table, captions, vectors)
        kept = find_kept(table)
        rows = table.select(where) if where.strip() else np.arange(len(table))
        rows = rows[kept[rows]]
        names = np.asarray(take_rows(table.arrow("split"), rows).to_pylist(), object)
        if unknown := sorted(set(splits) - set(table.arrow("split").unique().to_pylist())):
            raise UserError(f"splits={unknown[0]} is invalid: no clip is in it. Use splits of the data set.")
        rows = rows[np.isin(names, list(splits))] if splits else rows
        if not len(rows):
            raise UserError(f"where={where!r} selects no clip of {table.folder}. Use a wider condition.")
        return cls(clips, title, license, rows, tuple(captions) or find_caption_columns(table.types), tuple(vectors))

    @property
    def columns(self) -> list[str]:
        """Return the names of the columns that are written besides path and captions.

        Columns of vectors and bytes, and captions that were not chosen, are left out.
        """
        table = self.clips.table
        unused = {CAPTIONS, *find_caption_columns(table.types)} - ({*self.captions} - {CAPTIONS})
        names = [name for name in table.names if name not in _PLACES | unused]
        return [name for name in names if name in self.vectors or not is_bulky(table, name)]

    @property
    def splits(self) -> list[str]:
        """Return the splits that have clips: train, validation and test first."""
        names = set(self.read_column("split"))
        return sorted(
            names, key=lambda name: (list(SPLITS.values()).index(name) if name in SPLITS.values() else 99, name)
        )

    def read_column(self, name: str) -> list[Any]:
        """Return the values of a column."""
        return self.take(name, self.rows).to_pylist()

    def take(self, name: str, rows: np.ndarray) -> pa.ChunkedArray:
        """Return rows of a column, which are in ascending order."""
        return take_rows(self.clips.table.arrow(name), rows)

    def iter_captions(self) -> Iterator[tuple[str, ...]]:
        """Yield the captions of each clip: those of all columns, without repeated ones."""
        for rows in self._iter_batches():
            yield from self._read_captions(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ExportedClip]:
        """Yield the clips in the order of the table."""
        names, types = self.columns, self.clips.table.types
        hashes = {name for name in names if pa.uint64() in (types[name], getattr(types[name], "value_type", None))}
        for rows in self._iter_batches():
            columns = {name: self.take(name, rows).to_pylist() for name in names}
            for index, (row, captions) in enumerate(zip(rows, self._read_captions(rows), strict=True)):
                values = {name: _to_json(column[index], is_hash=name in hashes) for name, column in columns.items()}
                content = self.clips.read(int(row))
                path = make_path(values["name"], content)
                values = {f"{name}_column" if name in RESERVED else name: value for name, value in values.items()}
                yield ExportedClip(int(row), values["name"], values["split"], captions, content, path, values)

    def _iter_batches(self) -> Iterator[np.ndarray]:
        for first in range(0, len(self.rows), _BATCH):
            yield self.rows[first : first + _BATCH]

    def _read_captions(self, rows: np.ndarray) -> list[tuple[str, ...]]:
        columns = [self.take(name, rows).to_pylist() for name in self.captions]
        if not columns:
            return [()] * len(rows)
        clips = []
        for values in zip(*columns, strict=True):
            lists = (value if isinstance(value, list) else [value] for value in values)
            clips.append(tuple(dict.fromkeys(text for text in itertools.chain(*lists) if text)))
        return clips


class WrittenFiles(NamedTuple):
    """Files of an export, as a data card tells of them."""

    patterns: Mapping[str, Sequence[str]]
    """Patterns of the files of each split."""
    features: Sequence[Mapping[str, Any]] = ()
    """Types of the fields as Hugging Face writes them; none if its readers find them in the files."""


class PathRegister:
    """The paths of an export: no two are equal, even where upper and lower case are alike."""

    def __init__(self) -> None:
        self._paths: set[str] = set()

    def choose(self, path: str) -> str:
        """Return the path of a clip's file or, if another clip has it, one with a number before its suffix."""
        (stem, suffix), chosen = posixpath.splitext(path), path
        for number in itertools.count(2):
            if chosen.lower() not in self._paths:
                break
            chosen = f"{stem}_{number}{suffix}"
        self._paths.add(chosen.lower())
        return chosen


def make_path(name: str, content: bytes) -> str:
    """Return the path of a clip's file.

    Raises:
      UserError: If the name leads out of the folder.
    """
    file, mark, part = name.partition("#")
    parts = file.split("/")
    if name.startswith("/") or ".." in parts or "\0" in name or not parts[-1]:
        raise UserError(f"the clip's name {name!r} is no path inside of a folder. Leave it out: --where 'name != …'.")
    stem, suffix = posixpath.splitext(file)
    if mark or suffix.lower() not in MEDIA:
        return f"{stem if suffix.lower() in MEDIA else file}{mark}{part}{detect_media_type(content).suffix}"
    return name


def _check_columns(table: Table, captions: Sequence[str], vectors: Sequence[str]) -> None:
    for option, names in {"captions": captions, "vectors": vectors}.items():
        if unknown := [name for name in names if name not in table.types]:
            raise UserError(f"{option}={unknown[0]} is invalid: there is no such column. Use {', '.join(table.names)}.")
    if wrong := [name for name in captions if not is_text(table.types[name])]:
        known = ", ".join(find_caption_columns(table.types))
        raise UserError(f"captions={wrong[0]} is invalid: it holds no texts. Use columns of captions: {known}.")


def _to_json(value: Any, *, is_hash: bool) -> Any:
    """Return a value as JSON; hashes as texts, as many readers have no integers of 64 bits without a sign.

    Bytes are in base64.
    """
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, np.floating):  # of columns of 16 bits
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [_to_json(each, is_hash=is_hash) for each in value]
    is_json = isinstance(value, str | float | bool | None) or (isinstance(value, int) and not is_hash)
    return value if is_json else str(value)
