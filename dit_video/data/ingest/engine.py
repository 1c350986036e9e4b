"""A source of clips becomes a data set of random access.

The clips' encoded bytes are kept as they are, beside the facts that planning needs, so that nothing is lost and a later
run can choose other sizes; where that is asked for, what is over a limit is stored anew. Two passes: the first reads,
decodes and screens every file, in several processes, and keeps the facts alone, beside files that it stored anew; the
second copies the bytes of what is used into the data set, one file at a time. Between them stands what needs all facts:
duplicates, and the numbers of records. So the result doesn't depend on who was ready first.

All work is done in `DESTINATION.ingest`, beside the destination: a journal of the first pass and the files that it
stored, which outlive a killed run, and the second pass's files, which become the destination by one rename.

A clip may fail for a reason that is not its own: a file that cannot be read or is being written, a disk's error, too
little memory, too little time. It is tried once more in the run, at its end, with no other beside it. If it fails again
it is quarantined like a broken one, so that one file does not hold up a million, but counted apart (the report's
`passing`) and not in the journal, which then stays: `retry` inspects those clips alone, and where one of them can now
be used makes the data set anew. It isn't done unasked, as a data set that trainings read must not change under them.
"""

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.storage import Address, Place, place, publish, read_document
from dit_video.data.clips import INDEX, ClipInfo, write_index
from dit_video.data.ingest.formats import Format, Listed, Listing, list_clips
from dit_video.data.ingest.inspection import Inspected, InspectionConfig
from dit_video.data.ingest.journal import Journal
from dit_video.data.ingest.quality_filter import ScreeningConfig
from dit_video.data.ingest.reencoder import Reencode
from dit_video.data.ingest.report import REPORT, IngestReport, summarise
from dit_video.data.ingest.selection import Selection, select
from dit_video.data.ingest.workers import Workers, cores, worth
from dit_video.data.records import builder
from dit_video.data.records.cluster import Beam
from dit_video.data.records.reference import ChangedError

WORK = ".ingest"
"""Ends the name of the folder beside the destination."""
_ANEW = "reencoded"
"""The folder inside of it that holds files that were stored anew."""

_COPIED = re.compile(
    rf"(clips-.*\.array_record-.*|dataset_info\.json|features\.json|{re.escape(REPORT)}|REPORT\.html)$"
)
"""What a copy to a bucket has while it has no index: before it is whole, or when a whole one is being replaced."""

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """What is taken, and what for.

    Raises:
      UserError: a time limit that isn't positive.
    """

    format: Format | Literal["auto"] = "auto"
    """how the source is read; "auto" finds out"""
    ucf101_split: Literal[1, 2, 3] = 1
    """which of UCF-101's three pairs of train and test lists"""
    screening: ScreeningConfig = dataclasses.field(default_factory=ScreeningConfig)
    """the steps, all off by default"""
    reencode: Reencode = dataclasses.field(default_factory=Reencode)
    """which files are stored anew; none by default"""
    time_limit: float | int = 120.0
    """Seconds that a file may take to be inspected, and ten times as much more for every gigabyte of it; three times as
    long where files are stored anew. One that takes longer, in a second try too, is quarantined for a reason that may
    pass: `retry` may give it more time."""

    def __post_init__(self) -> None:
        if not 0 < self.time_limit < float("inf"):
            raise UserError(f"time_limit is a positive number of seconds, {self.time_limit} was given")

    @property
    def patience(self) -> float | int:
        """Seconds that a file of few bytes may take."""
        return self.time_limit * (3 if self.reencode.asked else 1)


