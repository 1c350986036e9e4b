"""Data sets of a run: ingested folders of clips, or data sets that exist already; one, or a mixture of several.

A run's folder holds what was made for it, and links to what lies elsewhere: symbolic links on this machine, and for an
address (`gs://…`) a folder with a single file, `address.json`.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax

from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import read_json, write_json
from dit_video.core.storage import StoragePath, StoragePathLike, is_remote, to_storage_path
from dit_video.data.clips import ClipSource, is_ingested
from dit_video.data.ingest.engine import ingest
from dit_video.data.ingest.formats import list_clips
from dit_video.training.hooks.logging import Progress, print_on_first_process

_NAMES_FILE = "sources.json"
"""Name of the file with the names of several data sets, in order."""
ADDRESS_FILE = "address.json"
"""Name of the only file of a folder that stands for an address, which it holds."""


def check_datasets(clips: Sequence[StoragePathLike], *, workdir: StoragePathLike | None = None) -> None:
    """Check quickly that folders of clips can be ingested and data sets opened, before a run is created.

    Args:
      clips: Folders of clips, or data sets.
      workdir: Folder of the run. Only the first process of a run at an address needs folders of clips, and only once.

    Raises:
      UserError: If a data set cannot be used.
    """
    for folder in clips:
        if not is_ingested(folder) and not (workdir is not None and is_remote(workdir) and not is_remote(folder)):
            list_clips(_get_local_folder(folder))


def link_datasets(
    folder: Path,
    clips: Sequence[StoragePathLike],
    *,
    weights: Sequence[float] = (),
    home: StoragePath | None = None,
) -> None:
    """Make `folder` a data set, or a folder of several by the names of their folders.

    The first of several processes calls this before the others.

    Args:
      folder: The folder to create.
      clips: Folders of clips, which are ingested, or data sets of `tools/ingest.py`, which are linked to; the latter
        may be addresses (`gs://…`).
      weights: Weight of each data set, if any.
      home: Folder at an address where ingested clips are written instead of in `folder`, which then stands for it.

    Raises:
      UserError: If two folders have one name, if there is another number of weights, if clips cannot be used, or if the
        folder holds others.
    """
    if weights and len(weights) != len(clips):
        raise UserError(f"the config weighs {len(weights)} data sets, {len(clips)} were given; give each one weight")
    locations = [_make_absolute(to_storage_path(source)) for source in clips]
    names = [str(source).rstrip("/").rpartition("/")[2] for source in locations]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two data sets are both named {repeated[0]}; rename a folder")
    for name, source in zip(names, locations, strict=True):
        destination = folder / name if len(clips) > 1 else folder
        if is_ingested(source):
            if home is not None and isinstance(source, Path):
                raise UserError(f"{source} is on this machine, the run at {home.parent}; copy the data set there")
            link_folder(destination, source)
        elif home is not None:
            own = home / name if len(clips) > 1 else home
            link_folder(destination, own)
            if jax.process_index() == 0 and not is_ingested(own):  # its clips are on the first process's machine
                _ingest_folder(_get_local_folder(source), own)
        elif is_remote(linked := resolve(destination)):
            raise _make_mismatch_error(linked, source, "data set")
        else:
            _ingest_folder(_get_local_folder(source), destination)
    if len(clips) > 1:
        write_json(folder / _NAMES_FILE, names)


def open_datasets(
    folder: StoragePathLike, *, captions: Mapping[str, float] | None = None, background: str = "black"
) -> ClipSource:
    """Open all clips of a data set, or of a folder that `link_datasets` made; for the options see `ClipSource`."""
    location = to_storage_path(folder)
    if not isinstance(location, Path) or not (location / _NAMES_FILE).is_file():
        return ClipSource(resolve(location), captions=captions, background=background)
    named = {name: resolve(location / name) for name in read_json(location / _NAMES_FILE)}
    return ClipSource(named, captions=captions, background=background)


def list_datasets(folder: Path) -> tuple[StoragePath, ...]:
    """Return the locations of the data sets that `link_datasets` linked, for another run to use."""
    names = read_json(folder / _NAMES_FILE) if (folder / _NAMES_FILE).is_file() else []
    return tuple(resolve(folder / name) for name in names) or (resolve(folder),)


def link_folder(folder: Path, target: StoragePathLike, kind: str = "data set") -> None:
    """Let `folder` stand for a folder or address elsewhere, which need not exist yet.

    Args:
      folder: A folder that is empty, or stands for the same target already.
      target: A folder or an address.
      kind: Kind of target, for the message.

    Raises:
      UserError: If the folder holds something, or stands for another target.
    """
    target = _make_absolute(to_storage_path(target))
    if target == folder.resolve():
        return
    if not folder.exists() and not folder.is_symlink():
        if isinstance(target, Path):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # another process of the same run was faster
                folder.symlink_to(target, target_is_directory=True)
        else:
            write_json(folder / ADDRESS_FILE, str(target))
    if str(location := resolve(folder)) != str(target):
        raise _make_mismatch_error(location, target, kind)


def resolve(folder: StoragePath) -> StoragePath:
    """Return the location that a folder holds or stands for."""
    if not isinstance(folder, Path):
        return folder
    address = folder / ADDRESS_FILE
    return to_storage_path(read_json(address)) if address.is_file() else folder.resolve()


def _make_absolute(path: StoragePath) -> StoragePath:
    return path.resolve() if isinstance(path, Path) else path


def _make_mismatch_error(actual: StoragePath, expected: StoragePath, kind: str) -> UserError:
    return UserError(f"the run was started with the {kind} {actual}, not {expected}; name that one")


def _get_local_folder(folder: StoragePathLike) -> Path:
    """Return a folder of clips on this machine."""
    location = to_storage_path(folder)
    if isinstance(location, Path):
        return location
    if not location.exists():
        raise MissingError(f"no such data set: {location}")
    raise UserError(f"{location} is not an ingested data set; make one of clips on this machine with tools/ingest.py")


@contextlib.contextmanager
def show_ingest_progress() -> Iterator[Callable[[int, int], None]]:
    """Yield a `progress` for `ingest`: it shows on stderr how many files are read, with the time left."""
    with contextlib.ExitStack() as stack:
        bar: Progress | None = None

        def update(done: int, total: int) -> None:
            nonlocal bar
            if total == 0:
                return  # all are read already
            bar = bar or stack.enter_context(Progress("reading clips", total, start=done, unit="clip"))
            bar.update(done)

        yield update


def _ingest_folder(clips: Path, destination: StoragePath) -> None:
    """Make the data set of a folder of clips, and list on stderr the files that are skipped."""
    with show_ingest_progress() as progress:
        report = ingest(clips, destination, progress=progress, is_fixed=True)  # trainings may read it
    for reason_group, files in (
        ("cannot be decoded and are skipped", report.quarantined),
        ("are not clips and are skipped", report.rejected),
    ):
        if files:
            name, reason = files[0]
            print_on_first_process(f"{len(files)} files {reason_group}, such as {name}: {reason}")
    if report.unlisted:
        print_on_first_process(f"{len(report.unlisted)} files are not listed as clips by the source and are skipped")
