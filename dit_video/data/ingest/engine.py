"""Ingest of a source of clips into a data set of random access.

The clips' encoded bytes are kept unchanged, with the facts that planning needs, so that a later run can choose other
sizes; files over a limit are re-encoded on request. The first pass reads, decodes and screens every file in several
processes, and keeps only the facts and re-encoded files; the second copies the bytes of the used files into the data
set, one file at a time. Steps that need all facts are in between (duplicates, numbers of records), so the result does
not depend on the order in which processes finish.

All work is done in `DESTINATION.ingest`, next to the destination. It holds the journal of the first pass and the
re-encoded files, which survive a killed run, and the files of the second pass, which one rename publishes.

A clip may fail for a transient reason: a file that cannot be read or is being written, a disk error, too little memory
or time. It is inspected once more at the end of the run, alone. If it fails again it is quarantined like a broken file,
but counted separately in the report and not stored in the journal, which is then kept: `retry` inspects those clips
alone, and rebuilds the data set if one of them can now be used. That requires an explicit request, as a data set must
not change while trainings read it.
"""

import dataclasses
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
from dit_video.core.errors import UserError, check_at_least
from dit_video.core.storage import StoragePath, StoragePathLike, publish, read_document, to_storage_path
from dit_video.data.clips import INDEX, ClipInfo, write_index
from dit_video.data.ingest.formats import ListColumns, ListedClip, Listing, ListingOptions, list_clips
from dit_video.data.ingest.inspection import Inspection, InspectionConfig
from dit_video.data.ingest.journal import Journal
from dit_video.data.ingest.quality_filter import ScreeningConfig
from dit_video.data.ingest.reencoder import ReencodeConfig
from dit_video.data.ingest.report import REPORT, IngestReport, make_report
from dit_video.data.ingest.selection import Selection, select
from dit_video.data.ingest.workers import Workers, count_cores, count_useful_processes
from dit_video.data.records.clip_writer import write_clips
from dit_video.data.records.cluster import BeamOptions
from dit_video.data.records.reference import ChangedError, ClipReference
from dit_video.data.records.shards import DISK_FULL_ERRNOS, make_bytes_feature

WORK_SUFFIX = ".ingest"
"""Suffix of the name of the work folder next to the destination."""
_REENCODED_FOLDER = "reencoded"
"""Folder of re-encoded files in the work folder."""

_PARTIAL_COPY = re.compile(rf"clips-.*\.array_record-.*|(dataset_info|features)\.json|{re.escape(REPORT)}|REPORT\.html")
"""Files of a copy to a bucket without an index: before it is complete, or while a complete one is replaced."""

ProgressCallback = Callable[[int, int], None]
"""A function that is called with (done, total)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Configuration of an ingest; raises `UserError` if the time limit is not positive."""

    format: str = "auto"
    """Name of the source's format (see `dit_video.data.ingest.formats`); "auto" detects it."""
    ucf101_split: Literal[1, 2, 3] = 1
    """Number of UCF-101's pair of train and test lists."""
    list_path: str | None = None
    """Path of a folder's list of clips inside the folder, instead of the one that is found."""
    columns: ListColumns = dataclasses.field(default_factory=ListColumns)
    """Columns of lists, if they have other names than those that are known."""
    screening: ScreeningConfig = dataclasses.field(default_factory=ScreeningConfig)
    """Steps of the screening; all are disabled by default."""
    reencode: ReencodeConfig = dataclasses.field(default_factory=ReencodeConfig)
    """Limits above which files are re-encoded; none by default."""
    time_limit: float | int = 120.0
    """Seconds that the inspection of a file may take, plus ten times as much per gigabyte; three times as long if
    files are re-encoded. Exceeding it twice is a transient reason, so `retry` may give the file more time."""

    def __post_init__(self) -> None:
        if not 0 < self.time_limit < float("inf"):
            raise UserError(f"time_limit={self.time_limit} is invalid: use a positive number of seconds")

    @property
    def listing_options(self) -> ListingOptions:
        """Return the options of the source's format."""
        return ListingOptions(ucf101_split=self.ucf101_split, list_path=self.list_path, columns=self.columns)

    @property
    def scaled_time_limit(self) -> float | int:
        """Return the seconds that a small file may take."""
        return self.time_limit * (3 if self.reencode.is_enabled else 1)


