"""Lists of requests and tasks in JSON files and others, with pictures in files beside them."""

import contextlib
import csv
import difflib
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dit_video.core.errors import UserError
from dit_video.core.files import parse_json, read_json, read_text
from dit_video.core.grid import Grid
from dit_video.core.registry import load_entry_points
from dit_video.sampling.expansion import ExpandedPrompt, PromptExpander
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.request import Request
from dit_video.sampling.request_file import (
    SAMPLE_KEYS,
    SIZE_KEYS,
    check_mask_key,
    read_pictures,
    read_request,
    write_conditions,
    write_mask,
    write_picture,
    write_request,
)
from dit_video.sampling.tasks import TASKS, Task, get_task_name
from dit_video.sampling.tasks.fields import TaskField, list_fields, list_required
from dit_video.sampling.tasks.task import add_options

_OPTIONS = ("seed", "negative", "conditions", "control", "reference_images", "method", "resample", "strengths")
"""Values of a request that a task's entry may have, too; see `add_options`."""
_TEXTS = ("prompt", "negative", "source")
"""Values that are texts even if they look like numbers."""
_FORMS = (
    "a list of prompts is a text (.txt) with a prompt on each line; a table (.csv) with a column prompt; or JSON, "
    'a list (.json) or line by line (.jsonl), of prompts and objects with a prompt or a task. Use ["a red circle"]'
)


class TaskEntry(NamedTuple):
    """A task of a list, with its seed and what else `Pipeline.run` takes."""

    task: Task
    options: Request = Request("")
    """A request without a prompt and size; see `add_options`."""


def make_request(entry: Request | TaskEntry, config: PipelineConfig) -> Request | None:
    """Return the request of an entry, with its size; None for a task of several passes.

    Raises:
      UserError: If the entry does not fit the model.
    """
    request = entry
    if isinstance(entry, TaskEntry):
        if (made := entry.task.fit(config).make_request(config)) is None:
            return None
        request = add_options(made, entry.options)
    assert isinstance(request, Request)
    return replace(request, size=config.resolve_size(request))


def expand_entry(entry: Request | TaskEntry, expander: PromptExpander) -> Request | TaskEntry:
    """Return an entry with its prompt expanded; one without a prompt as it is. Errors are those of the expander."""
    if isinstance(entry, TaskEntry):
        return entry._replace(task=expander.expand(entry.task))
    return expander.expand(entry)


def get_entry_prompt(entry: Request | TaskEntry, request: Request | None) -> str:
    """Return the prompt of an entry and its request: that of a task of several passes may be its clip's caption."""
    if request is not None:
        return request.prompt
    assert isinstance(entry, TaskEntry)
    prompt, clip, image = (getattr(entry.task, name, None) for name in ("prompt", "clip", "image"))
    return next((text for text in (prompt, *(each.caption for each in (clip, image) if each)) if text), "")


def read_entries(
    path: str | Path, *, size: Grid | None = None, seed: int | None = None, negative: str | None = None
) -> list[Request | TaskEntry]:
    """Read requests and tasks from a list of texts and objects: `.json`, `.jsonl`, `.csv` with a header, or `.txt`.

    A text is a prompt. An object with a `task` is read by `read_task`, any other by `read_request`. Files are relative
    to the list's folder. Lists that `write_request` and `write_task` made are read, too; what they say of samples has
    no effect.

    Args:
      path: The file.
      size: Size of the clips of prompts that have none of their own; None for the model's default.
      seed: Seed of the first entry; that of each further one without its own is larger by 1. None for 0 in all.
      negative: Negative prompt of entries without their own; None for the model's.

    Raises:
      MissingError: If the file, or one that it names, does not exist.
      DecodeError: If the file of a picture is damaged.
      UserError: If the file is not such a list, or an object of it is refused.
    """
    path, entries = Path(path), _read_list(Path(path))
    if isinstance(entries, list):
        entries = [{"prompt": entry} if isinstance(entry, str) else entry for entry in entries]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} holds no prompts: {_FORMS}")
    read = []
    for number, entry in enumerate(entries):
        common: dict[str, Any] = {} if negative is None else {"negative": negative}
        common |= {} if seed is None else {"seed": seed + number}
        if size is not None and not {"task", *SIZE_KEYS} & entry.keys():
            common |= dict(zip(SIZE_KEYS, size, strict=True))
        read_entry = read_task if "task" in entry else read_request
        read.append(read_entry({**common, **entry}, path.parent, where=f"{path}, entry {number}: "))
    return read


