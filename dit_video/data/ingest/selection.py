"""Selection, naming and ordering of the clips of a data set, which depend on the verdicts on all files."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dit_video.core.errors import UserError
from dit_video.data.clips import ClipInfo
from dit_video.data.ingest.duplicates import drop_duplicates
from dit_video.data.ingest.formats import ListedClip
from dit_video.data.ingest.formats.types import quote_name
from dit_video.data.ingest.inspection import Inspection
from dit_video.data.ingest.quality_filter import ScreeningConfig, Shot
from dit_video.data.records.builder import sort_splits


class Selection(NamedTuple):
    """Files and clips that a data set holds."""

    files: Mapping[str, tuple[int, ...]]
    """For each split the files that are used, by their numbers in the listing; each file is a record."""
    infos: tuple[ClipInfo, ...]
    """Clips in the order of their records."""
    dropped: tuple[tuple[str, str], ...]
    """Name and reason of each clip that is not used."""
    dropped_files: tuple[str, ...]
    """Names of files of which no clip is used."""

    @property
    def record_files(self) -> list[int]:
        """Return the files of all splits in the order of their records."""
        return [number for numbers in self.files.values() for number in numbers]


def select(clips: Sequence[ListedClip], verdicts: Sequence[Inspection], config: ScreeningConfig) -> Selection:
    """Drop duplicates if the config says so, and number the records split by split, in the order of the listing.

    Args:
      clips: clips of the listing.
      verdicts: verdict on each clip.
      config: configuration of the screening.

    Raises:
      UserError: two clips have the same name.
    """
    kept_shots, duplicates = _drop_duplicates(verdicts, config)
    used = [number for number, shots in enumerate(kept_shots) if shots]
    splits = sort_splits(clips[number].split for number in used)
    files = {split: tuple(number for number in used if clips[number].split == split) for split in splits}
    infos = [
        _make_info(clips[number], shot, record)
        for record, number in enumerate(number for numbers in files.values() for number in numbers)
        for shot in kept_shots[number]
    ]
    _check_names(infos)
    dropped = [
        (*verdict.dropped, *duplicate_pairs) for verdict, duplicate_pairs in zip(verdicts, duplicates, strict=True)
    ]
    empty = [not shots and not verdict.reason for shots, verdict in zip(kept_shots, verdicts, strict=True)]
    return Selection(
        files,
        tuple(infos),
        tuple(pair for pairs in dropped for pair in pairs),
        tuple(itertools.compress((clip.name for clip in clips), empty)),
    )


def _drop_duplicates(
    verdicts: Sequence[Inspection], config: ScreeningConfig
) -> tuple[list[list[Shot]], list[list[tuple[str, str]]]]:
    """Return for every file the clips that are kept, and (name, reason) of those that are dropped."""
    shots = [(number, shot) for number, verdict in enumerate(verdicts) for shot in verdict.shots]
    if config.duplicates is None:
        originals: Sequence[int | None] = [None] * len(shots)
    else:
        originals = drop_duplicates([shot.hash for _, shot in shots], distance=config.duplicates)
    kept: list[list[Shot]] = [[] for _ in verdicts]
    dropped: list[list[tuple[str, str]]] = [[] for _ in verdicts]
    for (number, shot), original in zip(shots, originals, strict=True):
        if original is None:
            kept[number].append(shot)
        else:
            dropped[number].append((shot.name, f"shows what {quote_name(shots[original][1].name)} shows"))
    return kept, dropped


def _make_info(clip: ListedClip, shot: Shot, record: int) -> ClipInfo:
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
    """Raise if two clips have the same name: a file may be called like a shot of another file."""
    names: set[str] = set()
    for info in infos:
        if info.name in names:
            raise UserError(
                f"two clips would be called {info.name}; rename the file, as `#` numbers the shots of a file"
            )
        names.add(info.name)
