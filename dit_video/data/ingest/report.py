"""Report of an ingest, `report.json`: the outcome for every clip of a source, and sums over the data set."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dit_video.core.storage import StoragePath, read_document, write_document

REPORT = "report.json"
REPORT_COLUMNS = ("reason", "transient", "duration_us", "frames", "payload_bytes", "method")
"""Columns of the index that a report needs, besides names and outcomes."""

Reasons = tuple[tuple[str, str], ...]
"""Pairs of (name, reason)."""

_NUMBER = re.compile(r"(?<![A-Z][.-])(?<!\d)\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")
"""Numbers in a reason, except those in words such as H.264 and UTF-8."""
_QUOTED = re.compile(r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?!\w)""")
"""A name or another word of the input, as `repr` writes it; not the apostrophes of "doesn't … can't"."""


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """Outcome of an ingest. Counts of files differ from counts of clips, as a file may hold several clips."""

    files: int = 0
    """Number of entries of the source: used, quarantined, dropped and rejected ones together."""
    usable_files: int = 0
    """Number of files with at least one used clip."""
    usable: int
    """Number of clips in the data set."""
    frames: int
    """Total number of frames of the usable clips."""
    seconds: float = 0.0
    """Total duration of the usable clips: each frame is shown until the next one, the last one for an average
    frame's time."""
    bytes: int = 0
    """Total size of the usable clips, as they are stored."""
    methods: Mapping[str, int] = field(default_factory=dict)
    """Number of usable clips by how they were made: "whole" files, stream "copy", or "encode"."""
    accounts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Parts of files, and their duration in microseconds, by what became of them: "kept", "dropped" by the screening,
    "cut" away as too short for a clip, "duplicate", or "unreadable". Each microsecond of the source is in exactly one
    of them."""
    uncaptioned: int
    """Number of usable clips without a caption, which train the unconditional model alone."""
    quarantined: Reasons = ()
    """Files that could not be read or decoded, with reasons."""
    passing: tuple[str, ...] = ()
    """Names of quarantined files whose reason is transient: not the file's fault, but the moment's or the machine's."""
    dropped: Reasons = ()
    """Clips that the screening dropped, with reasons."""
    dropped_files: tuple[str, ...] = ()
    """Files without a clip that the screening kept."""
    rejected: Reasons = ()
    """Entries of the source that cannot be clips, such as a tar's entry outside of it, or a malformed row of a list
    (by its line), with reasons."""
    unlisted: tuple[str, ...] = ()
    """Files that the source's list does not name, or that without a list are neither clips nor captions (in tars only
    where no clip has a caption). They are left out, and are not counted in `files`."""
    format: str = "folder"
    """Format in which the source was read."""
    splits: Mapping[str, int] = field(default_factory=dict)
    """Number of clips of each split."""
    reasons: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Number of files or clips that were quarantined, dropped and rejected for each kind of reason (numbers and names
    removed)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the ingest."""
    reused: bool = False
    """True if the destination already held this data set."""

    def check(self) -> "IngestReport":
        """Return the report itself if its counts add up, so that no clip is lost silently.

        Raises:
          AssertionError: If the counts do not add up.
        """
        counted = self.usable_files + len(self.quarantined) + len(self.dropped_files) + len(self.rejected)
        if counted != self.files or sum(self.splits.values()) != self.usable:
            raise AssertionError(f"{self.files} files came in, and {counted} are accounted for")
        return self

    def write(self, folder: StoragePath) -> None:
        """Write `report.json`; the same report gives the same bytes."""
        document = dataclasses.asdict(self)
        document.pop("reused")
        write_document(folder / REPORT, document)

    @staticmethod
    def read(folder: StoragePath) -> "IngestReport":
        """Return the report that `write` wrote."""
        field_names = {field.name for field in dataclasses.fields(IngestReport)}
        fields = {name: value for name, value in read_document(folder / REPORT).items() if name in field_names}
        for name in ("quarantined", "dropped", "rejected"):
            fields[name] = tuple((clip, reason) for clip, reason in fields.get(name, ()))
        for name in ("passing", "dropped_files", "unlisted"):
            fields[name] = tuple(fields.get(name, ()))
        return IngestReport(**fields)


def make_report(
    rows: pa.Table, *, uncaptioned: int, skipped: Mapping[str, Any], settings: Mapping[str, Any]
) -> IngestReport:
    """Return the report of a data set.

    Args:
      rows: Rows of the table for all files that the source holds, with the columns of choice: a clip that is not chosen
        duplicates another one.
      uncaptioned: Number of used clips without a caption.
      skipped: Format of the source, and entries that are no clips: "unlisted" and "rejected".
      settings: Settings of the ingest.
    """
    is_duplicate = pc.and_(pc.equal(rows["outcome"], "kept"), pc.invert(rows["chosen"]))
    rows = rows.append_column("account", pc.if_else(is_duplicate, "duplicate", rows["outcome"]))
    used, unreadable, dropped = (
        rows.filter(pc.is_in(rows["account"], value_set=pa.array(names)))
        for names in (["kept"], ["unreadable"], ["dropped", "cut", "duplicate"])
    )
    reasons: dict[str, Reasons] = {
        "quarantined": tuple(_zip(unreadable, "name", "reason")),
        "dropped": tuple((name, reason or why) for name, reason, why in _zip(dropped, "name", "reason", "why")),
        "rejected": tuple((name, reason) for name, reason in skipped["rejected"]),
    }
    accounts = rows.group_by("account").aggregate([("duration_us", "sum"), ("duration_us", "count")])
    sources, usable_files = pc.unique(rows["source"]), pc.unique(used["source"])
    others = pa.concat_arrays([usable_files, pc.unique(unreadable["source"])])
    return IngestReport(
        files=len(sources) + len(skipped["rejected"]),
        usable_files=len(usable_files),
        usable=len(used),
        frames=pc.sum(used["frames"]).as_py() or 0,
        seconds=(pc.sum(used["duration_us"]).as_py() or 0) / 1e6,
        bytes=pc.sum(used["payload_bytes"]).as_py() or 0,
        methods=_count_values(used["method"]),
        accounts={
            kind: {"parts": count, "microseconds": duration}
            for kind, duration, count in sorted(_zip(accounts, "account", "duration_us_sum", "duration_us_count"))
        },
        uncaptioned=uncaptioned,
        passing=tuple(unreadable.filter(unreadable["transient"])["source"].to_pylist()),
        dropped_files=tuple(sources.filter(pc.invert(pc.is_in(sources, value_set=others))).to_pylist()),
        unlisted=tuple(skipped["unlisted"]),
        format=skipped["format"],
        splits=_count_values(used["split"]),
        quarantined=reasons["quarantined"],
        dropped=reasons["dropped"],
        rejected=reasons["rejected"],
        reasons={kind: _count_kinds(pairs) for kind, pairs in reasons.items() if pairs},
        settings=settings,
    ).check()


def _zip(table: pa.Table, *names: str) -> Iterable[tuple[Any, ...]]:
    return zip(*(table[name].to_pylist() for name in names), strict=True)


def _count_values(values: pa.Array | pa.ChunkedArray) -> dict[str, int]:
    """Return the counts of values, sorted by count, then by name."""
    counts = ((each["values"].as_py(), each["counts"].as_py()) for each in pc.value_counts(values))
    return dict(sorted(counts, key=lambda entry: (-entry[1], entry[0])))


def _count_kinds(pairs: Reasons) -> dict[str, int]:
    """Return the counts of reasons; those that differ only in numbers and quoted words are of one kind."""
    return _count_values(pa.array(_NUMBER.sub("N", _QUOTED.sub("'…'", reason)) for _, reason in pairs))