def _read_list(path: Path) -> Any:
    """Return the value in the file of a list, which is perhaps none.

    Raises:
      MissingError: If there is no file at `path`.
      UserError: If it has another suffix, or its content is not of that kind.
    """
    match path.suffix.lower():
        case ".txt":
            return [line.strip() for line in read_text(path).splitlines() if line.strip()]
        case ".jsonl":
            lines = enumerate(read_text(path).split("\n"), 1)  # a text of JSON may hold other ends of lines
            return [parse_json(line.encode(), f"{path}, line {number}") for number, line in lines if line.strip()]
        case ".csv":
            rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
            return [_read_row(row, f"{path}, entry {number}: ") for number, row in enumerate(rows)]
        case ".json" | "":
            return read_json(path)
    raise UserError(f"{path} is invalid: {_FORMS}")


def _read_row(row: dict[Any, Any], where: str) -> dict[str, Any]:
    """Return the object of a table's row: cells of prompts are texts, others JSON or texts, and empty ones are absent.

    Raises:
      UserError: If the row has more cells than the header, or neither a prompt nor a task; `where` begins the message.
    """
    if None in row:
        raise UserError(f"{where}it has more cells than the header. Put a prompt with commas into double quotes.")
    if not {"prompt", "task"} & row.keys():
        raise UserError(f"{where}there is no column prompt, but {', '.join(row)}: {_FORMS}")
    values = {name: cell for name, cell in row.items() if cell}
    for name, cell in values.items():
        with contextlib.suppress(json.JSONDecodeError):
            values[name] = cell if name in _TEXTS else json.loads(cell)
    return values


def read_task(values: Mapping[str, Any], folder: Path, *, where: str = "") -> TaskEntry:
    """Return a task of JSON values, decoded from files in a folder, with its options.

    Values are the name of the `task` and the fields of its class, and `seed` and other values of a request that
    `Pipeline.run` takes, such as `negative`. Clips, images and masks are names of files; what is white in a mask is
    generated.

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
        if key not in fields and key not in ("task", "prompt", "expanded_from", *_OPTIONS, *SAMPLE_KEYS):
            closest = next(iter(difflib.get_close_matches(key, fields, n=1)), ", ".join(fields))
            raise UserError(f"{where}{key}={values[key]!r} is invalid: {name} has no such value. Use {closest}.")
    required = list_required(TASKS[name])
    if unknown := [key for key in required if key not in fields]:
        rule = f"no file holds its required {unknown[0]}"
        raise UserError(f"{where}task={name!r} is invalid: {rule}. Use Pipeline.run in Python.")
    if missing := [key for key in required if values.get(key) is None]:
        raise UserError(f"{where}{missing[0]} is missing: {name} needs {', '.join(required)}. Give it.")
    own = {key: value for key, value in values.items() if key in _OPTIONS and key not in fields}
    options = read_request({"prompt": "", **own}, folder, where=where)
    given = {key: value for key, value in values.items() if key in fields and value is not None}
    given = {key: _read_value(fields[key], value, folder, where) for key, value in given.items()}
    if "prompt" in given and isinstance(original := values.get("expanded_from"), str):
        given["prompt"] = ExpandedPrompt(given["prompt"], original)
    try:
        task = TASKS[name](**given)
    except UserError as error:
        raise UserError(f"{where}{error}") from error
    return TaskEntry(task, options)


def write_task(entry: TaskEntry, folder: Path) -> dict[str, Any]:
    """Write the pictures of a task and its options into a folder, and return its entry of a list in that folder.

    `read_task` returns an equal task of the entry; images have a rate of 1. Files are as `write_request` writes them.
    """
    task, options = entry
    written: dict[str, Any] = {"task": get_task_name(task)}
    request = {name: value for name, value in write_request(options, folder).items() if name != "prompt"}
    for field in list_fields(type(task)):
        value = getattr(task, field.name)
        if value is None:
            continue
        if field.kind == "conditions":
            value = write_conditions(value, folder)
        elif field.kind in ("clip", "image"):
            value = write_picture(field.name, value, folder)
        elif field.kind == "mask":
            value = write_mask(value, getattr(task, "clip", None) or getattr(task, "video", None), folder)
        written[field.name] = value
    if isinstance(prompt := getattr(task, "prompt", None), ExpandedPrompt):
        written["expanded_from"] = prompt.original
    return request | written


def _read_value(field: TaskField, value: Any, folder: Path, where: str) -> Any:
    """Return a value as the task holds it, with its files read."""
    if field.kind == "conditions":
        return read_pictures({"conditions": value}, folder).get("conditions", ())
    if field.kind in ("clip", "image", "mask"):
        if not isinstance(value, str):
            raise UserError(f"{where}{field.name}={value!r} is invalid: it must be the name of a file.")
        return field.convert(folder / value)
    return value