def ingest(
    source: str | os.PathLike,
    destination: Address,
    *,
    config: IngestConfig = IngestConfig(),
    progress: Progress | None = None,
    workers: int | None = None,
    beam: Beam | None = None,
    retry: bool = False,
) -> IngestReport:
    """Read every clip of `source`, and write the data set, its index and `report.json` into the folder `destination`.

    The same source gives the same bytes, however many processes work, and however often they were interrupted. Clips
    that can't be decoded are set aside and counted. A destination that already holds this data set (same names, sizes,
    captions and settings) is reused. A run that was killed continues where it was.

    Args:
      source: the clips, in any format that `list_clips` reads.
      destination: the folder to be made; whole or absent. At an address (`gs://…`) too: it is made in a local folder of
        temporary files, as ArrayRecord writes no others, and copied, the index last, without which it cannot be read.
      config: what is taken.
      progress: called with (done, total) clips that are inspected, and from 0 again with those that are written.
      workers: how many processes inspect clips, at most; by default one for every core. With Beam, ignored.
      beam: inspect and write in a pipeline of Apache Beam, on machines that share the disk of source and destination.
      retry: if the destination holds the data set but for clips that failed for a reason that may pass, try those
        again; the data set is replaced if one of them can be used now.

    Raises:
      MissingError: no such source.
      UserError: no clips, or none that can be used; a source with mistakes, see `list_clips`; a destination that holds
        something else, or that cannot be written; a clip that changes meanwhile.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers} is a number of processes; use 1 or more, or leave it out")
    destination = place(destination)
    if isinstance(destination, Path):
        destination = destination.resolve()  # a link to a large disk, or `.`
    if beam is not None:
        _check_for_beam(destination)
    listing = list_clips(source, format=config.format, ucf101_split=config.ucf101_split)
    if beam is not None:  # whose workers run in folders of their own
        listing = _absolute(listing)
    fingerprint = _fingerprint(listing, config)
    before = IngestReport.read(destination) if _holds(destination, fingerprint, source) else None
    if before is not None and not (retry and before.passing):
        return dataclasses.replace(before, reused=True)
    work = _work(destination)
    try:
        with Journal(work, (config.screening, config.reencode)) as journal:
            verdicts = _inspect_all(listing.clips, config, journal, progress, workers or cores(), beam)
            chosen = select(listing.clips, verdicts, config.screening)
            if not chosen.infos:
                shutil.rmtree(work)
                raise UserError(_nothing(source, listing, verdicts, chosen))
            passing = sum(verdict.passing for verdict in verdicts)
            if before is not None and passing >= len(before.passing):
                return dataclasses.replace(before, reused=True)
            try:
                _write(work / "data", listing, verdicts, chosen, config, fingerprint, progress, beam)
                # Hours may have passed: what somebody else has put there by now is not replaced.
                if _holds(place(destination), fingerprint, source) and before is None:
                    report = dataclasses.replace(IngestReport.read(destination), reused=True)
                else:
                    report = _put(work / "data", destination)
            except ChangedError as error:
                journal.forget(clip for clip in listing.clips if clip.path == error.path)
                raise
            finally:
                shutil.rmtree(work / "data", ignore_errors=True)
            if not passing:
                shutil.rmtree(work)
    except BrokenPipeError:
        raise  # of the progress bar
    except OSError as error:
        fix = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "make it writable"
        raise UserError(
            f"{destination} cannot be written ({error.strerror or error}); {fix} and start the command again"
        ) from error
    return report


def _check_for_beam(destination: Place) -> None:
    if not isinstance(destination, Path):
        raise UserError(f"{destination} is a bucket; with Beam name a folder on a disk that all its machines share")
    if set("*?[") & set(os.fspath(destination)):
        raise UserError(f"{destination} has one of * ? [ in it, which Beam takes for a pattern; name another folder")


def _absolute(listing: Listing) -> Listing:
    clips = [
        clip if "://" in clip.path else clip._replace(path=os.fspath(Path(clip.path).absolute()))
        for clip in listing.clips
    ]
    return listing._replace(clips=tuple(clips))


def _put(made: Path, destination: Place) -> IngestReport:
    """Have the destination be what was made, in place of an older one; its report."""
    report = IngestReport.read(made)
    if not isinstance(destination, Path):
        publish(made, destination, INDEX)
        return report
    old = made.with_name("old")
    shutil.rmtree(old, ignore_errors=True)  # of a run that was killed here: the journal had all to make it again
    if destination.is_dir() and any(destination.iterdir()):
        destination.rename(old)
    made.rename(destination)  # an empty folder there is replaced
    shutil.rmtree(old, ignore_errors=True)
    return report


def _work(destination: Place) -> Path:
    """The folder of work: beside the destination, so that a rename finishes it; for a bucket among temporary files."""
    if isinstance(destination, Path):
        return destination.with_name(destination.name + WORK)
    name = hashlib.sha256(str(destination).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"dit_video.{name}{WORK}"


def _fingerprint(listing: Listing, config: IngestConfig) -> str:
    """Of names, captions, sizes, splits and screening; not of where the source lies, or how long a clip may take."""
    facts = [(clip.name, clip.captions, clip.size, clip.split) for clip in listing.clips]
    settings = [config_json.to_json(config.screening)]
    if config.reencode.asked:
        settings.append(config_json.to_json(config.reencode))
    known = json.dumps([facts, *settings], ensure_ascii=True)
    return hashlib.sha256(known.encode()).hexdigest()


def _holds(destination: Place, fingerprint: str, source: str | os.PathLike) -> bool:
    """Whether the data set is there already."""
    if not destination.exists():
        return False
    if not destination.is_dir():
        raise UserError(f"{destination} is a file; name a folder that does not exist")
    if not any(destination.iterdir()):
        return False
    if not isinstance(destination, Path) and all(_COPIED.match(path.name) for path in destination.iterdir()):
        return False  # a copy to a bucket that was not finished
    if not (destination / INDEX).is_file():
        raise UserError(f"{destination} exists and is not an ingested data set; name a folder that does not exist")
    if read_document(destination / INDEX).get("fingerprint") != fingerprint:
        raise UserError(
            f"{destination} holds another data set than {source} (names, sizes, captions or settings differ); "
            "name another folder, or remove it"
        )
    return True


def _inspect_all(
    clips: Sequence[Listed],
    config: IngestConfig,
    journal: Journal,
    progress: Progress | None,
    workers: int,
    how: Beam | None,
) -> list[Inspected]:
    """The verdict of every clip: from the journal, or else found out and written down there."""
    folder = journal.folder / _ANEW
    verdicts = {
        number: known
        for number, clip in enumerate(clips)
        if (known := journal.get(clip)) is not None and (known.stored is None or known.stored.lies_in(folder))
    }
    left = [(number, clip) for number, clip in enumerate(clips) if number not in verdicts]
    if progress is not None:
        progress(len(verdicts), len(clips))
    steps = InspectionConfig(screening=config.screening, reencode=config.reencode, folder=str(folder))

    def keep(number: int, verdict: Inspected) -> None:
        journal.put(clips[number], verdict)
        verdicts[number] = verdict
        if progress is not None:
            progress(len(verdicts), len(clips))

    again = []
    with Workers(worth(left, workers), steps, config.patience) as processes:
        if how is None or not left:
            found = processes.inspect(left)
        else:
            from dit_video.data.ingest import beam

            found = beam.inspect(left, journal, how, steps, config.patience)
        for number, verdict in found:
            if verdict.passing:
                again.append((number, clips[number]))
            else:
                keep(number, verdict)
        for number, verdict in processes.inspect_again(again):
            keep(number, verdict)
    return [verdicts[number] for number in range(len(clips))]


def _nothing(source: str | os.PathLike, listing: Listing, verdicts: Sequence[Inspected], chosen: Selection) -> str:
    bad = [(clip.name, verdict) for clip, verdict in zip(listing.clips, verdicts, strict=True) if verdict.reason]
    if bad:
        name, (reason, *_) = bad[0]
        fix = "mend that and start the command again" if bad[0][1].passing else "use files that a video player opens"
    else:
        name, reason = chosen.dropped[0]
        fix = "ask for less"
    return f"none of the {len(listing.clips)} clips in {source} can be used (first: {name}: {reason}); {fix}"


def _write(
    folder: Path,
    listing: Listing,
    verdicts: Sequence[Inspected],
    chosen: Selection,
    config: IngestConfig,
    fingerprint: str,
    progress: Progress | None,
    beam: Beam | None,
) -> None:
    """The data set's files."""
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run had of it
    shutil.rmtree(folder.with_name(folder.name + ".tfds"), ignore_errors=True)
    used = [(listing.clips[number], verdicts[number]) for number in chosen.in_order]
    references = [_reference(clip, verdict, folder.with_name(_ANEW)) for clip, verdict in used]
    sizes = [reference.size for reference in references]
    anew = [clip.size for clip, verdict in used if verdict.stored is not None]
    clips_of: dict[int, list[ClipInfo]] = {}
    for info in chosen.infos:
        clips_of.setdefault(info.record, []).append(info)
    records = (
        _record(*pair, reference, clips_of[number])
        for number, (pair, reference) in enumerate(zip(used, references, strict=True))
    )
    builder.write_clips(
        folder,
        features=_features(),
        records={split: list(itertools.islice(records, len(numbers))) for split, numbers in chosen.files.items()},
        mean_bytes=sum(sizes) // len(sizes),
        count=None if progress is None else (lambda done: progress(done, len(sizes))),
        beam=beam,
    )
    write_index(folder, chosen.infos, fingerprint)
    report = summarise(
        chosen.infos,
        [verdicts[number].codec for number in chosen.in_order],
        files=len(listing.clips) + len(listing.rejected),
        usable_files=len(sizes),
        bytes=sum(sizes),
        reencoded=len(anew),
        reencoded_from=sum(anew),
        reencoded_to=sum(verdict.stored.size for _, verdict in used if verdict.stored is not None),
        quarantined=tuple(
            (clip.name, verdict.reason) for clip, verdict in zip(listing.clips, verdicts, strict=True) if verdict.reason
        ),
        passing=tuple(clip.name for clip, verdict in zip(listing.clips, verdicts, strict=True) if verdict.passing),
        dropped=chosen.dropped,
        dropped_files=chosen.dropped_files,
        rejected=listing.rejected,
        unlisted=listing.unlisted,
        format=listing.format,
        settings={
            **dataclasses.asdict(config.screening),
            **({"reencode": dataclasses.asdict(config.reencode)} if config.reencode.asked else {}),
        },
    )
    report.write(folder)


