"""Ingest of a source of clips into a data set of random access, part by part.

A part is some of the source's files. A process reads, decodes and screens them, cuts their clips, and writes the clips'
bytes and then their rows; a part whose rows exist is done. So any number of processes work on a data set, on machines
of any kind, and a run that was killed continues with the parts that are not done. The last step depends on all parts:
duplicates, captions and the report. The same source gives the same bytes, whatever the processes and interruptions.

A source that has changed since is ingested again into the same folder: files that are new make new parts, captions are
read again, and clips whose file is gone are no longer used. No file is decoded twice.

A file may fail for a transient reason: it cannot be read or is being written, a disk error, too little memory or time.
It is inspected once more after other files, alone. If it fails again, its row says so, and `retry` writes the parts
of such files again. That requires an explicit request, as a part must not change while trainings read it.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dit_video.core.errors import DISK_FULL_ERRNOS, UserError, check_at_least
from dit_video.core.storage import StoragePath, StoragePathLike, to_storage_path
from dit_video.data.clips import DATASET_NAME, FEATURES, is_ingested
from dit_video.data.ingest.completion import CAPTIONS, CHOICE, NoClipsError, complete, discard_transient_parts
from dit_video.data.ingest.formats import ListColumns, ListedClip, ListingOptions, list_clips, warn_of_losses
from dit_video.data.ingest.inspection import Inspection, InspectionConfig, Outcome, make_failure
from dit_video.data.ingest.parts import FOLDER, MAX_PART_BYTES, IngestFolder, make_row, make_table
from dit_video.data.ingest.reencoder import ReencodeConfig
from dit_video.data.ingest.report import REPORT, IngestReport
from dit_video.data.ingest.screening import Screening
from dit_video.data.ingest.workers import Workers, count_cores, count_useful_processes
from dit_video.data.records import get_file_name, write_records
from dit_video.data.tables import COLUMNS_FOLDER, MANIFEST, read_bytes, write_part

ProgressCallback = Callable[[int, int], None]
"""A function that is called with (done, total)."""
_WORK_PREFIX = ".clips-"
"""Prefix of the name of a folder, inside the data set, of clips that are not stored yet."""
_STALE_SECONDS = 7 * 24 * 3600
"""Age from which such a folder belongs to no running process."""
_MIN_PROCESS_BYTES = 128 << 20
"""Bytes of a batch for each process: at its end, processes wait for the last file. A batch is what may be inspected and
not written yet, because of a file that takes long or is inspected again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Configuration of an ingest; raises `UserError` if a limit is not positive."""

    format: str = "auto"
    """Name of the source's format (see `dit_video.data.ingest.formats`); "auto" detects it."""
    ucf101_split: Literal[1, 2, 3] = 1
    """Number of UCF-101's pair of train and test lists."""
    list_path: str | None = None
    """Path of a folder's list of clips inside the folder, instead of the one that is found."""
    columns: ListColumns = dataclasses.field(default_factory=ListColumns)
    """Columns of lists, if they have other names than those that are known."""
    follow_links: bool = False
    """True to follow links that lead out of the source; Hugging Face's links to its `blobs/` are always followed."""
    screening: Screening = dataclasses.field(default_factory=Screening)
    """Steps of the screening; without them every file is kept whole."""
    max_lead_in: float | int = 0.5
    """Maximum size of the packets before a clip that are stored with it, as it begins between two key frames, relative
    to its own; a clip that needs more is re-encoded. 0 re-encodes all that do not begin with a key frame."""
    inherit_captions: bool = False
    """True to caption each part of a file like the whole file, whose captions may describe another part."""
    reencode: ReencodeConfig = dataclasses.field(default_factory=ReencodeConfig)
    """Limits above which clips are re-encoded; none by default."""
    time_limit: float | int = 120.0
    """Seconds that the inspection of a file may take, plus ten times as much per gigabyte; three times as long if
    clips are re-encoded. Exceeding it twice is a transient reason, so `retry` may give the file more time."""

    def __post_init__(self) -> None:
        if not self.max_lead_in >= 0:
            raise UserError(f"max_lead_in={self.max_lead_in} is invalid: use a number from 0 on")
        if not 0 < self.time_limit < float("inf"):
            raise UserError(f"time_limit={self.time_limit} is invalid: use a positive number of seconds")

    @property
    def listing_options(self) -> ListingOptions:
        """Return the options of the source's format."""
        names = ("ucf101_split", "list_path", "columns", "follow_links")
        return ListingOptions(**{name: getattr(self, name) for name in names})

    @property
    def scaled_time_limit(self) -> float | int:
        """Return the seconds that a small file may take."""
        return self.time_limit * (3 if self.reencode.is_enabled else 1)

    @property
    def settings(self) -> dict[str, Any]:
        """Return what a data set's parts depend on, as JSON values."""
        parts = {name: dataclasses.asdict(getattr(self, name)) for name in ("screening", "reencode")}
        return parts | {"max_lead_in": self.max_lead_in}


RunParts = Callable[[IngestFolder, Sequence[str], IngestConfig], None]
"""A function that writes parts of a data set, see `write_parts`."""


