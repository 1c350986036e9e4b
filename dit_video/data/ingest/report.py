"""Report of an ingest, `report.json`: the outcome for every clip of a source, and statistics of the data set."""

import bisect
import collections
import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_video.core.files import write_json
from dit_video.core.storage import StoragePath, read_document
from dit_video.data.clips import ClipInfo
from dit_video.data.ingest.caption_statistics import compute_caption_statistics

REPORT = "report.json"

Reasons = tuple[tuple[str, str], ...]
"""Pairs of (name, reason)."""

_LENGTH_EDGES = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)
"""Upper edges of the bins of lengths, in seconds."""
_LENGTH_BINS = ("< 1 s", *(f"{low}–{high} s" for low, high in itertools.pairwise(_LENGTH_EDGES)), "≥ 3600 s")
_SHAPE_EDGES = (0.5, 0.9, 1.1, 1.6, 2.0)
"""Upper edges of the bins of width over height."""
_SHAPE_BINS = ("1:2 and narrower", "upright", "square", "4:3 to 8:5", "16:9", "wider")
_FRAME_BINS = ("1", "2", *(f"{2**power + 1}–{2 ** (power + 1)}" for power in range(1, 32)))
"""Names of the bins of numbers of frames, which end at powers of two."""
_NUMBER = re.compile(r"(?<![A-Z][.-])(?<!\d)\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")
"""Numbers in a reason, except those in words such as H.264 and UTF-8."""
_QUOTED = re.compile(r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?!\w)""")
"""A name or another word of the input, as `repr` writes it; not the apostrophes of "doesn't … can't"."""


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """Outcome of an ingest. Counts of files differ from counts of clips, as a file may hold several clips (shots)."""

    files: int = 0
    """Number of entries of the source: used, quarantined, dropped and rejected ones together."""
    usable_files: int = 0
    """Number of files that are used."""
    usable: int
    """Number of clips in the data set."""
    frames: int
    """Total number of frames of the usable clips."""
    seconds: float = 0.0
    """Total duration of the usable clips: each frame is shown until the next one, the last one for an average
    frame's time."""
    bytes: int = 0
    """Total size of the usable files, as they are stored."""
    reencoded: int = 0
    """Number of usable files that were re-encoded on request."""
    reencoded_from: int = 0
    """Total original size of the re-encoded files in bytes."""
    reencoded_to: int = 0
    """Total stored size of the re-encoded files in bytes."""
    uncaptioned: int
    """Number of usable clips without a caption, which train the unconditional model alone."""
    quarantined: Reasons = ()
    """Files that could not be read or decoded, with reasons."""
    passing: tuple[str, ...] = ()
    """Names of quarantined files whose reason is transient: not the file's fault, but the moment's or the machine's."""
    dropped: Reasons = ()
    """Clips that the screening dropped, with reasons."""
    dropped_files: tuple[str, ...] = ()
    """Files of which the screening kept no clip."""
    rejected: Reasons = ()
    """Entries of the source that cannot be clips, such as a tar's entry outside of it, or a malformed row of a list
    (by its line), with reasons."""
    unlisted: tuple[str, ...] = ()
    """Files that the source's list does not name, or that without a list are neither clips nor captions. They are
    left out, and are not counted in `files`."""
    format: str = "folder"
    """Format in which the source was read."""
    splits: Mapping[str, int] = field(default_factory=dict)
    """Number of clips of each split."""
    reasons: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Number of files or clips that were quarantined, dropped and rejected for each kind of reason (numbers and names
    removed)."""
    histograms: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Histograms of the usable clips (sizes, shapes, lengths, frames, rates) and of the usable files (codecs,
    transfer functions before HDR was mapped to SDR)."""
    captions: Mapping[str, Any] = field(default_factory=dict)
    """`CaptionStatistics` of the usable clips."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Configuration of the screening, and of the re-encoding if any."""
    reused: bool = False
    """True if the destination already held this data set."""

    def check(self) -> "IngestReport":
        """Return the report itself if its counts add up, so that no clip is lost silently.

        Raises:
          AssertionError: the counts do not add up.
        """
        counted = self.usable_files + len(self.quarantined) + len(self.dropped_files) + len(self.rejected)
        if counted != self.files or sum(self.splits.values()) != self.usable:
            raise AssertionError(f"{self.files} files came in, and {counted} are accounted for")
        return self

    def write(self, folder: Path) -> None:
        """Write `report.json`; the same report gives the same bytes."""
        document = dataclasses.asdict(self)
        document.pop("reused")
        write_json(folder / REPORT, document)

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
    infos: Sequence[ClipInfo], codecs: Iterable[str], transfers: Iterable[str], **fields: Any
) -> IngestReport:
    """Return the report of a data set.

    Args:
      infos: clips of the data set.
      codecs: codecs of its files.
      transfers: transfer functions of its files.
      fields: all other fields of `IngestReport`.
    """
    reasons = {kind: _count_kinds(fields[kind]) for kind in ("quarantined", "dropped", "rejected") if fields[kind]}
    ratios = [info.width / info.height for info in infos]
    lengths = [compute_duration(info) for info in infos if info.frames > 1]
    return IngestReport(
        usable=len(infos),
        frames=sum(info.frames for info in infos),
        seconds=round(sum(compute_duration(info) for info in infos), 3),
        uncaptioned=sum(not info.captions for info in infos),
        splits=_count_values(info.split for info in infos),
        reasons=reasons,
        histograms={
            "sizes": _count_values(f"{info.height}×{info.width}" for info in infos),
            "shapes": _count_bins((bisect.bisect_right(_SHAPE_EDGES, ratio) for ratio in ratios), _SHAPE_BINS),
            "lengths": _count_bins((bisect.bisect_right(_LENGTH_EDGES, length) for length in lengths), _LENGTH_BINS),
            "frames": _count_bins(((info.frames - 1).bit_length() for info in infos), _FRAME_BINS),
            "rates": _count_values(f"{info.fps:.4g} fps" for info in infos if info.frames > 1),
            "codecs": _count_values(codecs),
            "transfers": _count_values(transfers),
        },
        captions=compute_caption_statistics([info.captions for info in infos]),
        **fields,
    ).check()


def compute_duration(info: ClipInfo) -> float:
    """Return the seconds for which a clip is shown, its last frame for an average frame's time."""
    return info.seconds + (1 / info.fps if info.frames > 1 else 0.0)


def _count_values(values: Iterable[str]) -> dict[str, int]:
    """Return the counts of values, sorted by count, then by name."""
    return dict(sorted(collections.Counter(values).items(), key=lambda entry: (-entry[1], entry[0])))


def _count_bins(indices: Iterable[int], names: Sequence[str]) -> dict[str, int]:
    """Return the counts of bins in their order, without empty bins at the ends."""
    counts = collections.Counter(indices)
    return {names[index]: counts[index] for index in range(min(counts), max(counts) + 1)} if counts else {}


def _count_kinds(pairs: Reasons) -> dict[str, int]:
    """Return the counts of reasons; those that differ only in numbers and quoted words are of one kind."""
    return _count_values(_NUMBER.sub("N", _QUOTED.sub("'…'", reason)) for _, reason in pairs)
