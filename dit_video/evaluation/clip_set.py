"""Sets of clips that an evaluation reads: a model's samples, or data clips, from folders of many kinds."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import read_json
from dit_video.data.clips import ClipSource, is_ingested, parse_background
from dit_video.data.ingest.formats import list_clips
from dit_video.data.sizes import SizeLimits, fit_size, read_fitted_clip
from dit_video.tokens import Grid
from dit_video.video import Clip, decode

PROMPTS_FILE = "prompts.json"
"""List of the samples in a folder."""


class ClipSet(NamedTuple):
    """Clips with names and captions, which are decoded one at a time."""

    location: str
    """Folder of the clips."""
    names: tuple[str, ...]
    captions: tuple[str, ...]
    read: Callable[[int, float | None], Clip]
    """Decodes a clip by its number, sampled at a rate in frames per second, or at its own if None."""
    rejected: Mapping[str, str] = MappingProxyType({})
    """Reason for each entry of the folder that cannot be a clip, by name: it counts as unreadable."""
    get_size: Callable[[int], Grid] | None = None
    """Returns the size of a sample for a clip's caption, by the clip's number; None for the model's own."""
    truths: Sequence[Any] = ()
    """True content of each clip, if they are rendered: values that only metrics that need `scenes` read."""
    references: Sequence[Callable[[], Clip]] = ()
    """Functions that read the clip of the data that each sample is compared with, if there are any."""


def _read_nothing(index: int, fps: float | None) -> Clip:
    raise IndexError(f"no clip {index} of none")


NO_CLIPS = ClipSet("nothing", (), (), _read_nothing)
"""The empty set."""


def open_clip_set(folder: str | Path, *, split: str = "", background: str = "black") -> ClipSet:
    """Open the clips of a folder: samples, an ingested data set, or any folder that `tools/ingest.py` reads.

    Args:
      folder: The folder.
      split: Split of a data set; all of its clips if empty.
      background: Colour behind transparent pixels of data, see `ClipSource`; "random" is for data sets alone.

    Raises:
      MissingError: If the folder does not exist.
      UserError: If the folder holds no clips, or none of this split; or the background is invalid.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingError(f"no such folder of clips: {folder}")
    if (folder / PROMPTS_FILE).is_file():
        prompts, files = zip(*list_samples(folder), strict=True)
        return make_file_set(folder, files, prompts)
    return (_open_dataset if is_ingested(folder) else _open_files)(folder, split, background)


def make_fitted_set(clips: ClipSource, limits: SizeLimits, *, location: str) -> ClipSet:
    """Return the set of a run's clips, which are read at their training sizes and rates.

    Args:
      clips: The clips.
      limits: Limits of the training sizes.
      location: Name of the set in messages.
    """

    def read(index: int, fps: float | None) -> Clip:
        if fps is not None:
            raise UserError(f"fps={fps:g} is invalid: clips of a run are measured at their training rate. Use None")
        return read_fitted_clip(clips, index, limits)

    names, captions = (tuple(getattr(info, name) for info in clips.infos) for name in ("name", "caption"))
    return ClipSet(location, names, captions, read, get_size=lambda index: fit_size(clips.infos[index], limits))


def make_file_set(folder: Path, files: Sequence[str], captions: Sequence[str]) -> ClipSet:
    """Return the set of the clips in files of a folder."""

    def read(index: int, fps: float | None) -> Clip:
        return replace(decode(folder / files[index], fps=fps), caption=captions[index])

    return ClipSet(str(folder), tuple(files), tuple(captions), read)


def hash_clip(clip: Clip) -> str:
    """Return the SHA-256 of a clip's pixels and size."""
    return hashlib.sha256(repr(clip.frames.shape).encode() + clip.frames.tobytes()).hexdigest()


def list_samples(folder: str | Path) -> list[tuple[str, str]]:
    """Return the prompt and the file name of each sample that `prompts.json` lists.

    Raises:
      MissingError: If there is no `prompts.json`.
      UserError: If the file is not a list of samples in the folder, or names a file twice.
    """
    path = Path(folder) / PROMPTS_FILE
    entries = read_json(path)
    fix = "Use a folder that experiments/sample.py --prompts wrote"
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} is no list of samples. {fix}")
    samples: dict[str, str] = {}
    for number, entry in enumerate(entries):
        values = entry if isinstance(entry, dict) else {}
        prompt, name = values.get("prompt"), values.get("file")
        if not isinstance(prompt, str) or not isinstance(name, str):
            raise UserError(f"{path}: entry {number} is invalid: a sample has a prompt and a file. {fix}")
        if name in samples or Path(name).is_absolute() or ".." in Path(name).parts:
            rule = "two samples have this file" if name in samples else "it is a file of another folder"
            raise UserError(f"{path}: file={name!r} is invalid: {rule}. {fix}")
        samples[name] = prompt
    return [(prompt, name) for name, prompt in samples.items()]


def _open_dataset(folder: Path, split: str, background: str) -> ClipSet:
    source = ClipSource(folder, background=background)
    if split:
        source = source.select_split(split)
        _check_not_empty(len(source), folder, split)

    def read(index: int, fps: float | None) -> Clip:
        info, rate = source.infos[index], fps or source.infos[index].fps
        count = 1 + int(info.seconds * rate + 1e-6)
        clip = decode(source[index], frames=count, fps=rate, background=source.get_background(index))
        return replace(clip, caption=info.caption)

    names = tuple(info.name for info in source.infos)
    return ClipSet(str(folder), names, tuple(info.caption for info in source.infos), read)


def _open_files(folder: Path, split: str, background: str) -> ClipSet:
    if (colour := parse_background(background)) == "random":
        raise UserError(f"background={background!r} is invalid for files: ingest {folder}, or use a colour")
    listing = list_clips(folder)
    clips = [clip for clip in listing.clips if split in ("", clip.split)]
    _check_not_empty(len(clips), folder, split)
    captions = tuple(clip.captions[0] if clip.captions else "" for clip in clips)

    def read(index: int, fps: float | None) -> Clip:
        return replace(decode(clips[index].read(), fps=fps, background=colour), caption=captions[index])

    return ClipSet(str(folder), tuple(clip.name for clip in clips), captions, read, dict(listing.rejected))


def _check_not_empty(count: int, folder: Path, split: str) -> None:
    if not count:
        raise UserError(f"split={split!r} is invalid: {folder} has no clips of it. Name another split, or none")