def ingest(
    source: str | os.PathLike,
    destination: StoragePathLike,
    *,
    config: IngestConfig = IngestConfig(),
    progress: ProgressCallback | None = None,
    workers: int | None = None,
    beam: BeamOptions | None = None,
    retry: bool = False,
) -> IngestReport:
    """Read every clip of `source`, and write the data set, its index and `report.json` into the folder `destination`.

    The same source gives the same bytes, whatever the number of processes and interruptions. Clips that cannot be
    decoded are quarantined and counted. A destination that already holds this data set (same names, sizes, captions
    and settings) is reused. A run that was killed continues where it stopped.

    Args:
      source: the clips, in any format that `list_clips` reads.
      destination: folder to create; it is complete or absent. An address (`gs://…`) receives a copy of a data set built
        in a local folder, as ArrayRecord writes no others; its index is copied last.
      config: configuration of the ingest.
      progress: called with (done, total) for inspected clips, and from 0 again for written ones.
      workers: maximum number of processes that inspect clips; by default one per core. Ignored with Beam.
      beam: inspect and write in a pipeline of Apache Beam, on machines that share the disk of source and destination.
      retry: inspect clips of an existing data set again that failed for a transient reason, and replace the data set if
        one of them can be used now.

    Raises:
      MissingError: the source does not exist.
      UserError: no clip is usable; the source has mistakes (see `list_clips`); the destination holds something else, or
        cannot be written; a clip changes during the run.
    """
    check_at_least(1, workers=workers)
    progress = progress or (lambda done, total: None)
    destination = to_storage_path(destination)
    if isinstance(destination, Path):
        destination = destination.resolve()  # a link to a large disk, or `.`
    if beam is not None:
        _check_beam_destination(destination)
    listing = list_clips(source, format=config.format, options=config.listing_options)
    if beam is not None:  # its workers have other current folders
        listing = _make_absolute(listing)
    fingerprint = _compute_fingerprint(listing, config)
    old_report = IngestReport.read(destination) if _has_data_set(destination, fingerprint, source) else None
    if old_report is not None and not (retry and old_report.passing):
        return dataclasses.replace(old_report, reused=True)
    work = _get_work_folder(destination)
    try:
        with Journal(work, (config.screening, config.reencode)) as journal:
            verdicts = _inspect_all(listing.clips, config, journal, progress, workers or count_cores(), beam)
            selection = select(listing.clips, verdicts, config.screening)
            if not selection.infos:
                shutil.rmtree(work)
                raise UserError(_explain_no_clips(source, listing, verdicts, selection))
            passing = sum(verdict.transient for verdict in verdicts)
            if old_report is not None and passing >= len(old_report.passing):
                return dataclasses.replace(old_report, reused=True)
            try:
                _write(work / "data", listing, verdicts, selection, config, fingerprint, progress, beam)
                # Hours may have passed: a data set that another process wrote meanwhile is not replaced.
                if _has_data_set(to_storage_path(destination), fingerprint, source) and old_report is None:
                    report = dataclasses.replace(IngestReport.read(destination), reused=True)
                else:
                    report = _move_to_destination(work / "data", destination)
            except ChangedError as error:
                journal.forget(clip for clip in listing.clips if clip.path == error.path)
                raise
            finally:
                shutil.rmtree(work / "data", ignore_errors=True)
            if not passing:
                shutil.rmtree(work)
    except BrokenPipeError:
        raise  # from the progress bar, not from the destination
    except OSError as error:
        fix = "free disk space" if error.errno in DISK_FULL_ERRNOS else "make it writable"
        reason = error.strerror or error
        raise UserError(f"{destination} cannot be written ({reason}); {fix} and run the command again") from error
    return report


def _check_beam_destination(destination: StoragePath) -> None:
    if not isinstance(destination, Path):
        raise UserError(f"{destination} is a bucket; with Beam use a folder on a disk that all its machines share")
    if set("*?[") & set(os.fspath(destination)):
        raise UserError(f"{destination} contains one of * ? [, which Beam takes for a pattern; use another folder")


