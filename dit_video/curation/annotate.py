"""Columns of a data set by an annotator, in any number of processes that may be killed at any time.

Clips are annotated in blocks of the data set's order, of which process I of N takes every N-th one. Only clips without
a row are computed: a row is that of the same annotator (`identity`), payload and, if values depend on them, captions.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64, UInt64

from dit_video.core.errors import DecodeError, UserError
from dit_video.curation.annotation_files import (
    check_columns,
    make_fields,
    merge_rows,
    read_rows,
    to_array,
    write,
    write_rows,
)
from dit_video.curation.annotator import AnnotationError, Annotator, ClipFile, TableAnnotator
from dit_video.data.clips import ClipInfo, ClipSource, find_kept
from dit_video.data.tables import take_rows

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
      UserError: no clips, the annotator cannot run, its columns are those of another file or would replace values of
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
      UserError: no clips, not all of them, a needed column does not exist, or another file has the columns.
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
    write(table.folder, annotator.name, pa.table([ids, *arrays], schema=pa.schema(fields)), annotator.identity)


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
