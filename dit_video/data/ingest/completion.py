"""Completion of an ingest, once all parts exist: choice of clips, captions, metadata of TFDS, manifest and report.

All of it is computed from the table and the listing of the source alone, and may be computed again at any time.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from dit_video.core.errors import UserError
from dit_video.data.clips import DATASET_NAME, FEATURES, KIND
from dit_video.data.ingest.parts import IngestFolder
from dit_video.data.ingest.report import REPORT_COLUMNS, IngestReport, make_report
from dit_video.data.ingest.screening import Screening
from dit_video.data.records import write_metadata
from dit_video.data.tables import BATCH_ROWS, INDEX_FOLDER, map_threads, read_parquet, write_column, write_manifest

CHOICE, CAPTIONS = "choice", "captions"
"""Names of the files of columns that an ingest writes."""
_COLUMNS = ("id", "name", "source", "source_bytes", "source_sha256", "outcome", "hash", *REPORT_COLUMNS)
"""Columns of the index that are read."""


class NoClipsError(UserError):
    """A source without a usable clip."""


def discard_transient_parts(folder: IngestFolder, parts: Iterable[str]) -> None:
    """Remove the rows of those parts that have a file which failed for a transient reason and is still in the source.

    The parts are then not finished.
    """
    unfinished, names = set(folder.list_unfinished()), folder.read_listing()["name"]
    finished = [part for part in parts if part not in unfinished]
    for part, rows in zip(finished, _read_rows(folder, finished, ["transient", "source"]), strict=True):
        if pc.any(pc.is_in(rows.filter(rows["transient"])["source"], value_set=names)).as_py():
            folder.discard(part)


def complete(folder: IngestFolder, screening: Screening, *, inherit_captions: bool) -> IngestReport:
    """Write the columns of choice and captions, the metadata, the report and the manifest.

    Args:
      folder: The data set, whose parts are all written.
      screening: Finds the clips that are dropped as duplicates.
      inherit_captions: True to caption the parts of a file like the whole file.

    Raises:
      NoClipsError: If no clip can be used.
      UserError: If two clips have the same name, or a file of the source is in no part.
    """
    parts = folder.parts
    tables = _read_rows(folder, parts, _COLUMNS)
    rows, listing, skipped = pa.concat_tables(tables), folder.read_listing(), folder.read_skipped()
    _check_files(folder, rows, listing)
    choice, is_present = _choose(rows, listing, screening)
    rows = pa.table({name: table[name] for table in (rows, choice) for name in table.column_names})
    used = rows.filter(pc.and_(pc.equal(rows["outcome"], "kept"), rows["chosen"]))
    if not len(used):
        raise NoClipsError(_explain_no_clips(rows))
    write_column(folder.folder, CHOICE, choice)
    captions = _assign_captions(used, listing, inherit_captions)
    write_column(folder.folder, CAPTIONS, pa.table({"id": used["id"], "captions": captions}))
    counts: dict[str, list[int]] = {}
    for part, table in zip(parts, tables, strict=True):
        kept = pc.sum(pc.equal(table["outcome"], "kept")).as_py() or 0
        counts.setdefault(part.rpartition("-")[0], []).append(kept)
    write_metadata(folder.folder, DATASET_NAME, counts, features=FEATURES)
    uncaptioned = pc.sum(pc.equal(pc.list_value_length(captions), 0)).as_py() or 0
    present = rows.filter(pa.array(is_present))
    make_report(present, uncaptioned=uncaptioned, skipped=skipped, settings=folder.settings).write(folder.folder)
    write_manifest(folder.folder, KIND, folder.settings, parts)
    return IngestReport.read(folder.folder)


def _read_rows(folder: IngestFolder, parts: Sequence[str], columns: Sequence[str] | None = None) -> list[pa.Table]:
    return map_threads(lambda part: read_parquet(folder.folder / INDEX_FOLDER / f"{part}.parquet", columns), parts)


def _choose(rows: pa.Table, listing: pa.Table, screening: Screening) -> tuple[pa.Table, Bool[np.ndarray, " n"]]:
    """Return the columns of choice: split, whether a clip is used, and why not; and which rows are of present files."""
    positions = pc.index_in(rows["source"], value_set=listing["name"]).combine_chunks()
    sizes, splits, contents = (listing[name].combine_chunks().take(positions) for name in ("size", "split", "content"))
    is_own = pc.or_(pc.equal(contents, ""), pc.equal(contents, rows["source_sha256"].combine_chunks()))
    is_same = pc.and_(pc.equal(sizes, rows["source_bytes"].combine_chunks()), is_own)
    is_present = pc.fill_null(is_same, False).to_numpy(zero_copy_only=False)
    why = pc.if_else(pa.array(is_present), "", "is no longer in the source")
    kept = np.flatnonzero(pc.equal(rows["outcome"], "kept").to_numpy() & is_present)
    names = rows["name"].take(pa.array(kept)).combine_chunks()
    _check_names(names)
    hashes = (each.as_py() for each in rows["hash"].take(pa.array(kept)))
    originals = screening.find_duplicates(hashes, (each.as_py() for each in positions.take(pa.array(kept))))
    if originals:
        clips = sorted(originals)
        is_duplicate = np.isin(np.arange(len(rows)), kept[clips])
        reasons = [f"shows what {names[originals[clip]].as_py()!r} shows" for clip in clips]
        why = pc.replace_with_mask(why, is_duplicate, pa.array(reasons, pa.string()))
    return pa.table({"id": rows["id"], "split": splits, "chosen": pc.equal(why, ""), "why": why}), is_present


def _check_files(folder: IngestFolder, rows: pa.Table, listing: pa.Table) -> None:
    """Raise if a file of the source has no row: the source changed while several processes began to ingest it."""
    is_absent = pc.invert(pc.is_in(listing["name"], value_set=rows["source"].combine_chunks()))
    if len(absent := listing.filter(is_absent)):
        raise UserError(f"{folder.folder} has no part with {absent['name'][0]}. Remove the folder, and ingest again.")


def _check_names(names: pa.Array) -> None:
    """Raise if two clips have the same name: a file may be called like a part of another file."""
    counts = pc.value_counts(names)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        name = repeated[0]["values"].as_py()
        raise UserError(f"two clips would be called {name}; rename the file, as `#` numbers the parts of a file")


def _assign_captions(used: pa.Table, listing: pa.Table, inherit_captions: bool) -> pa.ChunkedArray:
    """Return the captions of clips: their file's captions, unless they are a part of it."""
    positions = pc.index_in(used["source"], value_set=listing["name"]).combine_chunks()
    # Offsets of 64 bits, as the captions of millions of clips have more than 2 GiB.
    captions = listing["captions"].cast(pa.large_list(pa.large_string())).combine_chunks().take(positions)
    if not inherit_captions:
        is_whole = pc.equal(used["name"], used["source"]).combine_chunks()
        captions = pc.if_else(is_whole, captions, pa.scalar([], captions.type))
    parts = (captions.slice(first, BATCH_ROWS) for first in range(0, len(captions), BATCH_ROWS))
    return pa.chunked_array([part.cast(pa.list_(pa.string())) for part in parts])


def _explain_no_clips(rows: pa.Table) -> str:
    broken = rows.filter(pc.equal(rows["outcome"], "unreadable"))
    first = (broken if len(broken) else rows).slice(0, 1).to_pylist()[0]
    fix = "relax the limits of the screening"
    if len(broken):
        fix = "fix that and run the command again" if first["transient"] else "use files that a video player opens"
    count, reason = len(pc.unique(rows["source"])), first["reason"] or first["why"]
    return f"none of the {count} clips can be used (first: {first['name']}: {reason}); {fix}"