def ingest(
    source: str | os.PathLike,
    destination: StoragePathLike,
    *,
    config: IngestConfig = IngestConfig(),
    progress: ProgressCallback | None = None,
    workers: int | None = None,
    retry: bool = False,
    is_fixed: bool = False,
    run_parts: RunParts | None = None,
) -> IngestReport:
    """Read every clip of `source`, and write the data set, its table and `report.json` into the folder `destination`.

    Args:
      source: The clips, in any format that `list_clips` reads; a folder, a file or an address.
      destination: Folder or address (`gs://…`) to create, or to complete if it holds an earlier state of the source.
      config: Configuration of the ingest.
      progress: Called with (done, total) for inspected files.
      workers: Maximum number of processes that inspect files; by default one per core.
      retry: Inspect files again that failed for a transient reason.
      is_fixed: True to refuse a source that has changed, instead of completing the data set.
      run_parts: Writes parts elsewhere, see `clusters`; by default this process and `workers` do.

    Raises:
      MissingError: If the source does not exist.
      UserError: If no clip is usable; the source has mistakes (see `list_clips`); the destination holds something else,
        or cannot be written.
    """
    check_at_least(1, workers=workers)
    folder = plan_ingest(source, destination, config=config, is_fixed=is_fixed)
    if retry:
        discard_transient_parts(folder, folder.parts)
    hashes, parts = _hash_table(folder.folder), folder.list_unfinished()
    if run_parts is None:
        write_parts(folder, parts, config=config, progress=progress or (lambda done, total: None), workers=workers)
    elif parts:
        run_parts(folder, parts, config)
    report = complete_ingest(folder, config)
    return dataclasses.replace(report, reused=_hash_table(folder.folder) == hashes)


def plan_ingest(
    source: str | os.PathLike,
    destination: StoragePathLike,
    *,
    config: IngestConfig,
    is_fixed: bool = False,
) -> IngestFolder:
    """List a source, and return the data set with parts for all its files.

    Raises:
      MissingError, UserError: see `ingest`.
    """
    location = to_storage_path(destination)
    if isinstance(location, Path):
        location = location.resolve()  # a link to a large disk, or `.`
    listing = list_clips(source, format=config.format, options=config.listing_options)
    warn_of_losses(source, listing)
    absolute = (
        clip if "://" in clip.path else clip._replace(path=os.path.abspath(clip.path)) for clip in listing.clips
    )
    _check_destination(location)
    with _convert_write_errors(location):
        folder = IngestFolder(location, config.settings)
        folder.update(listing._replace(clips=tuple(absolute)), is_fixed=is_fixed)
    return folder


def complete_ingest(folder: IngestFolder, config: IngestConfig) -> IngestReport:
    """Complete a data set whose parts are all written: choice of clips, captions, metadata and report.

    Raises:
      UserError: If no clip can be used, two clips have the same name, or the destination cannot be written.
    """
    options = {"inherit_captions": config.inherit_captions}
    with _convert_write_errors(folder.folder):
        if is_ingested(folder.folder) and folder.is_completed(options):
            return IngestReport.read(folder.folder)
        try:
            report = complete(folder, config.screening, **options)
            folder.mark_completed(options)
            return report
        except NoClipsError:
            if not is_ingested(folder.folder):
                _remove(folder.folder)  # which other settings may then be used for
            raise


def _remove(folder: StoragePath) -> None:
    if isinstance(folder, Path):
        shutil.rmtree(folder)
    else:
        folder.rmdir(recursive=True)


def _hash_table(folder: StoragePath) -> list[str] | None:
    """Return hashes of what `complete` writes, which say all that is in a data set; None if there is none."""
    columns = (folder / COLUMNS_FOLDER / f"{name}.parquet" for name in (CHOICE, CAPTIONS))
    files = [folder / MANIFEST, *columns, folder / REPORT]
    return [hashlib.sha256(read_bytes(path)).hexdigest() for path in files] if is_ingested(folder) else None


def write_parts(
    folder: IngestFolder,
    parts: Sequence[str],
    *,
    config: IngestConfig,
    progress: ProgressCallback = lambda done, total: None,
    workers: int | None = None,
) -> None:
    """Write parts of a data set; see `plan_ingest` and `complete_ingest` for what comes before and afterwards.

    Raises:
      UserError: If the screening cannot work for any file, or the destination cannot be written.
    """
    done, total = itertools.count(), folder.count_clips(parts)
    progress(next(done), total)
    count = workers or count_cores()
    with _convert_write_errors(folder.folder), _make_work_folder(folder.folder) as work:
        inspection = InspectionConfig(
            screening=config.screening,
            reencode=config.reencode,
            max_lead_in=config.max_lead_in,
            folder=str(work),
        )
        for batch in _batch_parts(folder, parts, max(MAX_PART_BYTES, count * _MIN_PROCESS_BYTES)):
            useful = count_useful_processes(list(enumerate(itertools.chain(*batch.values()))), count)
            with Workers(useful, inspection, config.scaled_time_limit) as processes:
                for part, inspections in _inspect_batch(processes, batch, lambda: progress(next(done), total)):
                    _write_part(folder.folder, part, batch[part], inspections)