def _make_absolute(listing: Listing) -> Listing:
    absolute = (clip.path if "://" in clip.path else os.fspath(Path(clip.path).absolute()) for clip in listing.clips)
    clips = tuple(clip._replace(path=path) for clip, path in zip(listing.clips, absolute, strict=True))
    return listing._replace(clips=clips)


def _move_to_destination(folder: Path, destination: StoragePath) -> IngestReport:
    """Move the new data set to the destination, replacing an older one, and return its report."""
    report = IngestReport.read(folder)
    if not isinstance(destination, Path):
        publish(folder, destination, INDEX)
        return report
    old = folder.with_name("old")
    shutil.rmtree(old, ignore_errors=True)  # left by a run that was killed here; the journal has all to rebuild it
    if destination.is_dir() and any(destination.iterdir()):
        destination.rename(old)
    folder.rename(destination)  # replaces an empty folder
    shutil.rmtree(old, ignore_errors=True)
    return report


def _get_work_folder(destination: StoragePath) -> Path:
    """Return the work folder: next to the destination, so that a rename suffices; for a bucket a temporary folder."""
    if isinstance(destination, Path):
        return destination.with_name(destination.name + WORK_SUFFIX)
    name = hashlib.sha256(str(destination).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"dit_video.{name}{WORK_SUFFIX}"


def _compute_fingerprint(listing: Listing, config: IngestConfig) -> str:
    """Return a hash of names, captions, sizes, splits and settings, but not of the source's path or the time limit."""
    facts = [(clip.name, clip.captions, clip.size, clip.split) for clip in listing.clips]
    settings = [config.screening, config.reencode] if config.reencode.is_enabled else [config.screening]
    document = json.dumps([facts, *map(config_json.to_json, settings)], ensure_ascii=True)
    return hashlib.sha256(document.encode()).hexdigest()


def _has_data_set(destination: StoragePath, fingerprint: str, source: str | os.PathLike) -> bool:
    """Return whether the destination holds the data set already; raise if it holds something else."""
    if not destination.exists():
        return False
    if not destination.is_dir():
        raise UserError(f"{destination} is a file; use a folder that does not exist")
    names = [path.name for path in destination.iterdir()]
    if not names or (not isinstance(destination, Path) and all(map(_PARTIAL_COPY.fullmatch, names))):
        return False  # an empty folder, or an incomplete copy to a bucket
    if not (destination / INDEX).is_file():
        raise UserError(f"{destination} exists and is not an ingested data set; use a folder that does not exist")
    if read_document(destination / INDEX).get("fingerprint") != fingerprint:
        difference = "names, sizes, captions or settings differ"
        raise UserError(f"{destination} holds another data set than {source} ({difference}); use another folder")
    return True


def _inspect_all(
    clips: Sequence[ListedClip],
    config: IngestConfig,
    journal: Journal,
    progress: ProgressCallback,
    workers: int,
    beam_config: BeamOptions | None,
) -> list[Inspection]:
    """Return the verdict on every clip, from the journal or by inspection, whose verdicts are added to the journal."""
    folder = journal.folder / _REENCODED_FOLDER
    verdicts = {
        number: verdict
        for number, clip in enumerate(clips)
        if (verdict := journal.get(clip)) is not None and (verdict.stored is None or verdict.stored.is_in(folder))
    }
    remaining = [(number, clip) for number, clip in enumerate(clips) if number not in verdicts]
    progress(len(verdicts), len(clips))
    inspection = InspectionConfig(screening=config.screening, reencode=config.reencode, folder=str(folder))

    def store(number: int, verdict: Inspection) -> None:
        journal.put(clips[number], verdict)
        verdicts[number] = verdict
        progress(len(verdicts), len(clips))

    retried = []
    with Workers(count_useful_processes(remaining, workers), inspection, config.scaled_time_limit) as processes:
        if beam_config is None or not remaining:
            results = processes.inspect(remaining)
        else:
            from dit_video.data.ingest import beam

            results = beam.inspect(remaining, journal, beam_config, inspection, config.scaled_time_limit)
        for number, verdict in results:
            if verdict.transient:
                retried.append((number, clips[number]))
            else:
                store(number, verdict)
        for number, verdict in processes.inspect_again(retried):
            store(number, verdict)
    return [verdicts[number] for number in range(len(clips))]


def _explain_no_clips(source: object, listing: Listing, verdicts: Sequence[Inspection], selection: Selection) -> str:
    failed = [(clip.name, verdict) for clip, verdict in zip(listing.clips, verdicts, strict=True) if verdict.reason]
    if failed:
        name, (reason, *_) = failed[0]
        fix = "fix that and run the command again" if failed[0][1].transient else "use files that a video player opens"
    else:
        name, reason = selection.dropped[0]
        fix = "relax the limits of the screening"
    return f"none of the {len(listing.clips)} clips in {source} can be used (first: {name}: {reason}); {fix}"


def _write(
    folder: Path,
    listing: Listing,
    verdicts: Sequence[Inspection],
    selection: Selection,
    config: IngestConfig,
    fingerprint: str,
    progress: ProgressCallback,
    beam: BeamOptions | None,
) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
    used = [(listing.clips[number], verdicts[number]) for number in selection.record_files]
    references = [_make_reference(clip, verdict, folder.with_name(_REENCODED_FOLDER)) for clip, verdict in used]
    sizes = [reference.size for reference in references]
    reencoded = [(clip.size, verdict.stored.size) for clip, verdict in used if verdict.stored is not None]
    all_verdicts = list(zip((clip.name for clip in listing.clips), verdicts, strict=True))
    settings = dataclasses.asdict(config.screening)
    if config.reencode.is_enabled:
        settings["reencode"] = dataclasses.asdict(config.reencode)
    # The infos are in the order of their records, and each record has at least one.
    record_infos = (list(infos) for _, infos in itertools.groupby(selection.infos, lambda info: info.record))
    pairs = zip(used, references, record_infos, strict=True)
    records = (_make_record(*clip_and_verdict, reference, infos) for clip_and_verdict, reference, infos in pairs)
    write_clips(
        folder,
        features=_make_features(),
        records={split: list(itertools.islice(records, len(numbers))) for split, numbers in selection.files.items()},
        mean_bytes=sum(sizes) // len(sizes),
        progress=lambda done: progress(done, len(sizes)),
        beam=beam,
    )
    write_index(folder, selection.infos, fingerprint)
    report = make_report(
        selection.infos,
        [verdicts[number].codec for number in selection.record_files],
        [verdicts[number].transfer for number in selection.record_files],
        files=len(listing.clips) + len(listing.rejected),
        usable_files=len(sizes),
        bytes=sum(sizes),
        reencoded=len(reencoded),
        reencoded_from=sum(before for before, _ in reencoded),
        reencoded_to=sum(after for _, after in reencoded),
        quarantined=tuple((name, verdict.reason) for name, verdict in all_verdicts if verdict.reason),
        passing=tuple(name for name, verdict in all_verdicts if verdict.transient),
        dropped=selection.dropped,
        dropped_files=selection.dropped_files,
        rejected=listing.rejected,
        unlisted=listing.unlisted,
        format=listing.format,
        settings=settings,
    )
    report.write(folder)


def _make_features() -> dict[str, Any]:
    """Return the features of a record: the bytes of a file, and the facts of its clips."""
    return {
        "clip": make_bytes_feature(),
        "name": tfds.features.Text(),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "height": np.int32,
        "width": np.int32,
        "frames": np.int32,
        "fps": np.float32,
        "seconds": np.float32,
        "codec": tfds.features.Text(),
        "shots": tfds.features.Sequence({"start": np.float32, "frames": np.int32, "seconds": np.float32}),
        # Size and hash of the original file, which differ from those of `clip` if it was re-encoded.
        "source_bytes": np.int64,
        "source_sha256": tfds.features.Text(),
    }


def _make_reference(clip: ListedClip, verdict: Inspection, reencoded_folder: Path) -> ClipReference:
    """Return the location of a record's bytes: in the source, or in the folder of re-encoded files."""
    if verdict.stored is None:
        return ClipReference(clip.path, clip.offset, clip.size, verdict.sha256)
    name, size, sha256 = verdict.stored
    return ClipReference(str(reencoded_folder / name), None, size, sha256)


def _make_record(
    clip: ListedClip, verdict: Inspection, reference: ClipReference, infos: Sequence[ClipInfo]
) -> dict[str, Any]:
    """Return a record with the location of its bytes; its facts are those of all its used clips together."""
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
