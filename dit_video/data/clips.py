"""Random access to the encoded clips of ingested data sets."""

import bisect
import copy
import itertools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, SupportsIndex, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow_datasets as tfds
from jaxtyping import Bool, Float, Int64

from dit_video.core import rng
from dit_video.core.errors import DecodeError, UserError
from dit_video.core.shared_array import SharesArrays
from dit_video.core.storage import StoragePath, StoragePathLike, to_storage_path
from dit_video.data.records import RecordReader, make_bytes_feature, read_row
from dit_video.data.tables import INDEX_FOLDER, MANIFEST, Table
from dit_video.video.background import BLACK, Colour, parse_colour

DATASET_NAME = KIND = "clips"
FEATURES = {
    "clip": make_bytes_feature(),
    "name": tfds.features.Text(),
    "height": np.int32,
    "width": np.int32,
    "frames": np.int32,
    "fps": np.float32,
    "seconds": np.float32,
    "codec": tfds.features.Text(),
}
"""Features of a record: the bytes of a clip, and facts that do not change. Captions are a column of the table."""
_TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_INFO_BLOCK = 1 << 12
"""Number of clips whose metadata are read at once when all are."""


class ClipInfo(NamedTuple):
    """Metadata of a clip, known without decoding."""

    name: str
    """Path of the clip in the source that was ingested, with forward slashes, followed by `#0`, `#1`, … for the parts
    of a file; unique in the data set."""
    captions: tuple[str, ...]
    """Captions of the clip, in any number; a clip without captions trains the unconditional model."""
    height: int
    """Height as displayed: upright, with square pixels."""
    width: int
    frames: int
    fps: float
    """Average frame rate."""
    seconds: float
    """Time from the first frame to the last, in seconds."""
    split: str = "train"
    id: int = 0
    """Hash of the name, the source file and the part of it that the clip shows; the key of columns."""
    payload: str = ""
    """SHA-256 of the clip's bytes, in hexadecimal."""

    @property
    def caption(self) -> str:
        """Return the first caption; empty if there is none."""
        return self.captions[0] if self.captions else ""


