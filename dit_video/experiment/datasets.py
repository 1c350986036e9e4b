"""Where a run's clips come from: folders that are ingested, or data sets that are; one, or several that are mixed.

A run's folder holds what was made for it, and links to what lies elsewhere: symbolic links on this machine, and for an
address (`gs://…`) a folder with nothing but `address.json`.
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
"""The names of several data sets, in the order in which they were given."""
_ADDRESS = "address.json"
"""In an otherwise empty folder: where that lies which the folder stands for."""


def check(clips: Sequence[Address]) -> None:
    """That folders of clips can be ingested, and data sets opened: a quick look, before a run is made of them.

    Raises:
      UserError: one can't be used.
    """
    for folder in clips:
        if not is_ingested(folder):
            list_clips(_here(folder))


@first_goes_first()
def take(folder: Path, clips: Sequence[Address], *, weights: Sequence[float] = ()) -> None:
    """Make `folder` a data set, or a folder of several by the names of their folders.

    Args:
      folder: to be made.
      clips: folders of clips, which are ingested, or data sets that `tools/ingest.py` made, which are linked to; the
        latter may lie at addresses (`gs://…`).
      weights: of the data sets, if there are any.

    Raises:
      UserError: two folders of one name, another number of weights, clips that can't be used, or a folder that holds
        others.
    """
    if weights and len(weights) != len(clips):
        raise UserError(f"the config weighs {len(weights)} data sets, {len(clips)} were given; give one a weight")
    places = [_resolved(place(source)) for source in clips]
    names = [str(source).rstrip("/").rpartition("/")[2] for source in places]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two data sets are both named {repeated[0]}; rename a folder")
    for name, source in zip(names, places, strict=True):
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
    """All clips of a data set, or of what `take` made."""
    opened = place(folder)
    if not isinstance(opened, Path) or not (opened / _SOURCES).is_file():
        return ClipSource(lies(opened))
    return ClipSource({name: lies(opened / name) for name in read_json(opened / _SOURCES)})


def sources(folder: Path) -> tuple[Place, ...]:
    """Where the data sets lie that `take` made a folder of, for another run to take them."""
    names = read_json(folder / _SOURCES) if (folder / _SOURCES).is_file() else []
    return tuple(lies(folder / name) for name in names) or (lies(folder),)


def link(folder: Path, target: Address, what: str = "data set") -> None:
    """Let `folder` stand for what lies elsewhere, or will.

    Args:
      folder: holds nothing yet, or stands for the same already.
      target: a folder or an address.
      what: lies there, for the message.

    Raises:
      UserError: the folder holds something, or stands for another target.
    """
    target = _resolved(place(target))
    if target == folder.resolve():
        return
    if not folder.exists() and not folder.is_symlink():
        if isinstance(target, Path):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # another process of the same run was quicker
                folder.symlink_to(target, target_is_directory=True)
        else:
            write_json(folder / _ADDRESS, str(target))
    if str(found := lies(folder)) != str(target):
        raise _other(found, target, what)


def lies(folder: Place) -> Place:
    """Where that lies which a folder holds or stands for."""
    if not isinstance(folder, Path):
        return folder
    return place(read_json(folder / _ADDRESS)) if (folder / _ADDRESS).is_file() else folder.resolve()


def _resolved(found: Place) -> Place:
    return found.resolve() if isinstance(found, Path) else found


def _other(found: Place, wanted: Place, what: str) -> UserError:
    return UserError(f"the run was started with the {what} {found}, not {wanted}; name that one")


def _here(folder: Address) -> Path:
    """A folder of clips, which lies on this machine."""
    found = place(folder)
    if isinstance(found, Path):
        return found
    if not found.exists():
        raise MissingError(f"no such data set: {found}")
    raise UserError(f"{found} is not an ingested data set; make one of clips on this machine with tools/ingest.py")


@contextlib.contextmanager
def ingest_shown() -> Iterator[Callable[[int, int], None]]:
    """Gives `ingest` its `progress`: shows on stderr how many clips are read, then written, with the time left."""
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
    """Make the data set of a folder of clips, and say on stderr what of it is not used."""
    with ingest_shown() as progress:
        report = ingest(clips, destination, progress=progress)
    for what, found in (
        ("cannot be decoded and are set aside", report.quarantined),
        ("cannot be clips and are left out", report.rejected),
    ):
        if found:
            name, reason = found[0]
            remark(f"{len(found)} files {what}, such as {name}: {reason}")
    if report.unlisted:
        remark(f"{len(report.unlisted)} files are no clips that the source lists, and are left out")
