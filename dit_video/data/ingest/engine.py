"""A folder of clips with captions becomes a data set of random access.

The clips' encoded bytes are kept as they are, beside the facts that planning needs, so that nothing is lost and a later
run can choose other sizes.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dit_video.data import builder
from dit_video.data.ingest.listing import Listed, list_clips
from dit_video.data.source import INDEX, ClipInfo, write_index
from dit_video.errors import DecodeError, UserError
from dit_video.files import atomic_path, read_json, write_json
from dit_video.video import probe

REPORT = "report.json"
SHARD_BYTES = 1 << 30

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What became of the clips of a folder."""

    usable: int
    quarantined: tuple[tuple[str, str], ...]
    """(name, reason) of what could not be decoded and was set aside."""
    uncaptioned: int
    """How many of the usable have an empty caption; they train the unconditional model alone."""
    unlisted: tuple[str, ...]
    """Media files in the folder that `metadata.csv` doesn't name; they were left out."""
    frames: int
    """of the usable, in total"""
    reused: bool = False
    """True where the destination already held this data set."""


def ingest(
    source: str | os.PathLike, destination: str | os.PathLike, *, progress: Progress | None = None
) -> IngestReport:
    """Read every clip of `source`, and write the data set, its index and `report.json` into the folder `destination`.

    The captions come from `metadata.csv` (columns `file_name` and `text`; others are ignored). Without that file every
    media file in the folder and its subfolders is taken, with the caption of the text file of the same name
    (`clip.mp4`, `clip.txt`), if there is one. Clips that can't be decoded are set aside and counted. A destination that
    already holds this data set (same names, bytes and captions) is reused.

    Args:
      source: the folder of clips.
      destination: the folder to be made; whole or absent.
      progress: called with (done, total) clips.

    Raises:
      MissingError: no such folder.
      UserError: no clips, or none that can be decoded; `metadata.csv` that names files that don't exist or names one
        twice, lacks a column or isn't UTF-8; a destination that holds something else.
    """
    source, destination = Path(source), Path(destination)
    listing = list_clips(source)
    listed = listing.clips
    fingerprint = _fingerprint(listed)
    if _holds(destination, fingerprint, source):
        return dataclasses.replace(_read_report(destination / REPORT), reused=True)

    infos: list[ClipInfo] = []
    quarantined: list[tuple[str, str]] = []
    examples = _examples(listed, infos, quarantined, progress)
    first = next(examples, None)
    if first is None:
        name, reason = quarantined[0]
        raise UserError(
            f"none of the {len(listed)} clips in {source} can be decoded (first: {name}: {reason}); "
            "use files that a video player opens"
        )
    with atomic_path(destination) as folder:
        shards = _shards(listed, itertools.chain([first], examples))
        builder.write_records(folder, builder.Clips, features=_features(), shards=shards)
        report = IngestReport(
            usable=len(infos),
            quarantined=tuple(quarantined),
            uncaptioned=sum(not info.caption for info in infos),
            unlisted=listing.unlisted,
            frames=sum(info.frames for info in infos),
        )
        write_index(folder, infos, fingerprint)
        write_json(folder / REPORT, dataclasses.asdict(report))
    return report


def _fingerprint(listed: Sequence[Listed]) -> str:
    """Of names, captions, sizes and splits; not of where the source lies."""
    facts = [(clip.name, clip.captions, clip.size, clip.split) for clip in listed]
    return hashlib.sha256(json.dumps(facts, ensure_ascii=True).encode()).hexdigest()


def _holds(destination: Path, fingerprint: str, source: Path) -> bool:
    """Whether the data set is there already."""
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return False
    if not (destination / INDEX).is_file():
        raise UserError(f"{destination} exists and is not an ingested data set; name a folder that does not exist")
    if read_json(destination / INDEX).get("fingerprint") != fingerprint:
        raise UserError(
            f"{destination} holds another data set than {source} (names, bytes or captions differ); "
            "name another folder, or remove it"
        )
    return True


def _read_report(path: Path) -> IngestReport:
    fields = read_json(path)
    pairs = tuple((name, reason) for name, reason in fields.pop("quarantined"))
    return IngestReport(quarantined=pairs, unlisted=tuple(fields.pop("unlisted")), **fields)


def _shards(listed: Sequence[Listed], examples: Iterator[tuple[int, dict]]) -> list[builder.Shard]:
    """One shard for every gigabyte of files, known before clips are read; examples come with their shard's number."""
    last = shard_of(listed)[-1]
    ahead: list[tuple[int, dict]] = []

    def shard(number: int) -> Iterator[dict]:
        while True:
            at, example = ahead.pop() if ahead else next(examples, (last + 1, {}))
            if at != number:
                ahead.append((at, example))
                return
            yield example

    return [functools.partial(shard, number) for number in range(last + 1)]


def shard_of(listed: Sequence[Listed]) -> list[int]:
    """The shard of every clip: consecutive clips, cut where the running total of bytes passes `SHARD_BYTES`."""
    before = np.cumsum([0, *(clip.size for clip in listed)])[:-1]
    # Numbered without gaps: a clip of several gigabytes must not leave empty shards behind it.
    return np.unique(before // SHARD_BYTES, return_inverse=True)[1].tolist()


def _examples(
    listed: Sequence[Listed],
    infos: list[ClipInfo],
    quarantined: list[tuple[str, str]],
    progress: Progress | None,
) -> Iterator[tuple[int, dict]]:
    """(shard, example) of every usable clip. Fills `infos` and `quarantined` on the way."""
    for done, (clip, shard) in enumerate(zip(listed, shard_of(listed), strict=True)):
        if progress is not None:
            progress(done, len(listed))
        try:
            encoded, info = _inspect(clip)
        except DecodeError as error:
            quarantined.append((clip.name, str(error)))
            continue
        infos.append(info._replace(record=len(infos)))
        yield shard, {"clip": encoded, **_facts(info)}
    if progress is not None:
        progress(len(listed), len(listed))


def _features() -> dict[str, Any]:
    return {
        "clip": builder.content(),
        "name": tfds.features.Text(),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "height": np.int32,
        "width": np.int32,
        "frames": np.int32,
        "fps": np.float32,
        "seconds": np.float32,
    }


def _facts(info: ClipInfo) -> dict[str, Any]:
    """What a record says beside the bytes."""
    return {name: getattr(info, name) for name in _features() if name != "clip"}


def _inspect(clip: Listed) -> tuple[bytes, ClipInfo]:
    if clip.size > builder.MAX_BYTES:
        raise DecodeError(f"{clip.size / 2**30:.1f} GiB in one file, 2 GiB is the limit; cut it into clips")
    try:
        encoded = clip.read()
    except OSError as error:
        raise DecodeError(f"cannot be read ({error.strerror})") from error
    facts = probe(encoded)
    info = ClipInfo(
        name=clip.name,
        captions=clip.captions,
        split=clip.split,
        height=facts.height,
        width=facts.width,
        frames=facts.frames,
        fps=facts.fps,
        seconds=facts.seconds,
    )
    return encoded, info
