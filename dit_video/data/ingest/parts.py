"""Parts of an ingest, the units of its work: any process writes a part, and one whose index exists is done.

ingest/settings.json          settings, which do not change
ingest/parts-000.parquet      files of each part; a source that has grown adds parts-001.parquet
ingest/listing.parquet        files that the source holds now, with their captions
ingest/times.parquet          when they were changed, for files of this machine
ingest/skipped.json           entries of the source that cannot be clips
ingest/completed.json         what the data set was completed from
index/train-00000.parquet     rows of a part, one for each outcome of its files
"""

import collections
import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dit_video.core.errors import UserError
from dit_video.core.storage import StoragePath, convert_storage_errors, read_document, read_range, write_document
from dit_video.data.ingest.formats import ListedClip, Listing
from dit_video.data.ingest.inspection import Outcome
from dit_video.data.records import RecordPlace, get_part_name, sort_splits
from dit_video.data.tables import INDEX_FOLDER, compute_row_id, list_parquet, read_bytes, read_parquet, write_parquet

FOLDER, _PLAN, _COMPLETED, _TIMES = "ingest", "parts-", "completed.json", "times.parquet"
MAX_PART_BYTES = 1 << 30
_MIN_PART_BYTES, _MAX_PART_FILES = 16 << 20, 4096
_PARTS_PER_SET = 64
"""Number of parts of a data set whose parts are neither of the smallest nor of the largest size."""
_LOCATION = ("path", "offset")
_COLUMNS = ("name", "size", *_LOCATION, "split", "content")
_TYPES = {"size": pa.int64(), "offset": pa.int64(), "captions": pa.list_(pa.string())}
_DURATION = ("start_us", "duration_us")
SCHEMA = pa.schema(
    {
        "id": pa.uint64(),
        "name": pa.string(),
        "source": pa.string(),
        "source_bytes": pa.int64(),
        "source_sha256": pa.string(),
        "outcome": pa.string(),
        "reason": pa.string(),
        "transient": pa.bool_(),
        **dict.fromkeys(_DURATION, pa.int64()),
        **dict.fromkeys(("height", "width", "frames"), pa.int32()),
        **dict.fromkeys(("fps", "seconds"), pa.float64()),
        **dict.fromkeys(("codec", "transfer", "audio_codec"), pa.string()),
        "transparent": pa.bool_(),
        **dict.fromkeys(("audio_rate", "audio_channels"), pa.int32()),
        "audio_offset": pa.float64(),
        **dict.fromkeys(("motion", "black", "frozen", "sharpness", "letterbox"), pa.float32()),
        "bars": pa.list_(pa.int32()),
        "hash": pa.list_(pa.uint64()),
        "method": pa.string(),
        "payload": pa.string(),
        "payload_bytes": pa.int64(),
        **dict.fromkeys(("offset", "length"), pa.int64()),
        "crc32": pa.uint32(),
    }
)
"""Columns of the index. Numbers that a row does not have are 0 if they are integers, else null."""


