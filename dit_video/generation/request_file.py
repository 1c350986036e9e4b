"""Requests in JSON files, with pictures in files beside them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.generation.pictures import Condition
from dit_video.generation.request import Request
from dit_video.tokens import Grid
from dit_video.video import Clip, decode

_SIZE = ("frames", "height", "width")
_TYPES = {str: "a text", int: "a whole number"}


def read_requests(path: str | Path) -> list[Request]:
    """Read requests from a JSON list of objects.

    Each has a `prompt`, and may have `frames`, `height` and `width` (all or none), `seed`, `negative`, `strengths`, and
    what `read_pictures` reads, whose files are relative to the list's folder. Other entries are ignored.

    Raises:
      MissingError: no file at `path`, or no file of a picture.
      DecodeError: the file of a picture is damaged.
      UserError: the file is not such a list.
    """
    path, entries = Path(path), read_json(path)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} must be a JSON list of objects, each with a prompt")
    return [_parse_request(entry, path, number) for number, entry in enumerate(entries)]


def _parse_request(entry: Any, path: Path, number: int) -> Request:
    values = {"seed": 0, "negative": None, **entry} if isinstance(entry, dict) else {}
    has_size = any(name in values for name in _SIZE)
    kinds = {"prompt": str, "seed": int} | (dict.fromkeys(_SIZE, int) if has_size else {})
    kinds |= {} if values.get("negative") is None else {"negative": str}
    for name, kind in kinds.items():
        if type(values.get(name)) is not kind:  # `True` is an int to isinstance
            raise UserError(f"{path}: {name} of entry {number} must be {_TYPES[kind]}, not {values.get(name)!r}")
    if not isinstance(strengths := values.get("strengths", {}), dict):
        raise UserError(f"{path}: strengths of entry {number} must be an object, not {strengths!r}")
    size = Grid(*(values[name] for name in _SIZE)) if has_size else None
    pictures = read_pictures(values, path.parent)
    return Request(values["prompt"], size, values["seed"], values["negative"], strengths=strengths, **pictures)


def read_pictures(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the images, clips and masks of a request, by the names of its fields, decoded from their files.

    Args:
      values: files by name: `image`, `last_image`, `video`, `mask` (what is white is kept; an image is a mask of all
        frames of `video`) and `control`; a list of files `reference_images`; and `conditions`, a list of
        `{"file": …, "frame": …, "strength": …}`, of which the last two are 0 and 1 by default. Others are ignored.
      folder: folder that relative paths start from.

    Raises:
      MissingError: a file does not exist.
      DecodeError: a file is damaged.
      UserError: a mask without a video, or a value that is not a file's name, or not a list of what it should be.
    """

    def read(name: str, file: Any, frames: int | None = None) -> Clip:
        if not isinstance(file, str | Path):
            raise UserError(f"{name}={file!r} is invalid: it must be the name of a file")
        return decode(folder / file, frames=frames)

    pictures: dict[str, Any] = {}
    for name, frames in (("image", 1), ("last_image", 1), ("video", None), ("control", None)):
        if values.get(name):
            pictures[name] = read(name, values[name], frames)
    for name in ("reference_images", "conditions"):
        if not isinstance(values.get(name, ()), list | tuple):
            raise UserError(f"{name}={values[name]!r} is invalid: it must be a list")
    if files := values.get("reference_images"):
        pictures["reference_images"] = [read("reference_images", file, 1) for file in files]
    if entries := values.get("conditions"):
        pictures["conditions"] = [_make_condition(entry, read) for entry in entries]
    if values.get("mask"):
        if "video" not in pictures:
            raise UserError(f"mask={values['mask']} is invalid without a video; give the video that it keeps parts of")
        is_white = read("mask", values["mask"]).frames.mean(-1) > 127.5
        length = len(pictures["video"].frames) if len(is_white) == 1 else len(is_white)
        pictures["mask"] = np.broadcast_to(is_white, (length, *is_white.shape[1:]))
    return pictures


def _make_condition(entry: Any, read: Callable[..., Clip]) -> Condition:
    entry = {"frame": 0, "strength": 1.0} | entry if isinstance(entry, dict) else {}
    if type(entry.get("frame")) is not int or type(entry.get("strength")) not in (int, float):
        rule = 'it must be {"file": NAME, "frame": NUMBER, "strength": NUMBER}'
        raise UserError(f"conditions={[entry]} is invalid: {rule}")
    return Condition(
        content=read("conditions", entry.get("file")), frame=entry["frame"], strength=float(entry["strength"])
    )
