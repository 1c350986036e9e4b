"""Columns of a data set by an annotator, in any number of processes that may be killed at any time.

Clips are annotated in blocks of the data set's order; process I of N takes every N-th one. Only clips without
a row are computed: a row is that of the same annotator (`identity`), payload and, if values depend on them, captions.

columns/NAME.parts/TIME-DIGEST.parquet   rows of the clips that a process has annotated
columns/NAME.parquet                     rows of all clips, once none is left

`NAME_key` is the hash of the clip that a row is of. Several rows of a clip are those of several attempts.
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64, UInt64

from dit_video.core.errors import DecodeError, MissingError, UserError
from dit_video.core.storage import StoragePath
from dit_video.curation.annotator import AnnotationError, Annotator, AnyAnnotator, ClipFile, Column, TableAnnotator
from dit_video.data.clips import ClipInfo, ClipSource, find_kept
from dit_video.data.tables import COLUMNS_FOLDER, SUFFIX, get_note, open_parquet, take_rows, write_column

AnnotationProgress = Callable[[int, int], object]
"""Function that is called with the numbers of annotated and of all clips of this process."""


class AnnotationReport(NamedTuple):
    """Result of an annotation."""

    computed: int
    """Number of clips whose values this process computed."""
    failures: dict[str, str]
    """Reason by name of clip, of those that this process computed and that have no values."""
    pending: int
    """Number of clips that other processes have yet to annotate; the columns are complete at 0."""


def annotate(
    source: ClipSource,
    annotator: Annotator,
    *,
    shard: int = 0,
    shards: int = 1,
    retry: bool = False,
    progress: AnnotationProgress = lambda done, total: None,
) -> AnnotationReport:
    """Compute the columns of an annotator, and write them when all clips have values.

    A clip that cannot be annotated gets nulls, and the reason in the column `NAME_error`.

    Args:
      source: Clips of one data set.
      annotator: Annotator.
      shard: Index of this process.
      shards: Number of processes.
      retry: Also compute the clips again that could not be annotated.
      progress: Called after each clip.

    Raises:
      UserError: If no clips, the annotator cannot run, its columns are those of another file or would replace values of
        clips that are not in `source`, or they cannot be written. What was computed is kept.
    """
    if not 0 <= shard < shards:
        raise UserError(f"shard={shard} of shards={shards} is invalid. Use 0 to {shards - 1}")
    check_clips(source)
    folder = source.folders[0]
    annotator.check()
    check_columns(source, annotator)
    keys = compute_keys(source, annotator)
    blocks = [block for block in find_pending(source, annotator, keys, retry=retry) if block.number % shards == shard]
    total, done, failures = sum(len(block.clips) for block in blocks), 0, {}
    with ThreadPoolExecutor(annotator.threads) as pool:
        for block in blocks:
            rows: list[dict[str, Any]] = []
            try:
                for row in _annotate_clips(pool, source, annotator, block.clips):
                    rows.append(row | {f"{annotator.name}_key": keys[row["clip"]]})
                    if reason := row[f"{annotator.name}_error"]:
                        failures[source.infos[row["clip"]].name] = reason
                    done += 1
                    progress(done, total)
            finally:
                if rows:
                    write_rows(folder, annotator, rows)
    left = find_pending(source, annotator, keys, retry=False)
    if not left:
        merge_rows(source, annotator, keys)
        left = find_pending(source, annotator, keys, retry=False)  # of processes that merged at the same moment
    return AnnotationReport(done, failures, sum(len(block.clips) for block in left))


def annotate_table(source: ClipSource, annotator: TableAnnotator) -> None:
    """Compute and write the columns of an annotator that reads other columns.

    Raises:
      UserError: If there are no clips or not all of them, a needed column does not exist, or another file has the
        columns.
    """
    check_clips(source)
    table = source.tables[0]
    if len(source) < (count := int(find_kept(table).sum())):
        raise UserError(f"{annotator.name} compares all {count} clips of {table.folder}. Use it without a condition")
    check_columns(source, annotator)
    for column, other in annotator.needs.items():
        if column not in table.names:
            raise UserError(
                f"{table.folder} has no column {column}, which {annotator.name} reads. Use tools/annotate.py "
                f"{table.folder} {other} before"
            )
    ids = pa.array(source.column("id"), pa.uint64())
    rows = pc.index_in(ids, value_set=table.arrow("id")).to_numpy().astype(np.int64)
    needed = {name: take_rows(table.arrow(name), rows) for name in annotator.needs}
    values = annotator.annotate_table(list(source.column("name")), needed)
    arrays = [to_array(values[name], column) for name, column in annotator.columns.items()]
    fields = [pa.field("id", pa.uint64()), *make_fields(annotator.columns)]
    write_columns(table.folder, annotator.name, pa.table([ids, *arrays], schema=pa.schema(fields)), annotator.identity)


class ClipBlock(NamedTuple):
    """Clips that one process annotates together."""

    number: int
    clips: Int64[np.ndarray, " n"]
    """Numbers of the clips of the block that have no values."""


def check_clips(source: ClipSource) -> None:
    """Check that there are clips to annotate.

    Raises:
      UserError: If there are no clips, or clips of several data sets.
    """
    if len(source.folders) != 1:
        raise UserError(f"{len(source.folders)} data sets are annotated one at a time. Use one")
    if not len(source):
        raise UserError(f"{source.folders[0]} has no clips to annotate. Use another data set, or another condition")


def compute_keys(source: ClipSource, annotator: Annotator) -> UInt64[np.ndarray, " n"]:
    """Return a hash of all that each clip's values depend on besides the annotator: its bytes, and captions."""
    parts: Iterator[tuple[Any, ...]] = zip(source.column("payload"), strict=True)
    if annotator.reads_captions:
        parts = zip(source.column("payload"), source.column("captions"), strict=True)
    texts = (json.dumps(part, default=list).encode() for part in parts)
    return np.array([int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") for text in texts], "u8")


def find_pending(
    source: ClipSource, annotator: Annotator, keys: UInt64[np.ndarray, " n"], *, retry: bool
) -> list[ClipBlock]:
    """Return the blocks of clips without values, which are the same in all processes."""
    name, results = annotator.name, read_rows(source, annotator, keys, columns=()).table
    rows = pc.index_in(pa.array(source.column("id"), pa.uint64()), value_set=results["id"])
    known = pc.fill_null(rows, -1).to_numpy().astype(np.int64)
    is_done = known >= 0
    if len(results):
        is_done &= results[f"{name}_key"].to_numpy()[known] == keys
        if retry:
            is_done &= pc.is_null(results[f"{name}_error"]).to_numpy()[known]
    pending = np.flatnonzero(~is_done)
    numbers = pending // annotator.block_clips
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    parts = np.split(pending, starts[1:]) if len(pending) else []
    return [ClipBlock(int(part[0] // annotator.block_clips), part) for part in parts]


def _annotate_clips(
    pool: ThreadPoolExecutor, source: ClipSource, annotator: Annotator, clips: Sequence[int] | np.ndarray
) -> Iterator[dict[str, Any]]:
    """Yield the row of each clip, in the order in which they are finished."""

    def run(clip: int) -> dict[str, Any]:
        info: ClipInfo = source.infos[clip]
        row = {"clip": clip, "id": info.id, f"{annotator.name}_error": None}
        try:
            return row | dict(annotator.annotate(ClipFile(info, source[clip])))
        except (AnnotationError, DecodeError) as error:
            return row | dict.fromkeys(annotator.columns) | {f"{annotator.name}_error": str(error)}

    futures = [pool.submit(run, int(clip)) for clip in clips]
    failure: UserError | None = None
    try:
        for future in as_completed(futures):
            try:
                row = future.result()
            except CancelledError:
                continue
            except UserError as error:  # no clip can be annotated; those that are being annotated are kept
                failure = failure or error
                for other in futures:
                    other.cancel()
                continue
            yield row
    finally:
        for future in futures:
            future.cancel()
    if failure is not None:
        raise failure


class AnnotationRows(NamedTuple):
    """Rows that exist, one for each clip, and the parts that they were read from."""

    table: pa.Table
    parts: tuple[StoragePath, ...]


def read_rows(
    source: ClipSource, annotator: Annotator, keys: UInt64[np.ndarray, " n"], columns: Sequence[str] | None = None
) -> AnnotationRows:
    """Return the rows of this annotator's identity: of each clip one of its present key, of these one without error.

    Args:
      source: Clips.
      annotator: Annotator.
      keys: Present key of each clip.
      columns: Columns that are read, in addition to those of the key and the error; None for all.

    Raises:
      UserError: If a file cannot be read.
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
      UserError: If it cannot be written.
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
    write_columns(folder, name, pa.table(arrays, schema=schema), annotator.identity)


def merge_rows(source: ClipSource, annotator: Annotator, keys: UInt64[np.ndarray, " n"]) -> None:
    """Write the columns of all clips in the order of the table, and remove the parts that they were read from.

    Raises:
      UserError: If a file cannot be read or written.
    """
    folder = source.folders[0]
    results, parts = read_rows(source, annotator, keys)
    rows = pc.fill_null(pc.index_in(results["id"], value_set=source.tables[0].arrow("id")), -1).to_numpy()
    order = np.argsort(rows, kind="stable")
    write_columns(folder, annotator.name, results.take(pa.array(order[rows[order] >= 0])), annotator.identity)
    for path in parts:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (folder / COLUMNS_FOLDER / f"{annotator.name}.parts").rmdir()


def check_columns(source: ClipSource, annotator: AnyAnnotator) -> None:
    """Check that the columns of an annotator neither are those of other files nor replace values of other clips.

    Raises:
      UserError: If a column exists in another file, or clips that are not in `source` have values by other settings.
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


def write_columns(folder: StoragePath, name: str, table: pa.Table, note: str) -> None:
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
