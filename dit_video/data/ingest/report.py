"""What became of every clip of a source, and what the data set is like: `report.json`."""

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_video.core.files import write_json
from dit_video.core.storage import Place, read_document
from dit_video.data.clips import ClipInfo
from dit_video.data.ingest.captions import caption_statistics

REPORT = "report.json"

Reasons = tuple[tuple[str, str], ...]
"""(name, reason)"""

_DURATIONS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)
"""Seconds; where the bins of lengths end."""
_SHAPES = ((0.5, "1:2 and narrower"), (0.9, "upright"), (1.1, "square"), (1.6, "4:3 to 8:5"), (2.0, "16:9"))
"""Width over height; where the bins end."""
_NUMBER = re.compile(r"(?<![A-Z][.-])(?<!\d)\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")
"""but those of H.264 and UTF-8"""
_QUOTED = re.compile(r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?!\w)""")
"""A name or another word of the input, as `repr` writes it; not the apostrophes of "doesn't … can't"."""


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What became of the clips of a source. Files are counted, which may hold several clips (shots)."""

    files: int = 0
    """entries of the source: those that are used, quarantined, dropped and rejected, together"""
    usable_files: int = 0
    usable: int
    """clips in the data set"""
    frames: int
    """of the usable clips, in total"""
    seconds: float = 0.0
    """of the usable clips, in total: every frame is shown until the next one, the last one as long as an average one"""
    bytes: int = 0
    """of the usable files, as they are stored"""
    reencoded: int = 0
    """How many of the usable files were stored anew, on request."""
    reencoded_from: int = 0
    """bytes of these as they came"""
    reencoded_to: int = 0
    """bytes of these as they are stored"""
    uncaptioned: int
    """How many of the usable have no caption; they train the unconditional model alone."""
    quarantined: Reasons = ()
    """Files that could not be read or decoded and were set aside."""
    passing: tuple[str, ...] = ()
    """The names of those of them whose reason may pass: not the file's fault, but the moment's or the machine's."""
    dropped: Reasons = ()
    """Clips that the screening left out."""
    dropped_files: tuple[str, ...] = ()
    """Files of which it left nothing."""
    rejected: Reasons = ()
    """Entries of the source that cannot be clips, such as a tar's entry outside of it, or a row of a list (by its line)
    that is not well formed."""
    unlisted: tuple[str, ...] = ()
    """Files that the source's list doesn't name, or without a list are neither clips nor captions; they were left out,
    and are not among `files`."""
    format: str = "folder"
    """how the source was read"""
    splits: Mapping[str, int] = field(default_factory=dict)
    """clips of each"""
    reasons: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """How many files or clips were quarantined, dropped and rejected for each kind of reason (numbers and names left
    out)."""
    histograms: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Of the usable clips: sizes, shapes, lengths, frames, rates; of the usable files: codecs."""
    captions: Mapping[str, Any] = field(default_factory=dict)
    """`CaptionStatistics` of the usable clips"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """the screening's"""
    reused: bool = False
    """True where the destination already held this data set."""

    def check(self) -> "IngestReport":
        """Itself, if the counts add up: nothing is lost in silence."""
        counted = self.usable_files + len(self.quarantined) + len(self.dropped_files) + len(self.rejected)
        if counted != self.files or sum(self.splits.values()) != self.usable:
            raise AssertionError(f"{self.files} files came in, and {counted} are accounted for")
        return self

    def write(self, folder: Path) -> None:
        """As `report.json`; the same report gives the same bytes."""
        document = dataclasses.asdict(self)
        document.pop("reused")
        write_json(folder / REPORT, document)

    @staticmethod
    def read(folder: Place) -> "IngestReport":
        """What `write` wrote."""
        known = {field.name for field in dataclasses.fields(IngestReport)}
        fields = {name: value for name, value in read_document(folder / REPORT).items() if name in known}
        for name in ("quarantined", "dropped", "rejected"):
            fields[name] = tuple((clip, reason) for clip, reason in fields.get(name, ()))
        for name in ("passing", "dropped_files", "unlisted"):
            fields[name] = tuple(fields.get(name, ()))
        return IngestReport(**fields)


def summarise(infos: Sequence[ClipInfo], codecs: Iterable[str], **given: Any) -> IngestReport:
    """The report of a data set.

    Args:
      infos: its clips.
      codecs: of its files.
      given: what else the report says; see `IngestReport`.
    """
    reasons = {kind: _kinds(given[kind]) for kind in ("quarantined", "dropped", "rejected") if given[kind]}
    return IngestReport(
        usable=len(infos),
        frames=sum(info.frames for info in infos),
        seconds=round(sum(duration(info) for info in infos), 3),
        uncaptioned=sum(not info.captions for info in infos),
        splits=_counted(info.split for info in infos),
        reasons=reasons,
        histograms={
            "sizes": _counted(f"{info.height}×{info.width}" for info in infos),
            "shapes": _binned((info.width / info.height for info in infos), _shape, _shapes()),
            "lengths": _binned((duration(info) for info in infos if info.frames > 1), _length, _lengths()),
            "frames": _binned((info.frames for info in infos), _frames, _frame_counts()),
            "rates": _counted(f"{info.fps:.4g} fps" for info in infos if info.frames > 1),
            "codecs": _counted(codecs),
        },
        captions=dataclasses.asdict(caption_statistics([info.captions for info in infos])),
        **given,
    ).check()


def duration(info: ClipInfo) -> float:
    """Seconds for which a clip is shown, its last frame as long as an average one."""
    return info.seconds + (1 / info.fps if info.frames > 1 else 0.0)


def _counted(values: Iterable[str]) -> dict[str, int]:
    """By count, then by name."""
    return dict(sorted(collections.Counter(values).items(), key=lambda entry: (-entry[1], entry[0])))


def _binned(values: Iterable[float | int], bin: Callable[[float | int], str], names: Sequence[str]) -> dict[str, int]:
    """In the order of the bins, without the empty ones at the ends."""
    counts = collections.Counter(map(bin, values))
    held = [index for index, name in enumerate(names) if counts[name]]
    return {name: counts[name] for name in names[held[0] : held[-1] + 1]} if held else {}


def _lengths() -> list[str]:
    """'< 1 s', '1–2 s', …, '≥ 3600 s'."""
    between = [f"{low}–{high} s" for low, high in itertools.pairwise(_DURATIONS)]
    return [f"< {_DURATIONS[0]} s", *between, f"≥ {_DURATIONS[-1]} s"]


def _length(seconds: float | int) -> str:
    return _lengths()[sum(seconds >= end for end in _DURATIONS)]


def _frame_counts() -> list[str]:
    """'1', '2', '3–4', '5–8', …: powers of two."""
    return ["1", "2", *(f"{2**power + 1}–{2 ** (power + 1)}" for power in range(1, 32))]


def _frames(count: float | int) -> str:
    return _frame_counts()[(int(count) - 1).bit_length()]


def _shapes() -> list[str]:
    return [*(name for _, name in _SHAPES), "wider"]


def _shape(ratio: float | int) -> str:
    return _shapes()[sum(ratio >= end for end, _ in _SHAPES)]


def _kinds(pairs: Reasons) -> dict[str, int]:
    """Reasons that differ in numbers, and in what is in quotes, alone are of one kind."""
    return _counted(_NUMBER.sub("N", _QUOTED.sub("'…'", reason)) for _, reason in pairs)