def _features() -> dict[str, Any]:
    """Of a record: a file's bytes, and what is known of the clips in it."""
    return {
        "clip": builder.content(),
        "name": tfds.features.Text(),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "height": np.int32,
        "width": np.int32,
        "frames": np.int32,
        "fps": np.float32,
        "seconds": np.float32,
        "codec": tfds.features.Text(),
        "shots": tfds.features.Sequence({"start": np.float32, "frames": np.int32, "seconds": np.float32}),
        # Of the file as it came, which `clip` is not where it was stored anew.
        "source_bytes": np.int64,
        "source_sha256": tfds.features.Text(),
    }


def _reference(clip: Listed, verdict: Inspected, anew: Path) -> builder.Reference:
    """Where a record's bytes lie: in the source, or in the folder of files that were stored anew."""
    if verdict.stored is None:
        return builder.Reference(clip.path, clip.offset, clip.size, verdict.sha256)
    name, size, sha256 = verdict.stored
    return builder.Reference(str(anew / name), None, size, sha256)


def _record(
    clip: Listed, verdict: Inspected, reference: builder.Reference, infos: Sequence[ClipInfo]
) -> dict[str, Any]:
    """A record with the place of its bytes. Its facts are of the clips that are used of it, together."""
    first, last = infos[0], infos[-1]
    return {
        "clip": reference,
        "name": clip.name,
        "captions": clip.captions,
        "height": first.height,
        "width": first.width,
        "frames": sum(info.frames for info in infos),
        "fps": first.fps,
        "seconds": last.start + last.seconds - first.start,
        "codec": verdict.codec,
        "shots": [{"start": info.start, "frames": info.frames, "seconds": info.seconds} for info in infos],
        "source_bytes": clip.size,
        "source_sha256": verdict.sha256,
    }
