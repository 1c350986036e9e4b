"""Tables of data sets: a row for each clip, in columns to which anyone may add further ones at any time.

table.json                   kind and settings of the data set, and its parts with their hashes; it is written last
index/train-00000.parquet    rows of a part, written once
columns/NAME.parquet         further columns, by the column `id` or `name` of the rows that they are about

A column is read when it is first used. Columns of large tables are stored in a cache folder as Arrow files, which all
processes of a machine map into memory, and a table is pickled to workers without them.
"""

import bisect
import contextlib
import hashlib
import itertools
import json
import operator
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int32, Int64

from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import atomic_path
from dit_video.core.shared_array import SharesArrays
from dit_video.core.storage import (
    StoragePath,
    StoragePathLike,
    convert_storage_errors,
    download,
    get_default_cache,
    read_document,
    read_range,
    to_storage_path,
    upload,
    write_document,
)
from dit_video.data import where as conditions

MANIFEST, INDEX_FOLDER, COLUMNS_FOLDER = "table.json", "index", "columns"
VERSION = 3
SUFFIX = ".parquet"
BATCH_ROWS = 1 << 14
"""Number of rows that are read at once."""
_THREADS = 16
_HASH_KEY = b"sha256"


def compute_row_id(*parts: str | int) -> int:
    """Return the identity of a row, 64 bits of a hash of what identifies it, such as its name."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "little")


def write_part(folder: StoragePath, name: str, rows: pa.Table) -> None:
    """Write the rows of a part atomically; the same rows give the same bytes."""
    write_parquet(folder / INDEX_FOLDER / f"{name}{SUFFIX}", rows)


def write_column(folder: StoragePathLike, name: str, columns: Mapping[str, Any] | pa.Table, note: str = "") -> None:
    """Write `columns/NAME.parquet` atomically; it replaces an older one.

    Args:
      folder: The data set.
      name: Name of the file.
      columns: Values by name, among them the key `id` or `name`; rows that are not named have no value.
      note: What the values depend on, such as the version of a model; see `get_note`.

    Raises:
      UserError: If there is no key, a row is named twice, or a column has another number of values.
    """
    try:
        table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    except pa.ArrowException as error:
        raise UserError(f"columns of {name} are invalid: {error}. Use as many values as keys.") from error
    keys = [key for key in ("id", "name") if key in table.column_names]
    if not keys:
        raise UserError(f"columns={table.column_names} of {name} are invalid: add the key `id` or `name` of each row.")
    key = table[keys[0]]
    if len(pc.unique(key)) != len(key):
        counts = pc.value_counts(key)
        first = next(each for each in counts if each["counts"].as_py() > 1)["values"]
        raise UserError(f"{keys[0]}={first} of the column {name} is there more than once. Give each row one value.")
    # In parts of one size, whatever the chunks of before: the texts of all rows may be too long for one.
    starts = range(0, len(table), BATCH_ROWS)
    parts = [table.slice(first, BATCH_ROWS).take(np.arange(min(BATCH_ROWS, len(table) - first))) for first in starts]
    table = pa.concat_tables([table.slice(0, 0), *parts])
    digest = hashlib.sha256(repr(table.schema).encode() + note.encode())
    for part in parts:
        for batch in part.to_batches():
            digest.update(batch.serialize())
    metadata = {_HASH_KEY: digest.hexdigest().encode(), b"note": note.encode()}
    write_parquet(to_storage_path(folder) / COLUMNS_FOLDER / f"{name}{SUFFIX}", table.replace_schema_metadata(metadata))


def get_note(schema: pa.Schema) -> str:
    """Return the note in the schema of a file that `write_column` wrote; empty if there is none."""
    return (schema.metadata or {}).get(b"note", b"").decode()


def write_manifest(folder: StoragePath, kind: str, settings: Mapping[str, Any], parts: Sequence[str]) -> None:
    """Write `table.json`, which makes parts that exist a table.

    Args:
      folder: The data set.
      kind: Kind of the data set, such as "clips".
      settings: JSON values.
      parts: Names of the parts, in the order of their rows.
    """

    def describe(name: str) -> dict[str, Any]:
        content = read_bytes(folder / INDEX_FOLDER / f"{name}{SUFFIX}")
        rows = pq.ParquetFile(pa.BufferReader(content)).metadata.num_rows
        return {"name": name, "rows": rows, "sha256": hashlib.sha256(content).hexdigest()}

    described = map_threads(describe, parts)
    if isinstance(folder, Path):  # of processes that were killed
        for path in (*folder.glob(".*.partial.array_record"), *(folder / INDEX_FOLDER).glob(f".*.partial{SUFFIX}")):
            path.unlink(missing_ok=True)
    write_document(folder / MANIFEST, {"version": VERSION, "kind": kind, "settings": settings, "parts": described})


def read_manifest(folder: StoragePath, kind: str, make_it: str) -> dict[str, Any]:
    """Return the content of `table.json`.

    Args:
      folder: The data set.
      kind: Required kind of the data set.
      make_it: How to make such a data set, for messages.

    Raises:
      MissingError: If the folder does not exist.
      UserError: If the folder holds no finished data set of this kind and version.
    """
    try:
        manifest = read_document(folder / MANIFEST)
    except MissingError as error:
        if not folder.is_dir():
            raise MissingError(f"no such data set: {folder}. Check the path.") from error
        reason = "it is not finished" if (folder / INDEX_FOLDER).is_dir() else f"it has no {MANIFEST}"
        raise UserError(f"{folder} is not a data set of {kind}, as {reason}. {make_it}") from error
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise UserError(f"{folder / MANIFEST} is not of version {VERSION}. Make the data set again: {make_it}")
    if manifest["kind"] != kind:
        raise UserError(f"{folder} is a data set of {manifest['kind']}, not of {kind}. {make_it}")
    return manifest


def map_threads(function: Callable[[Any], Any], values: Iterable[Any]) -> list[Any]:
    """Return the results of a function that waits for files, computed in threads."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, values))