def _batch_parts(folder: IngestFolder, parts: Sequence[str], max_bytes: int) -> Iterator[dict[str, list[ListedClip]]]:
    """Yield the files of consecutive parts of at most this size in bytes together, at least one."""
    batch: dict[str, list[ListedClip]] = {}
    size = 0
    for part in parts:
        clips = folder.read_clips(part)
        size += sum(clip.size for clip in clips)
        if batch and size > max_bytes:
            yield batch
            batch, size = {}, sum(clip.size for clip in clips)
        batch[part] = clips
    if batch:
        yield batch


def _inspect_batch(
    processes: Workers, batch: Mapping[str, Sequence[ListedClip]], on_inspected: Callable[[], None]
) -> Iterator[tuple[str, list[Inspection]]]:
    """Yield parts with the inspections of their files, when all of these are done."""
    places = [(part, number) for part, clips in batch.items() for number in range(len(clips))]
    tasks = [(task, batch[part][number]) for task, (part, number) in enumerate(places)]
    results: dict[str, dict[int, Inspection]] = {part: {} for part in batch}

    def inspect() -> Iterator[tuple[int, Inspection]]:
        failed = []
        for task, inspection in processes.inspect(tasks):
            if inspection.transient:
                failed.append(tasks[task])
            else:
                yield task, inspection
        yield from processes.inspect_again(failed)

    for task, inspection in inspect():
        part, number = places[task]
        results[part][number] = inspection
        on_inspected()
        if len(results[part]) == len(batch[part]):
            yield part, [inspection for _, inspection in sorted(results.pop(part).items())]


class _ChangedError(Exception):
    """An error for a file that has changed since it was inspected."""


def _write_part(folder: StoragePath, part: str, clips: Sequence[ListedClip], inspections: list[Inspection]) -> None:
    """Write the records of a part, and then its rows, whose existence marks the part as finished."""
    while True:
        pairs = [(clip, outcome) for clip, each in zip(clips, inspections, strict=True) for outcome in each.outcomes]
        examples = (_make_example(clip, outcome) for clip, outcome in pairs if outcome.kind == "kept")
        try:
            places = iter(write_records(folder / get_file_name(DATASET_NAME, part), FEATURES, examples))
            break
        except _ChangedError as error:
            number = next(index for index, clip in enumerate(clips) if clip.name == str(error))
            reason = "has changed since it was inspected; do not modify the source"
            inspections[number] = make_failure(clips[number], reason, transient=True)
    hashes = {clip.name: inspection.sha256 for clip, inspection in zip(clips, inspections, strict=True)}
    rows = [
        make_row(
            outcome,
            next(places) if outcome.kind == "kept" else None,
            source=clip.name,
            source_bytes=clip.size,
            source_sha256=hashes[clip.name],
        )
        for clip, outcome in pairs
    ]
    write_part(folder, part, make_table(rows))
    for _, outcome in pairs:
        if outcome.file is not None:
            Path(outcome.file).unlink()


def _make_example(clip: ListedClip, outcome: Outcome) -> dict[str, Any]:
    """Return the record of a clip.

    Raises:
      _ChangedError: If the source file has changed.
    """
    if outcome.file is not None:
        content = Path(outcome.file).read_bytes()
    else:
        try:
            content = clip.read()
        except OSError as error:
            raise _ChangedError(clip.name) from error
        if hashlib.sha256(content).hexdigest() != outcome.payload:
            raise _ChangedError(clip.name)
    return {name: getattr(outcome.shot, name) for name in FEATURES if name != "clip"} | {"clip": content}


def _check_destination(destination: StoragePath) -> None:
    """Raise if the destination is neither new nor a data set, finished or not."""
    if not destination.exists():
        return
    if not destination.is_dir():
        raise UserError(f"{destination} is a file; use a folder that does not exist")
    names = [path.name for path in destination.iterdir()]
    if names and FOLDER not in names:
        raise UserError(f"{destination} exists and is not an ingested data set; use a folder that does not exist")


@contextlib.contextmanager
def _make_work_folder(destination: StoragePath) -> Iterator[Path]:
    """Yield a temporary folder, on the disk of the destination if that is on this machine."""
    if isinstance(destination, Path):
        # Left by processes that were killed.
        for path in destination.glob(f"{_WORK_PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):  # another process may remove its own at this moment
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_WORK_PREFIX, dir=destination) as folder:
            yield Path(folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


@contextlib.contextmanager
def _convert_write_errors(destination: StoragePath) -> Iterator[None]:
    """Turn the error that the destination cannot be written into one for the user."""
    try:
        yield
    except BrokenPipeError:
        raise  # from the progress bar, not from the destination
    except OSError as error:
        fix = "free disk space" if error.errno in DISK_FULL_ERRNOS else "make it writable"
        reason = error.strerror or error
        raise UserError(f"{destination} cannot be written ({reason}); {fix} and run the command again") from error
