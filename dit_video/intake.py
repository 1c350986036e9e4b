"""Where a run's clips come from: folders that are ingested, or data sets that are; one, or several that are mixed."""

from collections.abc import Sequence
from pathlib import Path

from dit_video.data.ingest import ingest
from dit_video.data.latents import LatentSource
from dit_video.data.mixture import Mixture
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


def mixture(latents: LatentSource, clips: ClipSource, weights: Sequence[float]) -> Mixture | None:
    """An epoch has each clip once, as one of its views, or as often as its data set's weight says.

    None where that is each example once.
    """
    views: dict[str, list[int]] = {}
    for example, clip in enumerate(latents.clips):
        views.setdefault(clip, []).append(example)
    if not weights and len(views) == len(latents):
        return None
    clips = clips.select(views)
    return Mixture(
        sizes=clips.sizes,
        weights=tuple(weights) or None,
        variants=tuple(tuple(views[info.name]) for info in clips.infos),
    )


def _ingest(clips: str | Path, destination: Path) -> None:
    """Make the data set of a folder of clips, and say on stderr what of it is not used."""
    with Progress("reading clips", 1, unit="clip") as progress:

        def update(done: int, total: int) -> None:
            progress.total = total
            progress.update(done)

        report = ingest(clips, destination, progress=update)
    if report.quarantined:
        name, reason = report.quarantined[0]
        remark(f"{len(report.quarantined)} clips cannot be decoded and are set aside, such as {name}: {reason}")
    if report.unlisted:
        remark(f"{len(report.unlisted)} files that metadata.csv does not name are left out")


def _link(place: Path, data: Path) -> None:
    """Use an ingested data set where it lies."""
    if not place.exists() and not place.is_symlink():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(data, target_is_directory=True)
    if place.resolve() != data:
        raise UserError(f"the run was started with the data set {place.resolve()}, not {data}; name that one")