class IngestFolder:
    """The parts of a data set, and the files that each is made of.

    Args:
      folder: The data set.
      settings: Settings of the ingest, as JSON values; they may differ from earlier ones until a part is written.

    Raises:
      UserError: If the data set was made with other settings.
    """

    def __init__(self, folder: StoragePath, settings: Mapping[str, Any]):
        self.folder, self.settings = folder, dict(settings)
        self._own = folder / FOLDER
        path = self._own / "settings.json"
        written = read_document(path) if path.exists() else None
        if written is not None and list_parquet(folder / INDEX_FOLDER):
            now, before = map(_drop_idle_screening, (settings, written))
            if differences := sorted(key for key in {*now, *before} if now.get(key) != before.get(key)):
                raise UserError(
                    f"{folder} holds another data set: its {', '.join(differences)} differ. Use another folder, or the "
                    "settings with which it was started."
                )
            self.settings = written
        elif written != settings:
            write_document(path, self.settings)

    @property
    def parts(self) -> list[str]:
        """Return the names of all parts, in the order of their rows."""
        plans = [read_parquet(path, ["part"]) for path in self._list_plans()]
        names = {name for plan in plans for name in pc.unique(plan["part"]).to_pylist()}
        splits = sort_splits(name.rpartition("-")[0] for name in names)
        return sorted(names, key=lambda name: (splits.index(name.rpartition("-")[0]), name))

    def list_unfinished(self) -> list[str]:
        """Return the parts that are not written."""
        finished = set(list_parquet(self.folder / INDEX_FOLDER))
        return [name for name in self.parts if name not in finished]

    def read_clips(self, part: str) -> list[ListedClip]:
        """Return the files of a part."""
        for path in self._list_plans():
            if rows := _read_part(path, part).to_pylist():
                return [ListedClip(captions=(), **row) for row in rows]
        raise KeyError(part)

    def count_clips(self, parts: Sequence[str]) -> int:
        """Return the number of files of some parts."""
        expected_parts = pa.array(parts, pa.string())
        plans = (read_parquet(path, ["part"])["part"] for path in self._list_plans())
        return sum(pc.sum(pc.is_in(plan, value_set=expected_parts)).as_py() or 0 for plan in plans)

    def read_listing(self) -> pa.Table:
        """Return the names, sizes, locations, splits, contents and captions of the files that the source holds."""
        return _add_content(read_parquet(self._own / "listing.parquet"))

    def read_skipped(self) -> dict[str, Any]:
        """Return the format of the source, and its entries that are no clips."""
        return read_document(self._own / "skipped.json")

    def update(self, listing: Listing, *, is_fixed: bool = False) -> None:
        """Add parts for the files of a source that no part has.

        Args:
          listing: Files of the source.
          is_fixed: True if the data set must not change.

        Raises:
          UserError: If no part has a file of one of the source's names, so it is another source; or a fixed data set
            would change.
        """
        times = _read_times(listing.clips)
        listing = self._find_contents(listing, times)
        listed = _make_clip_table(listing.clips, (*_COLUMNS, "captions"))
        skipped = {
            "format": listing.format,
            "unlisted": [*listing.unlisted],
            "rejected": [*map(list, listing.rejected)],
        }
        paths = self._list_plans()
        if paths and (self._own / "listing.parquet").exists():  # it is written last
            known_listing = self.read_listing()
            if known_listing.select(listed.column_names) == listed and self.read_skipped() == skipped:
                if not (self._own / _TIMES).exists() or read_parquet(self._own / _TIMES) != times:
                    write_parquet(self._own / _TIMES, times)
                return
            before, now = (
                each.select([name for name in listed.column_names if name not in _LOCATION])
                for each in (known_listing, listed)
            )
            if is_fixed and before != now:
                changes = _describe_changes(before, now)
                raise UserError(
                    f"{self.folder} was made of other files than the source has now: {changes}. A run keeps its data: "
                    "restore the files, or start another run, which may begin with this one's weights (init_from)."
                )
        plans = [_add_content(read_parquet(path)) for path in paths]
        known = pa.chunked_array([_make_keys(plan) for plan in plans], pa.string())
        is_known = pc.is_in(_make_keys(listed), value_set=known.combine_chunks()).to_pylist()
        # A file may be as it was before the last change, and its clips be there.
        hashes = self._read_hashes([clip.name for clip in listing.clips if clip.content])
        new = [
            clip
            for clip, is_there in zip(listing.clips, is_known, strict=True)
            if not is_there and clip.content not in hashes.get((clip.name, clip.size), [])
        ]
        if plans and len(new) == len(listing.clips):
            is_begun = bool(list_parquet(self.folder / INDEX_FOLDER))
            if is_begun and not any(pc.any(pc.is_in(plan["name"], value_set=listed["name"])).as_py() for plan in plans):
                raise UserError(
                    f"{self.folder} holds another data set, without any file of this source. Use another folder."
                )
            if not is_begun:
                for path in paths:
                    path.unlink()
                plans = paths = []
        for path, plan in zip(paths, plans, strict=True):
            if (moved := _update_locations(plan, listed)) != plan:
                write_parquet(path, moved)
        if new:
            write_parquet(self._own / f"{_PLAN}{len(paths):03d}.parquet", self._plan(new, plans))
        write_document(self._own / "skipped.json", skipped)
        write_parquet(self._own / _TIMES, times)
        write_parquet(self._own / "listing.parquet", listed)

    def _find_contents(self, listing: Listing, times: pa.Table) -> Listing:
        """Return the listing with the contents of files that are others than those of their name and size were.

        A file that has another time of change than when it was listed last is read and compared with its rows. Members
        of tars, and files at addresses, have no such time.
        """
        if not (self._own / _TIMES).exists() or not (self._own / "listing.parquet").exists():
            return listing
        sizes = {clip.name: clip.size for clip in listing.clips}
        known = self.read_listing().select(["name", "size", "content"]).to_pylist()
        own = {row["name"]: row["content"] for row in known if sizes.get(row["name"]) == row["size"]}
        before, now = (
            dict(zip(each["name"].to_pylist(), each["modified"].to_pylist(), strict=True))
            for each in (read_parquet(self._own / _TIMES), times)
        )
        touched = [clip for clip in listing.clips if clip.name in own and now.get(clip.name) != before.get(clip.name)]
        hashes = self._read_hashes([clip.name for clip in touched])
        for clip in touched:
            recorded = hashes.get((clip.name, clip.size))
            if recorded is None:
                continue  # The file is read when its part is written, or with `retry`.
            with contextlib.suppress(OSError):  # which the inspection reports
                digest = hashlib.sha256(read_range(clip.path)).hexdigest()
                if digest != (own[clip.name] or recorded[0]):
                    own[clip.name] = digest
        return listing._replace(clips=tuple(clip._replace(content=own.get(clip.name, "")) for clip in listing.clips))

    def _read_hashes(self, names: Sequence[str]) -> dict[tuple[str, int], list[str]]:
        """Return the hashes of the files that rows were made of, by name and size, the first one first.

        Files that could not be read for a passing reason have none: they are read again with `retry`.
        """
        hashes: dict[tuple[str, int], list[str]] = {}
        if names:
            columns, wanted = ["source", "source_bytes", "source_sha256", "transient"], pa.array(names, pa.string())
            for part in list_parquet(self.folder / INDEX_FOLDER):
                rows = read_parquet(self.folder / INDEX_FOLDER / f"{part}.parquet", columns)
                is_wanted = pc.and_not(pc.is_in(rows["source"], value_set=wanted), rows["transient"])
                for row in rows.filter(is_wanted).to_pylist():
                    known = hashes.setdefault((row["source"], row["source_bytes"]), [])
                    if row["source_sha256"] not in known:
                        known.append(row["source_sha256"])
        return hashes

    def is_completed(self, options: Mapping[str, Any]) -> bool:
        """Return whether the data set was completed with these options, and nothing has changed since."""
        path = self._own / _COMPLETED
        return path.exists() and read_document(path) == self._describe(options)

    def mark_completed(self, options: Mapping[str, Any]) -> None:
        """Note that the data set is complete; it is not until then if a process is killed."""
        write_document(self._own / _COMPLETED, self._describe(options))

    def discard(self, part: str) -> None:
        """Remove the rows of a part, which is then not finished."""
        (self._own / _COMPLETED).unlink(missing_ok=True)
        (self.folder / INDEX_FOLDER / f"{part}.parquet").unlink()

    def _describe(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a completed data set depends on, as JSON values."""
        files = ("listing.parquet", "skipped.json")
        hashes = {name: hashlib.sha256(read_bytes(self._own / name)).hexdigest() for name in files}
        return {**options, **hashes, "parts": self.parts}

    def _list_plans(self) -> list[StoragePath]:
        return [self._own / f"{name}.parquet" for name in list_parquet(self._own, _PLAN)]

    @staticmethod
    def _plan(clips: Sequence[ListedClip], plans: Sequence[pa.Table]) -> pa.Table:
        """Return the clips with new parts that they are in, sorted by these.

        The earlier parts are read from `plans`, and not from files that another process has written since.
        """
        names_of_before = (name for plan in plans for name in pc.unique(plan["part"]).to_pylist())
        counts = collections.Counter(name.rpartition("-")[0] for name in names_of_before)
        total = sum(clip.size for clip in clips)
        max_bytes = min(max(total // _PARTS_PER_SET, _MIN_PART_BYTES), MAX_PART_BYTES)
        names: list[str] = []
        ordered: list[ListedClip] = []
        for split in sort_splits(clip.split for clip in clips):
            groups = _group((clip for clip in clips if clip.split == split), max_bytes)
            for number, members in enumerate(groups, counts[split]):
                names += [get_part_name(split, number)] * len(members)
                ordered += members
        return _make_clip_table(ordered, _COLUMNS).append_column("part", pa.array(names, pa.string()))


def _drop_idle_screening(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return settings in which a screening without steps is empty: it keeps every file whole, whatever its class.

    `min_shot` is no step, as it is about the shots that another step makes.
    """
    steps = (value for name, value in settings.get("screening", {}).items() if name != "min_shot")
    has_steps = any(value is not None and value is not False for value in steps)
    return settings if has_steps else {**settings, "screening": {}}


def make_row(
    outcome: Outcome, place: RecordPlace | None, *, source: str, source_bytes: int, source_sha256: str
) -> dict[str, Any]:
    """Return the row of an outcome, without the values that it does not have."""
    row = {
        # The size identifies a file that could not be read.
        "id": compute_row_id(outcome.name, source_sha256 or source_bytes, outcome.start_us, outcome.duration_us),
        "source": source,
        "source_bytes": source_bytes,
        "source_sha256": source_sha256,
        "outcome": outcome.kind,
        **{name: getattr(outcome, name) for name in ("name", "reason", "transient", *_DURATION)},
        **{name: getattr(outcome, name) for name in ("method", "payload", "payload_bytes")},
        **{f"audio_{name}": value for name, value in outcome.audio.items()},
    }
    if (shot := outcome.shot) is not None:
        row |= {name: getattr(shot, name) for name in SCHEMA.names if hasattr(shot, name) and name not in row}
        if shot.letterbox is not None:
            area = shot.letterbox.compute_area_share(shot.height, shot.width)
            row |= {"letterbox": area, "bars": list(shot.letterbox)}
    return row if place is None else row | place._asdict()


def make_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Return the rows as a table of the index."""
    rows = list(rows)
    columns = {}
    for field in SCHEMA:
        default = 0 if pa.types.is_integer(field.type) else False if pa.types.is_boolean(field.type) else None
        values = [row.get(field.name) for row in rows]
        columns[field.name] = pa.array([default if value is None else value for value in values], field.type)
    return pa.table(columns, schema=SCHEMA)


def _read_part(path: StoragePath, part: str) -> pa.Table:
    """Return the files of a part; of the plan, which is sorted by parts, only the rows around it are read."""
    with convert_storage_errors(path), path.open("rb") as content:
        columns = [name for name in _COLUMNS if name in pq.read_schema(content).names]
        return pq.read_table(content, columns=columns, filters=[("part", "==", part)], use_threads=False)


def _add_content(files: pa.Table) -> pa.Table:
    """Return a table of files with the column of contents, which older data sets lack."""
    if "content" in files.column_names:
        return files
    return files.append_column("content", pa.array([""] * len(files), pa.string()))


def _read_times(clips: Sequence[ListedClip]) -> pa.Table:
    """Return the times of change of files of this machine, in nanoseconds, by the names of their clips."""
    times: dict[str, int] = {}
    for clip in clips:
        if clip.offset is None and "://" not in clip.path:
            with contextlib.suppress(OSError):
                times[clip.name] = os.stat(clip.path).st_mtime_ns
    return pa.table({"name": pa.array(times, pa.string()), "modified": pa.array(times.values(), pa.int64())})


def _make_clip_table(clips: Sequence[ListedClip], names: Sequence[str]) -> pa.Table:
    return pa.table(
        {name: pa.array([getattr(clip, name) for clip in clips], _TYPES.get(name, pa.string())) for name in names}
    )


def _describe_changes(before: pa.Table, now: pa.Table) -> str:
    """Return what has been added, removed and changed (sizes, splits or captions)."""
    old, new = ({row["name"]: row for row in each.to_pylist()} for each in (before, now))
    kinds = {
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "changed": [name for name in new if name in old and new[name] != old[name]],
    }
    return ", ".join(f"{len(names)} {kind}, such as {names[0]}" for kind, names in kinds.items() if names)


def _make_keys(files: pa.Table) -> pa.Array:
    """Return what identifies each file: a file of another size is another one, and one that took its place."""
    sizes = files["size"].cast(pa.string())
    return pc.binary_join_element_wise(files["name"], sizes, files["content"], "\0").combine_chunks()


def _update_locations(plan: pa.Table, listed: pa.Table) -> pa.Table:
    """Return the files of parts with the locations where the source has them now: it may have been moved."""
    rows = pc.index_in(plan["name"], value_set=listed["name"]).combine_chunks()
    for name in _LOCATION:
        now = pc.if_else(pc.is_valid(rows), listed[name].combine_chunks().take(rows), plan[name].combine_chunks())
        plan = plan.set_column(plan.column_names.index(name), name, now)
    return plan


def _group(clips: Iterator[ListedClip], max_bytes: int) -> Iterator[list[ListedClip]]:
    """Yield consecutive clips of at most this size in bytes together, at least one."""
    group: list[ListedClip] = []
    size = 0
    for clip in clips:
        if group and (size + clip.size > max_bytes or len(group) == _MAX_PART_FILES):
            yield group
            group, size = [], 0
        group.append(clip)
        size += clip.size
    if group:
        yield group
