"""Options of tasks: a subcommand of `sample.py` for each, made of the fields of its class."""

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from dit_video.core.command_line import parse_size
from dit_video.core.errors import UserError
from dit_video.core.registry import load_entry_points
from dit_video.sampling.tasks import TASKS, Task
from dit_video.sampling.tasks.fields import FieldKind, TaskField, list_fields
from dit_video.sampling.tasks.task_file import read_task

_TYPES: dict[FieldKind, Any] = {
    "text": str,
    "whole": int,
    "number": float,
    "flag": bool,
    "clip": Path,
    "image": Path,
    "mask": Path,
    "size": str,
    "plane": str,
    "numbers": tuple[int, ...],
    "conditions": tuple[str, ...],
}
_METAVARS: dict[FieldKind, str] = {
    "size": "FRAMESxHEIGHTxWIDTH",
    "plane": "HEIGHTxWIDTH",
    "conditions": "FILE@FRAME[@STRENGTH]",
}


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options of a task. A subclass has those of one, by the names of its fields."""

    def read(self) -> Task:
        """Return the task, with its files.

        Raises:
          MissingError: If a file does not exist.
          DecodeError: If a clip is damaged.
          UserError: If a value is invalid.
        """
        name = next(name for name, kind in _SUBCOMMANDS.items() if type(self) is kind)
        given = {field: getattr(self, field.name) for field in list_fields(TASKS[name])}
        values = {field.name: _parse(field, value) for field, value in given.items() if value not in (None, ())}
        return read_task({"task": name, **values}, Path()).task


def make_subcommands() -> Any:
    """Return a type of which tyro makes a subcommand for every task, those of installed packages, too."""
    load_entry_points()
    for name, kind in TASKS.items():
        _SUBCOMMANDS[name] = _make_options(kind)
    commands = [Annotated[_SUBCOMMANDS[name], tyro.conf.subcommand(name, prefix_name=False)] for name in TASKS]
    return Union[tuple(commands)]  # noqa: UP007 (of members that are computed)


def make_default() -> TaskOptions:
    """Return the options of the task that is run without the name of one."""
    return _SUBCOMMANDS["generate"]()


_SUBCOMMANDS: dict[str, type[TaskOptions]] = {}


def _make_options(kind: type[Task]) -> type[TaskOptions]:
    annotated: Any = Annotated  # of types that are computed
    fields = []
    for field in list_fields(kind):
        value: Any = Literal[field.choices] if field.kind == "choice" else _TYPES[field.kind]
        if not field.is_required and field.default is None:
            value = value | None
        described = annotated[value, tyro.conf.arg(help=field.doc.text, metavar=_METAVARS.get(field.kind))]
        default: Any = dataclasses.field() if field.is_required else dataclasses.field(default=field.default)
        fields.append((field.name, described, default))
    name, namespace = f"{kind.__name__}Options", {"__doc__": kind.__doc__, "__module__": __name__}
    made: Any = dataclasses.make_dataclass(
        name, fields, bases=(TaskOptions,), namespace=namespace, frozen=True, kw_only=True
    )
    return made


def _parse(field: TaskField, value: Any) -> Any:
    """Return an option's value as in a task file."""
    match field.kind:
        case "clip" | "image" | "mask":
            return os.fspath(value)
        case "size":
            return tuple(parse_size(value))
        case "plane":
            return _parse_plane(value)
        case "conditions":
            return [_parse_condition(text) for text in value]
        case _:
            return value


def _parse_plane(size: str) -> tuple[int, int]:
    parts = size.split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise UserError(f"--size {size} is invalid: it must be HEIGHTxWIDTH. Use --size 64x64")
    return int(parts[0]), int(parts[1])


def _parse_condition(text: str) -> dict[str, Any]:
    if (match := re.fullmatch(r"(.+?)@(-?\d+)(?:@(\d*\.?\d+))?", text)) is None:
        raise UserError(
            f"--conditions {text} is invalid: it must be FILE@FRAME or FILE@FRAME@STRENGTH. Use first.png@0"
        )
    file, frame, strength = match.groups()
    return {"file": file, "frame": int(frame), "strength": float(strength or 1)}