def read_bytes(path: StoragePath) -> bytes:
    """Return the content of a file.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the address cannot be reached.
    """
    with convert_storage_errors(path):
        try:
            return read_range(path)
        except (FileNotFoundError, MissingError) as error:
            raise MissingError(f"no such file: {path}. The data set is incomplete, so write it again.") from error


def read_parquet(path: StoragePath, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the columns of a Parquet file, by default all."""
    return open_parquet(path).read(columns=columns)


def list_parquet(folder: StoragePath, prefix: str = "") -> list[str]:
    """Return the names of the Parquet files in a folder without their suffix, sorted; none if there is no folder."""
    if not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir())
    return [n.removesuffix(SUFFIX) for n in names if n.startswith(prefix) and n.endswith(SUFFIX) and n[0] != "."]


def open_parquet(path: StoragePath) -> pq.ParquetFile:
    """Open a Parquet file.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the address cannot be reached, or the file is no Parquet file.
    """
    with _convert_parquet_errors(path):
        if isinstance(path, Path):
            return pq.ParquetFile(path)
        return pq.ParquetFile(pa.BufferReader(read_bytes(path)))


def read_schema(path: StoragePath) -> pa.Schema:
    """Return the schema of a Parquet file by reading its footer alone; raises like `open_parquet`."""
    if isinstance(path, Path):
        return open_parquet(path).schema_arrow
    with _convert_parquet_errors(path), convert_storage_errors(path), path.open("rb") as file:
        return pq.read_schema(file)


@contextlib.contextmanager
def _convert_parquet_errors(path: StoragePath) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise MissingError(f"no such file: {path}. The data set is incomplete, so write it again.") from error
    except pa.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file ({error}). Write it again.") from error


def hash_column(path: StoragePath, schema: pa.Schema) -> str:
    """Return the hash of a file of columns with this schema, in which `write_column` stores it."""
    stored = (schema.metadata or {}).get(_HASH_KEY)
    return stored.decode() if stored else hashlib.sha256(read_bytes(path)).hexdigest()


def write_parquet(path: StoragePath, table: pa.Table) -> None:
    """Write a table atomically; the same table gives the same bytes."""
    if isinstance(path, Path):
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", row_group_size=BATCH_ROWS)
        return
    local = get_default_cache() / "uploads" / uuid.uuid4().hex / path.name
    try:
        write_parquet(local, table)
        upload(local, path)
    finally:
        shutil.rmtree(local.parent, ignore_errors=True)


_SMALL_TABLE = 20_000
"""Number of rows below which columns are kept in memory and pickled, instead of files in the cache."""
_MAX_CACHED_TABLES = 8
_FEW_ROWS = 64
"""Number of rows up to which they are read one by one: Arrow's `take` looks at all chunks of a column."""
_opening = threading.RLock()
"""Held while a column is opened, so that threads that need it at the same time copy its files once."""


class Table:
    """The columns of a data set.

    Args:
      folder: Folder or address of the data set.
      kind: Required kind of the data set.
      make_it: How to make such a data set, for messages.
      cache: Folder of the columns of large tables; `get_default_cache()` if None.

    Raises:
      MissingError: If the folder does not exist.
      UserError: If the folder holds no finished data set of this kind and version, or two files have the same column.
    """

    def __init__(
        self,
        folder: StoragePathLike,
        *,
        kind: str = "clips",
        make_it: str = "Use tools/ingest.py to make one.",
        cache: Path | None = None,
    ):
        self.folder: StoragePath = to_storage_path(folder)
        manifest = read_manifest(self.folder, kind, make_it)
        self.settings: dict[str, Any] = manifest["settings"]
        self._parts: list[str] = [part["name"] for part in manifest["parts"]]
        self._rows: list[int] = [part["rows"] for part in manifest["parts"]]
        self._ends = list(itertools.accumulate(self._rows))
        self._length = sum(self._rows)
        index_hash = hashlib.sha256(json.dumps(manifest["parts"]).encode()).hexdigest()[:32]
        self._cache = (cache or get_default_cache()) / "tables" / index_hash
        self._columns: dict[str, pa.ChunkedArray] = {}
        columns = self.folder / COLUMNS_FOLDER
        self._files = {name: columns / f"{name}{SUFFIX}" for name in list_parquet(columns)}
        schemas = {name: read_schema(path) for name, path in sorted(self._files.items())}
        hashes = {name: hash_column(self._files[name], schema) for name, schema in schemas.items()}
        self._hashes = {"": index_hash} | hashes
        self.version: str = hashlib.sha256(json.dumps(self._hashes).encode()).hexdigest()[:16]
        """Hash of all columns."""
        self._sources, self.types = self._list_columns(schemas)
        """Types of the columns by name."""

    def __len__(self) -> int:
        return self._length

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the columns."""
        return tuple(self.types)

    def __getitem__(self, name: str) -> Any:
        """Return a column: an array of numbers (null is NaN, also among integers), or Arrow's array of other values.

        Raises:
          UserError: If there is no such column.
        """
        column = self.arrow(name)
        if not (pa.types.is_primitive(column.type) or pa.types.is_boolean(column.type)):
            return column
        if pa.types.is_boolean(column.type):
            column = pc.fill_null(column, False)
        return column.chunk(0).to_numpy(zero_copy_only=False) if column.num_chunks == 1 else column.to_numpy()

    def arrow(self, name: str) -> pa.ChunkedArray:
        """Return a column as Arrow's array, with nulls.

        Raises:
          UserError: If there is no such column.
        """
        if name not in self._columns:
            if name not in self.types:
                raise UserError(f"column={name!r} is invalid: {self.folder} has {', '.join(sorted(self.types))}.")
            with _opening:
                if name not in self._columns:
                    self._columns[name] = self._open_column(name)
        return self._columns[name]

    def read_values(self, name: str, rows: Int64[np.ndarray, " k"] | Sequence[int]) -> list[Any]:
        """Return the values of some rows of a column as Python's values, None for null; raises like `arrow`."""
        column = self.arrow(name)
        if len(rows) > _FEW_ROWS:
            return take_rows(column, np.asarray(rows)).to_pylist()
        return [column[int(row)].as_py() for row in rows]

    def select(self, where: str) -> Int64[np.ndarray, " n"]:
        """Return the numbers of the rows that meet a condition, see `dit_video.data.where`.

        Raises:
          UserError: If the condition is invalid.
        """
        return np.flatnonzero(conditions.evaluate(where, self.arrow, self.types).to_numpy())

    def get_part(self, row: int) -> str:
        """Return the name of the part of a row."""
        return self._parts[bisect.bisect_right(self._ends, row)]

    def _list_columns(self, schemas: Mapping[str, pa.Schema]) -> tuple[dict[str, str], dict[str, pa.DataType]]:
        """Return the file of each column ("" for the index), and its type, given the schemas of the files."""
        sources: dict[str, str] = {}
        types: dict[str, pa.DataType] = {}
        if self._parts:
            index = read_schema(self.folder / INDEX_FOLDER / f"{self._parts[0]}{SUFFIX}")
            schemas = {"": index, **schemas}
        for source, schema in schemas.items():
            keys = [key for key in ("id", "name") if key in schema.names] if source else []
            if source and not keys:
                raise UserError(f"{self._files[source]} has no column id or name. Add the key of each row.")
            for field in schema:
                if field.name in keys:
                    continue
                if field.name in sources:
                    other = sources[field.name] or INDEX_FOLDER
                    raise UserError(f"{self._files[source]} has the column {field.name}, as has {other}. Rename it.")
                sources[field.name], types[field.name] = source, field.type
        return sources, types

    def _open_column(self, name: str) -> pa.ChunkedArray:
        source = self._sources[name]
        if self._length < _SMALL_TABLE:
            return self._assemble(self._read_chunks(name), self.types[name])
        path = self._cache / f"{name}-{self._hashes[source][:16]}.arrow"
        if path.exists():
            os.utime(self._cache)  # by which `_evict` knows when it was used
        else:
            with atomic_path(path) as temporary:
                self._write_arrow(temporary, name)
            _evict(self._cache.parent)
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()[name]

    def _write_arrow(self, path: Path, name: str) -> None:
        schema = pa.schema([(name, self.types[name])])
        chunks = self._read_chunks(name)
        if pa.types.is_primitive(self.types[name]):  # one chunk, which NumPy reads without a copy
            chunks = iter([self._assemble(chunks, self.types[name])])
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for chunk in chunks:
                writer.write_table(pa.table([chunk], schema=schema))

    @staticmethod
    def _assemble(chunks: Iterable[pa.ChunkedArray], type: pa.DataType) -> pa.ChunkedArray:
        arrays = [array for chunk in chunks for array in chunk.chunks]
        return pa.chunked_array([pa.concat_arrays(arrays)] if arrays else [], type)

    def _read_chunks(self, name: str) -> Iterator[pa.ChunkedArray]:
        """Yield a column of all rows, part by part."""
        source = self._sources[name]
        if not source:
            index = self.folder / INDEX_FOLDER
            for path in map_threads(lambda part: self._localize(index / f"{part}{SUFFIX}", part), self._parts):
                part = open_parquet(path)
                if name in part.schema_arrow.names:
                    yield part.read(columns=[name])[name]
                else:  # of a version that had no such column
                    yield pa.chunked_array([pa.nulls(part.metadata.num_rows, self.types[name])])
            return
        path = self._localize(self._files[source], f"{source}-{self._hashes[source][:16]}")
        file = open_parquet(path)
        if hash_column(path, file.schema_arrow) != self._hashes[source]:
            path.unlink() if path != self._files[source] else None
            raise UserError(f"{self._files[source]} has changed since the data set was opened. Open it again.")
        key = "id" if "id" in file.schema_arrow.names else "name"
        keys = file.read(columns=[key])[key].cast(self.types[key])
        places = pc.fill_null(pc.index_in(self.arrow(key), value_set=keys), -1).to_numpy()
        rows = np.flatnonzero(places >= 0)
        is_sorted = bool((np.diff(places[rows]) > 0).all())
        batch_size = BATCH_ROWS if is_sorted else max(1, len(keys))  # else all values are in memory at once
        first = start = 0
        for batch in file.iter_batches(batch_size, columns=[name]):
            stop = self._length
            if first + len(batch) < len(keys):
                count = np.searchsorted(places[rows], first + len(batch))
                stop = int(rows[count - 1]) + 1 if count else start
            numbers = places[start:stop]
            indices = pa.array(numbers - first, mask=numbers < 0)
            yield pa.chunked_array([batch.column(0).take(indices)], self.types[name])
            first, start = first + len(batch), stop
        if start < self._length:
            yield pa.chunked_array([pa.nulls(self._length - start, self.types[name])])

    def _localize(self, path: StoragePath, name: str) -> Path:
        """Return the file on this machine, to which a remote one is copied under this name."""
        if isinstance(path, Path):
            return path
        if not (local := self._cache / f"{name}{SUFFIX}").exists():
            download(path, local)
            _evict(self._cache.parent)
        return local

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({} if self._length < _SMALL_TABLE else {"_columns": {}})


def take_rows(column: pa.ChunkedArray, rows: Int64[np.ndarray, " k"]) -> pa.ChunkedArray:
    """Return the values of some rows of a column.

    Arrow's `take` joins all chunks of a column of texts or lists, which takes memory and fails from 2 GiB on. This one
    copies nothing but the rows.
    """
    if (np.diff(rows) < 0).any():
        ascending, places = np.unique(rows, return_inverse=True)
        return take_rows(column, ascending).take(pa.array(places))
    if len(rows) == len(column) and (np.diff(rows) == 1).all():
        return column
    parts, start = [], 0
    for chunk in column.chunks:
        first, last = np.searchsorted(rows, (start, start + len(chunk)))
        if last > first:
            parts.append(chunk.take(pa.array(rows[first:last] - start)))
        start += len(chunk)
    return pa.chunked_array(parts, column.type)


class TableColumn(SharesArrays, Sequence[Any]):
    """Some rows of a column as Python's values, which are read when they are used; pickled without the values."""

    def __init__(self, table: Table, name: str, rows: Int64[np.ndarray, " n"], prefix: str = ""):
        self._table, self._name, self._rows, self._prefix = table, name, rows, prefix

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return self._convert(self._rows[index])
        return self._convert(self._rows[range(len(self))[index]][None])[0]

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self), BATCH_ROWS):
            yield from self[first : first + BATCH_ROWS]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    def __repr__(self) -> str:
        return repr(list(self))

    def flatten(self) -> tuple[Int32[np.ndarray, " n"], pa.ChunkedArray]:
        """Return the number of values in each list, and all values."""
        lists = self.take_all()
        return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(), pc.list_flatten(lists)

    def number_values(self) -> Int32[np.ndarray, " n"]:
        """Return the number of each value among the different ones, in order of first occurrence."""
        return self.take_all().dictionary_encode().combine_chunks().indices.to_numpy()

    def take_all(self) -> pa.ChunkedArray:
        """Return Arrow's array of all values."""
        return take_rows(self._table.arrow(self._name), self._rows)

    def _convert(self, rows: Int64[np.ndarray, " n"]) -> list[Any]:
        values = self._table.read_values(self._name, rows)
        if pa.types.is_list(self._table.types[self._name]):
            return [tuple(each or ()) for each in values]
        return [self._prefix + each for each in values] if self._prefix else values


def _evict(folder: Path) -> None:
    """Remove the columns of the tables that were not used for the longest time."""
    with contextlib.suppress(FileNotFoundError):  # another process may remove some at this moment
        tables = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
        for path in tables[:-_MAX_CACHED_TABLES]:
            shutil.rmtree(path, ignore_errors=True)
