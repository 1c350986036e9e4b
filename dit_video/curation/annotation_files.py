"""Files of an annotation: parts that processes write, and the file of columns that they are merged into.

columns/NAME.parts/TIME-DIGEST.parquet   rows of the clips that a process has annotated
columns/NAME.parquet                     rows of all clips, once none is left

A row is that of an annotator (`identity`), and of the clip whose hash is in `NAME_key`. Several rows of a clip are
those of several attempts.
"""

import contextlib
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import UInt64

from dit_video.core.errors import MissingError, UserError
from dit_video.core.storage import StoragePath
from dit_video.curation.annotator import Annotator, AnyAnnotator, Column
from dit_video.data.clips import ClipSource, find_kept
from dit_video.data.tables import COLUMNS_FOLDER, SUFFIX, get_note, open_parquet, write_column


class AnnotationRows(NamedTuple):
    """Rows that exist, one for each clip, and the parts that they were read from."""

    table: pa.Table
    parts: tuple[StoragePath, ...]


def read_rows(
    source: ClipSource, annotator: Annotator, keys: UInt64[np.ndarray, " n"], columns: Sequence[str] | None = None
) -> AnnotationRows:
    """Return the rows of this annotator's identity: of each clip one of its present key, of these one without error.

    Args:
      source: clips.
      annotator: annotator.
      keys: present key of each clip.
      columns: columns that are read, in addition to those of the key and the error; None for all.

    Raises:
      UserError: a file cannot be read.
    """
    folder, name = source.folders[0] / COLUMNS_FOLDER, annotator.name
    schema = make_schema(annotator)
    if columns is not None:
        schema = pa.schema([schema.field(each) for each in ("id", f"{name}_key", f"{name}_error", *columns)])
    # The parts are listed first: what a process has just merged and removed is in the file that is read next.
    parts = [path for path in _list(folder / f"{name}.parts") if path.suffix == SUFFIX and path.name[0] != "."]
    merged = folder / f"{name}{SUFFIX}"
    tables: dict[StoragePath, pa.Table] = {}
    for path in [*parts, merged]:
        with contextlib.suppress(MissingError):
            file = open_parquet(path)
            is_own = get_note(file.schema_arrow) == annotator.identity
            tables[path] = file.read(columns=schema.names).cast(schema) if is_own else schema.empty_table()
    rows = pa.concat_tables([tables.pop(merged, schema.empty_table()), *tables.values()])  # in the order of time
    ids = rows["id"].to_numpy()
    clips = pc.fill_null(pc.index_in(rows["id"], value_set=pa.array(source.column("id"), pa.uint64())), -1).to_numpy()
    is_present = (clips >= 0) & (rows[f"{name}_key"].to_numpy() == np.append(keys, np.uint64(0))[clips])
    has_values = pc.is_null(rows[f"{name}_error"]).to_numpy()
    order = np.lexsort((np.arange(len(ids)), has_values, is_present, ids))
    is_best = np.append(np.diff(ids[order]) != 0, True)[: len(ids)]
    return AnnotationRows(rows.take(pa.array(np.sort(order[is_best]))), tuple(tables))


def write_rows(folder: StoragePath, annotator: Annotator, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of clips as a part.

    Raises:
      UserError: it cannot be written.
    """
    rows = sorted(rows, key=lambda row: row["clip"])
    schema, columns = make_schema(annotator), annotator.columns
    arrays = [
        to_array([row[field.name] for row in rows], columns.get(field.name) or Column(type=field.type, description=""))
        for field in schema
    ]
    # Named by its time, so that later attempts come last, and by its clips, as processes write at the same time.
    digest = hashlib.sha256(np.array([row["id"] for row in rows], np.uint64).tobytes()).hexdigest()[:16]
    name = f"{annotator.name}.parts/{time.time_ns():020d}-{digest}"
    write(folder, name, pa.table(arrays, schema=schema), annotator.identity)


def merge_rows(source: ClipSource, annotator: Annotator, keys: UInt64[np.ndarray, " n"]) -> None:
    """Write the columns of all clips in the order of the table, and remove the parts that they were read from.

    Raises:
      UserError: a file cannot be read or written.
    """
    folder = source.folders[0]
    results, parts = read_rows(source, annotator, keys)
    rows = pc.fill_null(pc.index_in(results["id"], value_set=source.tables[0].arrow("id")), -1).to_numpy()
    order = np.argsort(rows, kind="stable")
    write(folder, annotator.name, results.take(pa.array(order[rows[order] >= 0])), annotator.identity)
    for path in parts:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (folder / COLUMNS_FOLDER / f"{annotator.name}.parts").rmdir()


def check_columns(source: ClipSource, annotator: AnyAnnotator) -> None:
    """Check that the columns of an annotator neither are those of other files nor replace values of other clips.

    Raises:
      UserError: a column exists in another file, or clips that are not in `source` have values by other settings.
    """
    table, path = source.tables[0], source.folders[0] / COLUMNS_FOLDER / f"{annotator.name}{SUFFIX}"
    file = open_parquet(path) if path.exists() else None
    own = set() if file is None else set(file.schema_arrow.names)
    names = [*annotator.columns] if not isinstance(annotator, Annotator) else make_schema(annotator).names[1:]
    if taken := [name for name in names if name in table.types and name not in own]:
        raise UserError(
            f"{table.folder} has a column {taken[0]} already, which {annotator.name} would write too. Give the "
            "annotator's column another name, or remove the file with the other one"
        )
    if file is None or get_note(file.schema_arrow) == annotator.identity:
        return
    ids = file.read(columns=["id"])["id"]
    is_replaced = pc.is_in(ids, value_set=pa.array(source.column("id"), pa.uint64()))
    is_used = pc.is_in(ids, value_set=pa.array(table["id"][find_kept(table)]))
    if count := pc.sum(pc.and_not(is_used, is_replaced)).as_py() or 0:
        raise UserError(
            f"{path} has values of {count} clips by other settings, which would be removed. Annotate all clips "
            "(without a condition), write captions under another label (--captions.label), or remove that file"
        )


def write(folder: StoragePath, name: str, table: pa.Table, note: str) -> None:
    """Write a file of columns; raises `UserError` if it cannot be written."""
    try:
        write_column(folder, name, table, note)
    except OSError as error:
        path = folder / COLUMNS_FOLDER / f"{name}{SUFFIX}"
        reason = error.strerror or str(error)
        raise UserError(f"{path} cannot be written ({reason}). Free disk space there, and run it again") from error


def make_schema(annotator: Annotator) -> pa.Schema:
    """Return the schema of an annotator's rows: its columns, and those of the key and of the error."""
    name = annotator.name
    error = Column(type=pa.string(), description=f"Reason for which {name} has no values.")
    key = Column(type=pa.uint64(), description=f"Hash of the clip that the values of {name} are of.")
    own = {f"{name}_error": error, f"{name}_key": key}
    return pa.schema([pa.field("id", pa.uint64()), *make_fields({**annotator.columns, **own})])


def make_fields(columns: Mapping[str, Column]) -> list[pa.Field]:
    """Return the fields of columns, with their descriptions and units as metadata."""
    return [
        pa.field(name, column.type, metadata={"description": column.description, "unit": column.unit})
        for name, column in columns.items()
    ]


def to_array(values: Any, column: Column) -> pa.Array:
    """Return values as an Arrow array; numbers that are not finite are null."""
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if pa.types.is_floating(column.type):
        values = [None if value is None or not math.isfinite(value) else value for value in values]
    return pa.array(values, column.type)


def _list(folder: StoragePath) -> list[StoragePath]:
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
