"""Files of tables: parts, further columns, and the manifest that names them; see `tables`."""

import contextlib
import hashlib
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import atomic_path
from dit_video.core.storage import (
    StoragePath,
    StoragePathLike,
    convert_storage_errors,
    get_default_cache,
    read_document,
    read_range,
    to_storage_path,
    upload,
    write_document,
)

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
      folder: the data set.
      name: name of the file.
      columns: values by name, one of which is the key `id` or `name`; rows that are not named have no value.
      note: what the values depend on, such as the version of a model; see `read_note`.

    Raises:
      UserError: there is no key, a row is named twice, or a column has another number of values.
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


def read_note(folder: StoragePathLike, name: str) -> str | None:
    """Return the note with which a column was written; None if there is no such column."""
    path = to_storage_path(folder) / COLUMNS_FOLDER / f"{name}{SUFFIX}"
    if not path.exists():
        return None
    return get_note(read_schema(path))


def get_note(schema: pa.Schema) -> str:
    """Return the note in the schema of a file that `write_column` wrote; empty if there is none."""
    return (schema.metadata or {}).get(b"note", b"").decode()


def write_manifest(folder: StoragePath, kind: str, settings: Mapping[str, Any], parts: Sequence[str]) -> None:
    """Write `table.json`, which makes parts that exist a table.

    Args:
      folder: the data set.
      kind: kind of the data set, such as "clips".
      settings: JSON values.
      parts: names of the parts, in the order of their rows.
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
      folder: the data set.
      kind: required kind of the data set.
      make_it: how to make such a data set, for messages.

    Raises:
      MissingError: the folder does not exist.
      UserError: the folder holds no finished data set of this kind and version.
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
      MissingError: the file does not exist.
      UserError: it cannot be reached.
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
      MissingError: the file does not exist.
      UserError: it cannot be reached, or is no Parquet file.
    """
    with _convert_parquet_errors(path):
        if isinstance(path, Path):
            return pq.ParquetFile(path)
        return pq.ParquetFile(pa.BufferReader(read_bytes(path)))


def read_schema(path: StoragePath) -> pa.Schema:
    """Return the schema of a Parquet file, of which the footer alone is read; raises like `open_parquet`."""
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
