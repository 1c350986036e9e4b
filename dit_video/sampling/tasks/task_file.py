"""Tasks in JSON files, with clips and masks in files beside them."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.core.registry import load_entry_points
from dit_video.sampling.request import Request
from dit_video.sampling.request_file import check_mask_key, read_pictures
from dit_video.sampling.tasks import TASKS, Task
from dit_video.sampling.tasks.fields import TaskField, list_fields, list_required


class TaskEntry(NamedTuple):
    """A task of a list, with its seed and what else `Pipeline.run` takes."""

    task: Task
    options: Request = Request("")
    """A request without a prompt and size; see `add_options`."""


def read_tasks(path: str | Path) -> list[TaskEntry]:
    """Read tasks from a JSON list of objects.

    Each has the name of its `task`, the fields of the task's class, and a `seed`, which is 0 by default. Clips, images
    and masks are names of files relative to the list's folder; what is white in a mask is generated.

    Raises:
      MissingError: If the file, or one that it names, does not exist.
      DecodeError: If a clip is damaged.
      UserError: If a task or a field is unknown, a field is missing, or a value does not fit.
    """
    path = Path(path)
    entries = read_json(path)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} must be a JSON list of objects, each with a task. Use docs/tasks.md for an example.")
    return [read_task(entry, path.parent, where=f"{path}, entry {number}: ") for number, entry in enumerate(entries)]


def read_task(values: Mapping[str, Any], folder: Path, *, where: str = "") -> TaskEntry:
    """Return a task and its seed of JSON values, decoded from files in a folder.

    Raises:
      MissingError: If a file does not exist.
      DecodeError: If a clip is damaged.
      UserError: If the task or a field is unknown, a field is missing, or a value does not fit; `where` begins the
        message.
    """
    load_entry_points()
    check_mask_key(values, where)
    name = values.get("task")
    if name not in TASKS:
        raise UserError(f"{where}task={name!r} is unknown; use {', '.join(TASKS)}")
    fields = {field.name: field for field in list_fields(TASKS[name])}
    for key in values:
        if key not in fields and key not in ("task", "seed"):
            closest = next(iter(difflib.get_close_matches(key, fields, n=1)), ", ".join(fields))
            raise UserError(f"{where}{key}={values[key]!r} is invalid: {name} has no such value. Use {closest}.")
    required = list_required(TASKS[name])
    if unknown := [key for key in required if key not in fields]:
        rule = f"no file holds its required {unknown[0]}"
        raise UserError(f"{where}task={name!r} is invalid: {rule}. Use Pipeline.run in Python.")
    if missing := [key for key in required if values.get(key) is None]:
        raise UserError(f"{where}{missing[0]} is missing: {name} needs {', '.join(required)}. Give it.")
    if type(seed := values.get("seed", 0)) is not int:
        raise UserError(f"{where}seed={seed!r} is invalid: it must be a whole number. Use 0.")
    given = {key: value for key, value in values.items() if key in fields and value is not None}
    given = {key: _read_value(fields[key], value, folder, where) for key, value in given.items()}
    try:
        task = TASKS[name](**given)
    except UserError as error:
        raise UserError(f"{where}{error}") from error
    return TaskEntry(task, Request("", seed=seed))


def _read_value(field: TaskField, value: Any, folder: Path, where: str) -> Any:
    """Return a value as the task holds it, with its files read."""
    if field.kind == "conditions":
        return read_pictures({"conditions": value}, folder).get("conditions", ())
    if field.kind in ("clip", "image", "mask"):
        if not isinstance(value, str):
            raise UserError(f"{where}{field.name}={value!r} is invalid: it must be the name of a file.")
        return field.convert(folder / value)
    return value
