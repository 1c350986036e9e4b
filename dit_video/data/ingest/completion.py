"""Completion of an ingest, once all parts exist: choice of clips, captions, metadata of TFDS, manifest and report.

All of it is computed from the table and the listing of the source alone, and may be computed again at any time.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dit_video.core.errors import UserError
from dit_video.data.clips import DATASET_NAME, FEATURES, KIND
from dit_video.data.ingest.duplicates import drop_duplicates
from dit_video.data.ingest.parts import IngestFolder
from dit_video.data.ingest.report import IngestReport, make_report
from dit_video.data.records import sort_splits, write_metadata
from dit_video.data.tables import INDEX_FOLDER, map_threads, read_parquet, write_column, write_manifest

CHOICE, CAPTIONS = "choice", "captions"
"""Names of the files of columns that an ingest writes."""


def find_transient_parts(folder: IngestFolder) -> list[str]:
    """Return the parts with a file that failed for a transient reason."""
    parts = [part for part in folder.parts if part not in folder.list_unfinished()]
    return [part for part, rows in zip(parts, _read_rows(folder, parts, ["transient"]), strict=True) if pc.any(rows["transient"]).as_py()]


def complete(folder: IngestFolder, *, inherit_captions: bool, duplicate_distance: int | None) -> IngestReport:
    """Write the columns of choice and captions, the metadata, the report and the manifest.

    Args:
      folder: the data set, all parts of which are written.
      inherit_captions: True to caption the parts of a file like the whole file.
      duplicate_distance: maximum distance of near-duplicates, see `drop_duplicates`; None to keep all.

    Raises:
      UserError: no clip can be used, or two clips have the same name.
    """
    parts = folder.parts
    tables = _read_rows(folder, parts)
    rows, listing = pa.concat_tables(tables), folder.read_listing()
    choice = _choose(rows, listing, duplicate_distance)
    write_column(folder.folder, CHOICE, choice)
    is_used = pc.and_(pc.equal(rows["outcome"], "kept"), choice["chosen"])
    if not pc.any(is_used).as_py():
        raise UserError(_explain_no_clips(rows, choice, folder.read_skipped()))
    captions = _assign_captions(rows.filter(is_used), listing, inherit_captions)
    write_column(folder.folder, CAPTIONS, captions)
    counts: dict[str, list[int]] = {}
    for part, table in zip(parts, tables, strict=True):
        kept = pc.sum(pc.equal(table["outcome"], "kept")).as_py() or 0
        counts.setdefault(part.rpartition("-")[0], []).append(kept)
    write_metadata(folder.folder, DATASET_NAME, counts, features=FEATURES)
    report = make_report(rows, choice, captions, folder.read_skipped(), folder.settings)
    report.write(folder.folder)
    write_manifest(folder.folder, KIND, folder.settings, parts)
    return report


def _read_rows(folder: IngestFolder, parts: Sequence[str], columns: Sequence[str] | None = None) -> list[pa.Table]:
    return map_threads(lambda part: read_parquet(folder.folder / INDEX_FOLDER / f"{part}.parquet", columns), parts)


def _choose(rows: pa.Table, listing: pa.Table, duplicate_distance: int | None) -> pa.Table:
    """Return for every row whether it is used, and why not: its file is gone, or it duplicates another clip."""
    sizes = dict(zip(listing["name"].to_pylist(), listing["size"].to_pylist(), strict=True))
    sources, source_bytes = rows["source"].to_pylist(), rows["source_bytes"].to_pylist()
    why = np.array(
        ["" if sizes.get(name) == size else "is no longer in the source" for name, size in zip(sources, source_bytes, strict=True)],
        object,
    )
    names, is_kept = rows["name"].to_pylist(), pc.equal(rows["outcome"], "kept").to_numpy() & (why == "")
    _check_names([names[row] for row in np.flatnonzero(is_kept)])
    if duplicate_distance is not None:
        kept = np.flatnonzero(is_kept)
        hashes = rows["hash"].take(pa.array(kept)).to_pylist()
        originals = drop_duplicates([bits and tuple(bits) for bits in hashes], distance=duplicate_distance)
        for row, original in zip(kept, originals, strict=True):
            if original is not None:
                why[row] = f"shows what {names[kept[original]]!r} shows"
    return pa.table({"id": rows["id"], "chosen": pa.array(why == ""), "why": pa.array(why, pa.string())})


def _check_names(names: Sequence[str]) -> None:
    """Raise if two clips have the same name: a file may be called like a part of another file."""
    counts = pc.value_counts(pa.array(names, pa.string()))
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        name = repeated[0]["values"].as_py()
        raise UserError(f"two clips would be called {name}; rename the file, as `#` numbers the parts of a file")


def _assign_captions(used: pa.Table, listing: pa.Table, inherit_captions: bool) -> pa.Table:
    """Return the captions of clips: those of their file, unless they are a part of it."""
    positions = pc.index_in(used["source"], value_set=listing["name"])
    captions = listing["captions"].combine_chunks().take(positions.combine_chunks())
    if not inherit_captions:
        is_whole = pc.equal(used["name"], used["source"]).combine_chunks()
        captions = pc.if_else(is_whole, captions, pa.scalar([], captions.type))
    return pa.table({"id": used["id"], "captions": captions})


def _explain_no_clips(rows: pa.Table, choice: pa.Table, skipped: dict[str, Any]) -> str:
    first = rows.slice(0, 1).to_pylist()[0] | choice.slice(0, 1).to_pylist()[0]
    broken = rows.filter(pc.equal(rows["outcome"], "unreadable")).slice(0, 1).to_pylist()
    if broken:
        first = broken[0]
        fix = "fix that and run the command again" if first["transient"] else "use files that a video player opens"
    else:
        fix = "relax the limits of the screening"
    count = len(pc.unique(rows["source"]))
    return f"none of the {count} clips can be used (first: {first['name']}: {first['reason'] or first['why']}); {fix}"
