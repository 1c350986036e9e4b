"""Columns of a data set by an annotator, in any number of processes that may be killed at any time.

Clips are annotated in blocks of the data set's order, of which process I of N takes every N-th one. The rows of a block
are written to `columns/NAME.parts/`, and all to `columns/NAME.parquet` once no clip is left. Only clips without a row
are computed: a row is that of the same annotator (`identity`), payload and, if values depend on them, captions.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int64, UInt64

from dit_video.core.errors import DecodeError, UserError
from dit_video.core.storage import StoragePath
from dit_video.curation.annotator import AnnotationError, Annotator, ClipFile, Column, TableAnnotator
from dit_video.data.clips import ClipInfo, ClipSource
from dit_video.data.table_files import COLUMNS_FOLDER, read_bytes, write_column

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
      source: clips of one data set.
      annotator: annotator.
      shard: index of this process.
      shards: number of processes.
      retry: also compute the clips again that could not be annotated.
      progress: called after each clip.

    Raises:
      UserError: no clips, the annotator cannot run, or the columns cannot be written. What was computed is kept.
    """
    if not 0 <= shard < shards:
        raise UserError(f"shard={shard} of shards={shards} is invalid. Use 0 to {shards - 1}")
    check_clips(source)
    folder = source.folders[0]
    annotator.check()
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
                    _write_part(folder, annotator, rows)
    left = find_pending(source, annotator, keys, retry=False)
    if not left:
        _finish(source, annotator)
    return AnnotationReport(done, failures, sum(len(block.clips) for block in left))


def annotate_table(source: ClipSource, annotator: TableAnnotator) -> None:
    """Compute and write the columns of an annotator that reads other columns.

    Raises:
      UserError: no clips, or a needed column does not exist.
    """
    check_clips(source)
    table = source.tables[0]
    for column, other in annotator.needs.items():
        if column not in table.names:
            raise UserError(
                f"{table.folder} has no column {column}, which {annotator.name} reads. Use tools/annotate.py "
                f"{table.folder} {other} before"
            )
    ids = pa.array(source.column("id"), pa.uint64())
    rows = pc.index_in(ids, value_set=table.arrow("id"))
    needed = {name: table.arrow(name).take(rows) for name in annotator.needs}
    values = annotator.annotate_table(list(source.column("name")), needed)
    arrays = [_to_array(values[name], column) for name, column in annotator.columns.items()]
    fields = [pa.field("id", pa.uint64()), *_make_fields(annotator.columns)]
    _write(table.folder, annotator.name, pa.table([ids, *arrays], schema=pa.schema(fields)), annotator.identity)


class ClipBlock(NamedTuple):
    """Clips that one process annotates together."""

    number: int
    clips: Int64[np.ndarray, " n"]
    """Numbers of the clips of the block that have no values."""


def check_clips(source: ClipSource) -> None:
    """Check that there are clips to annotate.

    Raises:
      UserError: there are none, or of several data sets.
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
    name, results = annotator.name, _read_results(source.folders[0], annotator)
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
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def _write_part(folder: StoragePath, annotator: Annotator, rows: list[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda row: row["clip"])
    schema = _make_schema(annotator)
    columns = annotator.columns
    arrays = [
        _to_array([row[field.name] for row in rows], columns.get(field.name) or Column(type=field.type, description=""))
        for field in schema
    ]
    # Named by all of its clips, since a block that was interrupted is written in several files.
    digest = hashlib.sha256(np.array([row["id"] for row in rows], np.uint64).tobytes()).hexdigest()[:16]
    name = f"{_get_parts_folder(annotator)}/{digest}"
    _write(folder, name, pa.table(arrays, schema=schema), annotator.identity)


def _read_results(folder: StoragePath, annotator: Annotator) -> pa.Table:
    """Return all rows of this annotator's identity, of each clip the last one."""
    schema, tables = _make_schema(annotator), []
    parts = folder / COLUMNS_FOLDER / _get_parts_folder(annotator)
    # The parts are read first: what a process has just merged and removed is in the file that is read next.
    paths = [path for path in _list(parts) if path.suffix == ".parquet" and not path.name.startswith(".")]
    for path in [*paths, folder / COLUMNS_FOLDER / f"{annotator.name}.parquet"]:
        with contextlib.suppress(FileNotFoundError, UserError):
            table = pq.read_table(pa.BufferReader(read_bytes(path)))
            if (table.schema.metadata or {}).get(b"note", b"").decode() == annotator.identity:
                tables.append(table.select(schema.names).cast(schema))
    results = pa.concat_tables([*reversed(tables), schema.empty_table()]).combine_chunks()
    last = np.unique(results["id"].to_numpy()[::-1], return_index=True)[1]
    return results.take(pa.array(np.sort(len(results) - 1 - last)))


def _finish(source: ClipSource, annotator: Annotator) -> None:
    """Write the columns of all clips, in the order of the table, and remove the parts."""
    folder = source.folders[0]
    results = _read_results(folder, annotator)
    rows = pc.index_in(results["id"], value_set=source.tables[0].arrow("id"))
    rows = pc.fill_null(rows, -1).to_numpy().astype(np.int64)
    order = np.argsort(rows, kind="stable")
    results = results.take(pa.array(order[rows[order] >= 0]))
    _write(folder, annotator.name, results, annotator.identity)
    parts = folder / COLUMNS_FOLDER / _get_parts_folder(annotator)
    for path in _list(parts):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    with contextlib.suppress(OSError):
        parts.rmdir()


def _write(folder: StoragePath, name: str, table: pa.Table, note: str) -> None:
    try:
        write_column(folder, name, table, note)
    except OSError as error:
        path = folder / COLUMNS_FOLDER / f"{name}.parquet"
        reason = error.strerror or str(error)
        raise UserError(f"{path} cannot be written ({reason}). Free disk space there, and run it again") from error


def _list(folder: StoragePath) -> list[StoragePath]:
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _get_parts_folder(annotator: Annotator) -> str:
    return f"{annotator.name}.parts"


def _make_schema(annotator: Annotator) -> pa.Schema:
    name = annotator.name
    error = Column(type=pa.string(), description=f"Reason for which {name} has no values.")
    key = Column(type=pa.uint64(), description=f"Hash of the clip that the values of {name} are of.")
    own = {f"{name}_error": error, f"{name}_key": key}
    return pa.schema([pa.field("id", pa.uint64()), *_make_fields({**annotator.columns, **own})])


def _make_fields(columns: Mapping[str, Column]) -> list[pa.Field]:
    return [
        pa.field(name, column.type, metadata={"description": column.description, "unit": column.unit})
        for name, column in columns.items()
    ]


def _to_array(values: Any, column: Column) -> pa.Array:
    """Return values as an Arrow array; numbers that are not finite are null."""
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if pa.types.is_floating(column.type):
        values = [None if value is None or not math.isfinite(value) else value for value in values]
    return pa.array(values, column.type)
