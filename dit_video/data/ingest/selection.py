"""Selection, naming and ordering of the clips of a data set, which depend on the verdicts on all files."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dit_video.core.errors import UserError
from dit_video.data.clips import ClipInfo
from dit_video.data.ingest.duplicates import drop_duplicates
from dit_video.data.ingest.formats import ListedClip
from dit_video.data.ingest.inspection import Inspection
from dit_video.data.ingest.quality_filter import ScreeningConfig, Shot
from dit_video.data.records.shards import sort_splits


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
    dropped: list[tuple[str, str]] = []
    dropped_files: list[str] = []
    for clip, verdict, shots, duplicate_pairs in zip(clips, verdicts, kept_shots, duplicates, strict=True):
        dropped += [*verdict.dropped, *duplicate_pairs]
        dropped_files += [] if shots or verdict.reason else [clip.name]
    return Selection(files, tuple(infos), tuple(dropped), tuple(dropped_files))


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
            dropped[number].append((shot.name, f"shows what {shots[original][1].name!r} shows"))
    return kept, dropped


def _make_info(clip: ListedClip, shot: Shot, record: int) -> ClipInfo:
    facts = {field: getattr(shot, field) for field in ("name", "height", "width", "frames", "fps", "seconds", "start")}
    return ClipInfo(**facts, captions=tuple(clip.captions), record=record, split=clip.split)


def _check_names(infos: Sequence[ClipInfo]) -> None:
    """Raise if two clips have the same name: a file may be called like a shot of another file."""
    for name, count in Counter(info.name for info in infos).items():
        if count > 1:
            raise UserError(f"two clips would be called {name}; rename the file, as `#` numbers the shots of a file")