class ClipSource(SharesArrays):
    """A random-access source of the encoded clips of an ingested data set, or of several ones in sequence.

    If there are several data sets, the name of a clip begins with its data set's: `ucf/v_YoYo_g01_c01.avi`. Clips
    are read in place, also from buckets. No files are kept open, so a source can be pickled to workers.

    Args:
      folders: Data set that `ingest` wrote: a folder or an address (`gs://…`, see `core.storage`), or several by name.
      where: Condition on columns that the clips meet, such as `motion > 5 and sharpness > 60`, see `data.where`.
      captions: Columns of captions, with the share of each in training; by default the source's own captions alone.
      background: Colour behind transparent pixels; "random" for another one for each clip and each part of it that is
        read, "file" for the one that a clip's file names.
      cache: Folder of the columns of large data sets; `tables.get_default_cache()` if None.

    Raises:
      MissingError: If a folder does not exist.
      UserError: If a folder is not an ingested data set of this version, or cannot be reached; the condition or the
        background is invalid.
    """

    def __init__(
        self,
        folders: StoragePathLike | Mapping[str, StoragePathLike],
        *,
        where: str = "",
        captions: Mapping[str, float] | None = None,
        background: str = "black",
        cache: str | os.PathLike | None = None,
    ):
        named = {f"{name}/": path for name, path in folders.items()} if isinstance(folders, Mapping) else {"": folders}
        self._captions: dict[str, float] = dict(captions or {"captions": 1.0})
        self._background = parse_background(background)
        self._prefixes: tuple[str, ...] = tuple(named)
        self.tables: tuple[Table, ...] = tuple(
            Table(path, kind=KIND, cache=None if cache is None else Path(cache)) for path in named.values()
        )
        kept = [np.flatnonzero(find_kept(table)) for table in self.tables]
        if where.strip():
            met = (table.select(where) for table in self.tables)
            kept = [np.intersect1d(*pair, assume_unique=True) for pair in zip(kept, met, strict=True)]
        self._set_rows(kept)
        self._readers = tuple(RecordReader(table.folder, FEATURES) for table in self.tables)

    def _set_rows(self, rows: Sequence[Int64[np.ndarray, " _"]]) -> None:
        self.dataset_sizes: tuple[int, ...] = tuple(map(len, rows))
        """Number of clips of each data set."""
        self._all_rows: Int64[np.ndarray, " n"] = np.concatenate(rows)

    @property
    def _rows(self) -> Sequence[Int64[np.ndarray, " _"]]:
        """Return the rows of the clips of each data set, in its table."""
        return np.split(self._all_rows, np.cumsum(self.dataset_sizes)[:-1])

    @property
    def folders(self) -> tuple[StoragePath, ...]:
        """Return the location of each data set."""
        return tuple(table.folder for table in self.tables)

    @property
    def infos(self) -> Sequence[ClipInfo]:
        """Return the metadata of all clips, which are read when they are used."""
        return _ClipInfos(self)

    def __len__(self) -> int:
        return len(self._all_rows)

    def __getitem__(self, index: SupportsIndex) -> bytes:
        """Return the encoded file of a clip, for `dit_video.video.decode`.

        Raises:
          MissingError, UserError: the data set cannot be reached.
          DecodeError: If the clip's record is damaged.
        """
        number, row = self._locate(int(index))
        try:
            return read_row(self._readers[number], self.tables[number], row, DATASET_NAME)["clip"]
        except DecodeError as error:
            table = self.tables[number]
            fix = f"Remove {table.folder}/{INDEX_FOLDER}/{table.get_part(row)}.parquet, and run the ingest again."
            raise DecodeError(f"the record of {self.infos[int(index)].name}: {error}. {fix}") from error

    def get_background(self, index: int, start: int = 0) -> Colour | Literal["file"]:
        """Return the colour behind the transparent pixels of a clip, from frame `start` on; see `video.decode`."""
        if self._background != "random":
            return self._background
        red, green, blue = rng.make_generator(start, "background", self.infos[index].id).integers(256, size=3).tolist()
        return red, green, blue

    def list_contents(self) -> list[str]:
        """Return for each clip what its pixels follow from: the hash of its bytes, and the colour behind them."""
        payloads = self.column("payload")
        if self._background == BLACK:
            return payloads
        pairs = zip(self.tables, self._rows, strict=True)
        are_transparent = [
            # Of data sets of versions that did not look, any clip may be transparent.
            pc.fill_null(table.arrow("transparent"), True).to_numpy()[rows]
            if "transparent" in table.types
            else np.ones(len(rows), bool)
            for table, rows in pairs
        ]
        flags = np.concatenate(are_transparent).tolist()
        return [
            f"{payload} over {self._background}" if is_transparent else payload
            for payload, is_transparent in zip(payloads, flags, strict=True)
        ]

    def column(self, name: str) -> Any:
        """Return a column of all clips: an array of numbers, or a list of other values; `name` is that in `infos`.

        Raises:
          UserError: If a data set has no such column.
        """
        pairs = list(zip(self.tables, self._rows, strict=True))
        if name != "captions" and all(isinstance(table[name], np.ndarray) for table in self.tables):
            return np.concatenate([table[name][rows] for table, rows in pairs])
        values = [self._read_values(table, rows, name) for table, rows in pairs]
        if name == "name":
            return [prefix + each for prefix, part in zip(self._prefixes, values, strict=True) for each in part]
        return list(itertools.chain(*values))

    def read_columns(self, index: int, names: Collection[str]) -> dict[str, Any]:
        """Return the values of a clip in some columns, None where it has none; raises like `column`."""
        number, row = self._locate(index)
        table = self.tables[number]
        return {name: self._read_values(table, np.asarray([row]), name)[0] for name in names}

    def check_columns(self, names: Collection[str]) -> None:
        """Check that every data set has these columns.

        Raises:
          UserError: If one lacks a column; the message has the names of those that exist.
        """
        for table, name in itertools.product(self.tables, names):
            if name not in table.types:
                fix = f"Use one of {', '.join(sorted(table.names))}, or write it by tools/annotate.py."
                raise UserError(f"columns={tuple(names)} is invalid: {table.folder} has no column {name}. {fix}")

    @property
    def versions(self) -> tuple[str, ...]:
        """Return the hash of the table and the columns of each data set."""
        return tuple(table.version for table in self.tables)

    def select_datasets(self, numbers: Collection[int]) -> "ClipSource":
        """Return the clips of the data sets with these numbers; no others are counted by `dataset_sizes`."""
        subset, kept = copy.copy(self), sorted(numbers)
        for name in ("tables", "_prefixes", "_readers"):
            setattr(subset, name, tuple(getattr(self, name)[number] for number in kept))
        subset._set_rows([self._rows[number] for number in kept])
        return subset

    def select_where(self, where: str) -> "ClipSource":
        """Return the clips that meet a condition on columns, see `data.where`; there may be none.

        Raises:
          UserError: If the condition is invalid.
        """
        return self._filter(lambda table, rows: np.isin(rows, table.select(where))) if where.strip() else self

    def select_split(self, name: str) -> "ClipSource":
        """Return the clips of one split; there may be none."""
        return self._filter(lambda table, rows: pc.equal(table.arrow("split").take(rows), name).to_numpy())

    def select(self, names: Collection[str]) -> "ClipSource":
        """Return the clips with these names, in the data set's order.

        Raises:
          UserError: If the source has no clip of some name.
        """
        return self._compress(self._has_name(names))

    def exclude(self, names: Collection[str]) -> "ClipSource":
        """Return all clips but those with these names.

        Raises:
          UserError: If the source has no clip of some name.
        """
        return self._compress(~self._has_name(names))

    def compute_caption_shares(self) -> Float[np.ndarray, " c"] | None:
        """Return the share of every caption among its clip's captions, clip after clip; None if all are equal.

        A clip without captions has one, the empty caption.
        """
        if len(self._captions) == 1:
            return None
        weights = np.asarray(list(self._captions.values()))
        pairs = list(zip(self.tables, self._rows, strict=True))
        counts = np.stack(
            [np.concatenate([_count_texts(table, rows, name) for table, rows in pairs]) for name in self._captions], 1
        )
        used = weights * (counts > 0)
        shares = used / np.maximum(used.sum(axis=1, keepdims=True), np.finfo(float).tiny) / np.maximum(counts, 1)
        is_empty = counts.sum(axis=1, keepdims=True) == 0
        counts, shares = np.hstack([counts, is_empty]), np.hstack([shares, is_empty])
        return np.repeat(shares.ravel(), counts.ravel())

    def _read_values(self, table: Table, rows: Int64[np.ndarray, " n"], name: str) -> list[Any]:
        if name != "captions":
            return table.read_values(name, rows)
        columns = (table.read_values(column, rows) for column in self._captions)
        return [tuple(itertools.chain(*map(_list_texts, each))) for each in zip(*columns, strict=True)]

    def _has_name(self, names: Collection[str]) -> Bool[np.ndarray, " n"]:
        requested = pa.array(sorted(set(names)), pa.string())
        all_names = pa.array(self.column("name"), pa.string())
        if absent := requested.filter(pc.invert(pc.is_in(requested, value_set=all_names))).to_pylist():
            first = ", ".join(absent[:3]) + (", …" if len(absent) > 3 else "")
            examples = ", ".join(all_names[:3].to_pylist())
            raise UserError(
                f"{', '.join(map(str, self.folders))} has no clip named {first} ({len(absent)} of {len(names)} names); "
                f"use names such as {examples}, or check in the ingest report whether the clip was skipped"
            )
        return pc.is_in(all_names, value_set=requested).to_numpy(zero_copy_only=False)

    def _filter(self, is_kept: Callable[[Table, np.ndarray], np.ndarray]) -> "ClipSource":
        kept = [is_kept(table, rows) for table, rows in zip(self.tables, self._rows, strict=True)]
        return self._compress(np.concatenate(kept))

    def _compress(self, is_kept: Bool[np.ndarray, " n"]) -> "ClipSource":
        subset = copy.copy(self)
        parts = np.split(is_kept, np.cumsum(self.dataset_sizes)[:-1])
        subset._set_rows([rows[part] for rows, part in zip(self._rows, parts, strict=True)])
        return subset

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the number of a clip's data set, and its row in the table."""
        ends = list(itertools.accumulate(self.dataset_sizes))
        if not 0 <= index < ends[-1]:
            raise IndexError(index)
        number = bisect.bisect_right(ends, index)
        return number, int(self._rows[number][index - (ends[number - 1] if number else 0)])

    def _read_infos(self, first: int, stop: int) -> Iterator[ClipInfo]:
        """Yield the metadata of clips `first` to `stop` - 1."""
        start = 0
        for table, prefix, rows in zip(self.tables, self._prefixes, self._rows, strict=True):
            part = rows[max(first - start, 0) : max(stop - start, 0)]
            start += len(rows)
            if not len(part):
                continue
            columns = {name: self._read_values(table, part, name) for name in ClipInfo._fields}
            columns["name"] = [prefix + name for name in columns["name"]]
            yield from map(ClipInfo, *columns.values())


