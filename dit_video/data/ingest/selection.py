"""What of the inspected files is used, under which names, and in which order: what needs the facts of all of them."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dit_video.core.errors import UserError
from dit_video.data.clips import ClipInfo
from dit_video.data.ingest.duplicates import drop_duplicates
from dit_video.data.ingest.formats import Listed
from dit_video.data.ingest.formats.listed import quoted
from dit_video.data.ingest.inspection import Inspected
from dit_video.data.ingest.quality_filter import ScreeningConfig, Shot
from dit_video.data.records.builder import in_order


class Selection(NamedTuple):
    """What a data set holds."""

    files: Mapping[str, tuple[int, ...]]
    """Of each split the files that are used, by their numbers in the listing: its records."""
    infos: tuple[ClipInfo, ...]
    """The clips, in the order of their records."""
    dropped: tuple[tuple[str, str], ...]
    """(name, reason) of clips that are not used"""
    dropped_files: tuple[str, ...]
    """Files of which nothing is used."""

    @property
    def in_order(self) -> list[int]:
        """The files of all splits, as their records are numbered."""
        return [number for numbers in self.files.values() for number in numbers]


def select(clips: Sequence[Listed], verdicts: Sequence[Inspected], config: ScreeningConfig) -> Selection:
    """Leave out duplicates, where that is asked for, and number the records: split by split, in the listing's order.

    Args:
      clips: the listing.
      verdicts: of each of them.
      config: the screening.

    Raises:
      UserError: two clips of one name.
    """
    kept, duplicates = _without_duplicates(verdicts, config)
    used = [number for number, shots in enumerate(kept) if shots]
    splits = in_order(clips[number].split for number in used)
    files = {split: tuple(number for number in used if clips[number].split == split) for split in splits}
    infos = [
        _info(clips[number], shot, record)
        for record, number in enumerate(number for numbers in files.values() for number in numbers)
        for shot in kept[number]
    ]
    _check_names(infos)
    dropped = [(*verdict.dropped, *more) for verdict, more in zip(verdicts, duplicates, strict=True)]
    empty = [not shots and not verdict.reason for shots, verdict in zip(kept, verdicts, strict=True)]
    return Selection(
        files,
        tuple(infos),
        tuple(pair for pairs in dropped for pair in pairs),
        tuple(itertools.compress((clip.name for clip in clips), empty)),
    )


def _without_duplicates(
    verdicts: Sequence[Inspected], config: ScreeningConfig
) -> tuple[list[list[Shot]], list[list[tuple[str, str]]]]:
    """Of every file the clips that stay, and (name, reason) of those that don't."""
    shots = [(number, shot) for number, verdict in enumerate(verdicts) for shot in verdict.shots]
    if config.duplicates is None:
        found: Sequence[int | None] = [None] * len(shots)
    else:
        found = drop_duplicates([shot.hash for _, shot in shots], distance=config.duplicates)
    kept: list[list[Shot]] = [[] for _ in verdicts]
    dropped: list[list[tuple[str, str]]] = [[] for _ in verdicts]
    for (number, shot), first in zip(shots, found, strict=True):
        if first is None:
            kept[number].append(shot)
        else:
            dropped[number].append((shot.name, f"shows what {quoted(shots[first][1].name)} shows"))
    return kept, dropped


def _info(clip: Listed, shot: Shot, record: int) -> ClipInfo:
    return ClipInfo(
        name=shot.name,
        captions=tuple(clip.captions),
        height=shot.height,
        width=shot.width,
        frames=shot.frames,
        fps=shot.fps,
        seconds=shot.seconds,
        start=shot.start,
        record=record,
        split=clip.split,
    )


def _check_names(infos: Sequence[ClipInfo]) -> None:
    """A file could be called what a shot of another is called."""
    seen: set[str] = set()
    for info in infos:
        if info.name in seen:
            raise UserError(f"two clips would be called {info.name}; rename the file, `#` numbers the shots of one")
        seen.add(info.name)
