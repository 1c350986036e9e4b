"""Data sets of a run: ingested folders of clips, or data sets that exist already; one, or a mixture of several.

A run's folder holds what was made for it, and links to what lies elsewhere: symbolic links on this machine, and for an
address (`gs://…`) a folder with a single file, `address.json`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import read_json, write_json
from dit_video.core.storage import Address, Place, is_remote, place
from dit_video.data.clips import ClipSource, is_ingested
from dit_video.data.ingest import ingest, list_clips
from dit_video.distributed.processes import first_goes_first
from dit_video.training.hooks.logging import Progress, remark

_SOURCES = "sources.json"
"""Name of the file with the names of several data sets, in order."""
_ADDRESS = "address.json"
"""Name of the only file of a folder that stands for an address, which it holds."""


def check(clips: Sequence[Address]) -> None:
    """Check quickly that folders of clips can be ingested and data sets opened, before a run is created.

    Raises:
      UserError: one cannot be used.
    """
    for folder in clips:
        if not is_ingested(folder):
            list_clips(_here(folder))


@first_goes_first()
def take(folder: Path, clips: Sequence[Address], *, weights: Sequence[float] = ()) -> None:
    """Make `folder` a data set, or a folder of several by the names of their folders.

    Args:
      folder: the folder to create.
      clips: folders of clips, which are ingested, or data sets of `tools/ingest.py`, which are linked to; the latter
        may be addresses (`gs://…`).
      weights: weight of each data set, if any.

    Raises:
      UserError: two folders of one name, another number of weights, unusable clips, or a folder that holds others.
    """
    if weights and len(weights) != len(clips):
        raise UserError(f"the config weighs {len(weights)} data sets, {len(clips)} were given; give each one weight")
    locations = [_resolved(place(source)) for source in clips]
    names = [str(source).rstrip("/").rpartition("/")[2] for source in locations]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two data sets are both named {repeated[0]}; rename a folder")
    for name, source in zip(names, locations, strict=True):
        destination = folder / name if len(clips) > 1 else folder
        if is_ingested(source):
            link(destination, source)
        elif is_remote(linked := lies(destination)):
            raise _other(linked, source, "data set")
        else:
            _ingest(_here(source), destination)
    if len(clips) > 1:
        write_json(folder / _SOURCES, names)


def taken(folder: Address) -> ClipSource:
    """Open all clips of a data set, or of a folder that `link_datasets` made."""
    location = place(folder)
    if not isinstance(location, Path) or not (location / _SOURCES).is_file():
        return ClipSource(lies(location))
    return ClipSource({name: lies(location / name) for name in read_json(location / _SOURCES)})


def sources(folder: Path) -> tuple[Place, ...]:
    """Return the locations of the data sets that `link_datasets` linked, for another run to use."""
    names = read_json(folder / _SOURCES) if (folder / _SOURCES).is_file() else []
    return tuple(lies(folder / name) for name in names) or (lies(folder),)


def link(folder: Path, target: Address, what: str = "data set") -> None:
    """Let `folder` stand for a folder or address elsewhere, which need not exist yet.

    Args:
      folder: is empty, or stands for the same target already.
      target: a folder or an address.
      kind: kind of target, for the message.

    Raises:
      UserError: the folder holds something, or stands for another target.
    """
    target = _resolved(place(target))
    if target == folder.resolve():
        return
    if not folder.exists() and not folder.is_symlink():
        if isinstance(target, Path):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # another process of the same run was faster
                folder.symlink_to(target, target_is_directory=True)
        else:
            write_json(folder / _ADDRESS, str(target))
    if str(location := lies(folder)) != str(target):
        raise _other(location, target, what)


def lies(folder: Place) -> Place:
    """Return the location that a folder holds or stands for."""
    if not isinstance(folder, Path):
        return folder
    return place(read_json(folder / _ADDRESS)) if (folder / _ADDRESS).is_file() else folder.resolve()


def _resolved(found: Place) -> Place:
    return found.resolve() if isinstance(found, Path) else found


def _other(found: Place, wanted: Place, what: str) -> UserError:
    return UserError(f"the run was started with the {what} {found}, not {wanted}; name that one")


def _here(folder: Address) -> Path:
    """Return a folder of clips on this machine."""
    location = place(folder)
    if isinstance(location, Path):
        return location
    if not location.exists():
        raise MissingError(f"no such data set: {location}")
    raise UserError(f"{location} is not an ingested data set; make one of clips on this machine with tools/ingest.py")


@contextlib.contextmanager
def ingest_shown() -> Iterator[Callable[[int, int], None]]:
    """Yield a `progress` for `ingest`: it shows on stderr how many clips are read, then written, with the time left."""
    with contextlib.ExitStack() as stack:
        bar: Progress | None = None
        titles = iter(("reading clips", "writing clips"))

        def update(done: int, total: int) -> None:
            nonlocal bar
            if bar is None or done < bar.step:
                stack.close()
                bar = stack.enter_context(Progress(next(titles), total, start=done, unit="clip"))
            bar.update(done)

        yield update


def _ingest(clips: Path, destination: Path) -> None:
    """Make the data set of a folder of clips, and list on stderr the files that are skipped."""
    with ingest_shown() as progress:
        report = ingest(clips, destination, progress=progress)
    for reason_group, files in (
        ("cannot be decoded and are skipped", report.quarantined),
        ("are not clips and are skipped", report.rejected),
    ):
        if files:
            name, reason = files[0]
            remark(f"{len(files)} files {reason_group}, such as {name}: {reason}")
    if report.unlisted:
        remark(f"{len(report.unlisted)} files are not listed as clips by the source and are skipped")