class _ClipInfos(Sequence[ClipInfo]):
    """The metadata of the clips of a source, read from its tables when they are used."""

    def __init__(self, source: ClipSource):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> ClipInfo: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ClipInfo, ...]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        index = range(len(self))[index]
        return next(self._source._read_infos(index, index + 1))

    def __iter__(self) -> Iterator[ClipInfo]:
        for first in range(0, len(self), _INFO_BLOCK):
            yield from self._source._read_infos(first, first + _INFO_BLOCK)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(ClipInfo.__eq__, self, other))

    def __repr__(self) -> str:
        return repr(tuple(self))


def parse_background(text: str) -> Colour | Literal["random", "file"]:
    """Return what is behind transparent pixels by its name, see `ClipSource`.

    Raises:
      UserError: If there is no such background.
    """
    if text == "random":
        return "random"
    return "file" if text == "file" else parse_colour(text)


def is_ingested(folder: StoragePathLike) -> bool:
    """Return True for an ingested data set, False for a folder of clips that are not ingested yet.

    Raises:
      UserError: If the address cannot be reached.
    """
    return (to_storage_path(folder) / MANIFEST).is_file()


def find_kept(table: Table) -> Bool[np.ndarray, " n"]:
    """Return which rows are clips that are trained on: kept by the ingest, and chosen by the column `chosen` if any."""
    kept = pc.fill_null(pc.equal(table.arrow("outcome"), "kept"), False)
    if "chosen" in table.types:
        kept = pc.and_(kept, pc.fill_null(table.arrow("chosen"), True))
    return kept.to_numpy()


def _count_texts(table: Table, rows: Int64[np.ndarray, " n"], name: str) -> Int64[np.ndarray, " n"]:
    """Return the number of texts in a column of captions.

    Raises:
      UserError: If the column has other values than texts or lists.
    """
    texts = table.arrow(name)
    if pa.types.is_list(texts.type) or pa.types.is_large_list(texts.type):
        counts = pc.fill_null(pc.list_value_length(texts), 0)
    elif any(is_text(texts.type) for is_text in _TEXT_TYPES):
        counts = pc.is_valid(texts)
    else:
        raise UserError(
            f"captions={name} is invalid: the column has values of type {texts.type}. Use a column of texts."
        )
    return counts.to_numpy()[rows].astype(np.int64)  # rows last, as Arrow takes no rows of views


def _list_texts(texts: str | Sequence[str] | None) -> Sequence[str]:
    return (texts,) if isinstance(texts, str) else texts or ()
