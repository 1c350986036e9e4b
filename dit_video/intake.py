"""Where a run's clips come from: folders that are ingested, or data sets that are; one, or several that are mixed."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from dit_video.data.ingest import ingest
from dit_video.data.source import ClipSource, is_ingested
from dit_video.errors import UserError
from dit_video.files import read_json, write_json
from dit_video.training.logging import Progress, remark

_SOURCES = "sources.json"
"""The names of several data sets, in the order in which they were given."""


def take(place: Path, clips: Sequence[str | Path], *, weights: Sequence[float] = ()) -> None:
    """Make `place` a data set, or a folder of several by the names of their folders.

    Args:
      place: the folder to be made.
      clips: folders of clips, which are ingested, or data sets that `tools/ingest.py` made, which are linked to.
      weights: of the data sets, if there are any.

    Raises:
      UserError: two folders of one name, another number of weights, clips that can't be used, or a place that holds
        others.
    """
    if weights and len(weights) != len(clips):
        raise UserError(f"the config weighs {len(weights)} data sets, {len(clips)} were given; give one a weight")
    names = [Path(folder).resolve().name for folder in clips]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two data sets are both named {repeated[0]}; rename a folder")
    for name, folder in zip(names, clips, strict=True):
        destination = place / name if len(clips) > 1 else place
        if is_ingested(folder):
            _link(destination, Path(folder).resolve())
        else:
            _ingest(folder, destination)
    if len(clips) > 1:
        write_json(place / _SOURCES, names)


def taken(place: Path) -> ClipSource:
    """All clips of what `take` made."""
    if not (place / _SOURCES).is_file():
        return ClipSource(place)
    return ClipSource({name: place / name for name in read_json(place / _SOURCES)})


def _ingest(clips: str | Path, destination: Path) -> None:
    """Make the data set of a folder of clips, and say on stderr what of it is not used."""
    with contextlib.ExitStack() as stack:
        bars: list[Progress] = []

        def update(done: int, total: int) -> None:
            if not bars or done < bars[-1].step:  # inspected, then written
                title = "writing clips" if bars else "reading clips"
                bars.append(stack.enter_context(Progress(title, total, unit="clip")))
            bars[-1].update(done)

        report = ingest(clips, destination, progress=update)
    for what, found in (
        ("cannot be decoded and are set aside", report.quarantined),
        ("cannot be clips and are left out", report.rejected),
    ):
        if found:
            name, reason = found[0]
            remark(f"{len(found)} files {what}, such as {name}: {reason}")
    if report.unlisted:
        remark(f"{len(report.unlisted)} files are no clips that the source lists, and are left out")


def _link(place: Path, data: Path) -> None:
    """Use an ingested data set where it lies."""
    if not place.exists() and not place.is_symlink():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(data, target_is_directory=True)
    if place.resolve() != data:
        raise UserError(f"the run was started with the data set {place.resolve()}, not {data}; name that one")
