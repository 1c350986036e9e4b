"""Tasks in JSON files, with clips and masks in files beside them."""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.sampling.request_file import read_mask, read_pictures
from dit_video.sampling.tasks import TASKS, AnyTask
from dit_video.video import decode, read_recipe

_CLIPS, _IMAGES = ("clip", "first", "second"), ("image", "last_image")
_COMMON = ("seed",)


class TaskEntry(NamedTuple):
    """A task of a list, with its seed."""

    task: AnyTask
    seed: int
    values: Mapping[str, Any]
    """The entry of the list."""


def read_tasks(path: str | Path, name: str) -> list[TaskEntry]:
    """Read tasks of one kind from a JSON list of objects, or from a text file with a prompt on each line.

    Objects have the fields of the task's class: clips, images and masks are names of files relative to the list's
    folder; masks are white where True, and `seed` is 0 by default.

    Raises:
      MissingError: If the file, or one that it names, does not exist.
      DecodeError: If a clip is damaged.
      UserError: If the task or a field is unknown, a field is missing, or a value does not fit.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        entries = read_json(path)
    else:
        entries = [{"prompt": line.strip()} for line in path.read_text().splitlines() if line.strip()]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} must be a JSON list of objects, or a text file with a prompt on each line")
    return [make_task(name, entry, path.parent, where=f"{path}, entry {i}: ") for i, entry in enumerate(entries)]


def make_task(name: str, values: Mapping[str, Any], folder: Path, *, where: str = "") -> TaskEntry:
    """Return a task of a name with values of its fields, decoded from files in a folder.

    Raises:
      MissingError: If a file does not exist.
      DecodeError: If a clip is damaged.
      UserError: If the task or a field is unknown, a field is missing, or a value does not fit; `where` begins the
        message.
    """
    if name not in TASKS:
        raise UserError(f"task={name!r} is unknown; use {', '.join(TASKS)}")
    kind = TASKS[name]
    known = {each.name: each for each in fields(kind)}
    for key in values:
        if key not in known and key not in _COMMON:
            closest = next(iter(difflib.get_close_matches(key, known, n=1)), ", ".join(known))
            raise UserError(f"{where}{key}={values[key]!r} is invalid: {name} has no such value. Use {closest}.")
    required = [each.name for each in known.values() if each.default is MISSING and each.default_factory is MISSING]
    if missing := [key for key in required if values.get(key) is None]:
        raise UserError(f"{where}{missing[0]} is missing: {name} needs {', '.join(required)}. Give it.")
    seed = values.get("seed", 0)
    if type(seed) is not int:
        raise UserError(f"{where}seed={seed!r} is invalid: it must be a whole number. Use 0.")
    return TaskEntry(kind(**_read_values(values, folder)), seed, dict(values))


def _read_values(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for key, value in values.items():
        if value is None or key in _COMMON:
            continue
        if key in (*_CLIPS, *_IMAGES):
            clip = decode(folder / value, frames=1 if key in _IMAGES else None)
            # The caption of a sampled clip is its prompt, which is that of a task without one.
            read[key] = replace(clip, caption=read_recipe(folder / value).get("prompt", ""))
        elif key == "conditions":
            read |= read_pictures({key: value}, folder)
        elif key != "mask":
            read[key] = tuple(value) if isinstance(value, list) else value
    if values.get("mask") is not None:
        length = len(read["clip"].frames) if "clip" in read else 1
        read["mask"] = read_mask(decode(folder / values["mask"]), length)
    return read
