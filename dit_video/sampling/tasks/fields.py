"""Fields of tasks: what command lines, forms, files and recipes know of them.

The fields of a task's dataclass are its only description. A type says what a field holds, and `Annotated` adds its
`Doc`, its `Limits`, and whether a clip is an image (`OneFrame`).
"""

import numbers
import operator
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from dit_video.core.errors import UserError
from dit_video.sampling.pictures import Mask, to_clip, to_image, to_mask
from dit_video.sampling.request import Condition, Size, to_conditions
from dit_video.video import Clip

Plane = tuple[int, int]
"""Height and width in pixels."""
FieldKind = Literal[
    "text", "whole", "number", "flag", "choice", "clip", "image", "mask", "size", "plane", "numbers", "conditions"
]


@dataclass(frozen=True)
class Doc:
    """Documentation of a field."""

    text: str
    """A sentence."""
    title: str = ""
    """Title in a form; empty for the field's name."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a number, checked when a task is made."""

    minimum: float | int | None = None
    above: float | int | None = None
    """Number that it must exceed."""
    maximum: float | int | None = None
    step: float | int = 1
    """Distance of the numbers that the arrows of a form lead to."""

    def check(self, name: str, value: float) -> None:
        """Check the number of a field.

        Raises:
          UserError: If it is outside of the limits.
        """
        rules = [
            (self.minimum, "at least", operator.ge),
            (self.above, "above", operator.gt),
            (self.maximum, "at most", operator.le),
        ]
        given = [(limit, words, is_within) for limit, words, is_within in rules if limit is not None]
        if not all(is_within(value, limit) for limit, _, is_within in given):
            rule = " and ".join(f"{words} {limit:g}" for limit, words, _ in given)
            raise UserError(f"{name}={value} is invalid: it must be {rule}. Use {self.suggest():g}")

    def suggest(self) -> float:
        """Return a number within the limits."""
        if self.above is None:
            return 1 if self.minimum is None else self.minimum
        above = self.above + self.step
        return above if self.maximum is None or above <= self.maximum else (self.above + self.maximum) / 2


class OneFrame:
    """Mark of a field whose clip is an image, of one frame."""


@dataclass(frozen=True, kw_only=True)
class TaskField:
    """A field of a task."""

    name: str
    kind: FieldKind
    doc: Doc
    is_required: bool
    is_optional: bool
    """Whether None is a value."""
    default: Any
    """Default value; None for a required field."""
    limits: Limits = Limits()
    choices: tuple[str, ...] = ()
    """Values of a choice."""

    @property
    def title(self) -> str:
        """Return the title in a form."""
        return self.doc.title or self.name.replace("_", " ").capitalize()

    def convert(self, value: Any) -> Any:
        """Return a value as the task holds it: pictures as clips and masks, several numbers as a tuple.

        Raises:
          UserError: If it is of another kind than the field, or outside of the limits.
        """
        if value is None and self.is_optional:
            return None
        if self.kind in _CONVERSIONS:
            return _CONVERSIONS[self.kind](self.name, value)
        value = value.item() if isinstance(value, np.generic) else value
        rule = _RULES[self.kind]
        if not rule.is_valid(value):
            shown, example = textwrap.shorten(repr(value), 60, placeholder="…"), rule.example
            example = example or f"{self.limits.suggest():g}"
            raise UserError(f"{self.name}={shown} is invalid: it must be {rule.text}. Use {example}")
        if self.kind == "choice" and value not in self.choices:
            raise UserError(f"{self.name}={value!r} is invalid: it is no choice. Use {' or '.join(self.choices)}")
        if self.kind in ("whole", "number"):
            self.limits.check(self.name, value)
        if self.kind in ("size", "plane", "numbers"):
            return tuple(map(int, value))
        return value


class _Rule(NamedTuple):
    """Check of the values of a kind that `_CONVERSIONS` lacks, and what its error says."""

    text: str
    """What a value must be."""
    example: str
    """Valid value that the error suggests; empty for a number within the limits of the field."""
    is_valid: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _has_whole_numbers(value: Any, count: int | None = None) -> bool:
    is_list = isinstance(value, Sequence | np.ndarray) and np.ndim(value) == 1
    return is_list and count in (None, len(value)) and all(map(_is_whole, value))


_CONVERSIONS: dict[FieldKind, Callable[[str, Any], Any]] = {
    "clip": to_clip,
    "image": to_image,
    "mask": to_mask,
    "conditions": to_conditions,
}
_RULES: dict[FieldKind, _Rule] = {
    "text": _Rule("a text", "a text in quotes, and other values by their names", lambda value: isinstance(value, str)),
    "choice": _Rule("a text", "one of its names", lambda value: isinstance(value, str)),
    "whole": _Rule("a whole number", "", _is_whole),
    "number": _Rule("a number", "", lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool)),
    "flag": _Rule("true or false", "True", lambda value: isinstance(value, bool | np.bool_)),
    "size": _Rule("frames, height and width", "(9, 32, 48)", lambda value: _has_whole_numbers(value, 3)),
    "plane": _Rule("height and width", "(32, 48)", lambda value: _has_whole_numbers(value, 2)),
    "numbers": _Rule("a list of whole numbers", "[0, 4, 8]", _has_whole_numbers),
}


def list_fields(kind: type) -> tuple[TaskField, ...]:
    """Return the fields of a task's class, in order; one of another type than those of `FieldKind` is left out."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return tuple(made for each in fields(kind) if (made := _make_field(each, hints[each.name])) is not None)


def list_required(kind: type) -> tuple[str, ...]:
    """Return the names of the fields of a task's class that have no default, of any type."""
    return tuple(each.name for each in fields(kind) if _is_required(each))


def _is_required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _make_field(field: Any, hint: Any) -> TaskField | None:
    marks: tuple[Any, ...] = ()
    if typing.get_origin(hint) is Annotated:
        hint, *others = typing.get_args(hint)
        marks = tuple(others)
    if (kind := _find_kind(hint, marks)) is None:
        return None
    single = _drop_none(hint)
    is_optional = field.default is None or single is not hint
    return TaskField(
        name=field.name,
        kind=kind,
        doc=next((mark for mark in marks if isinstance(mark, Doc)), Doc("")),
        is_required=_is_required(field),
        is_optional=is_optional,
        default=None if field.default is MISSING else field.default,
        limits=next((mark for mark in marks if isinstance(mark, Limits)), Limits()),
        choices=typing.get_args(single) if kind == "choice" else (),
    )


def _find_kind(hint: Any, marks: Sequence[Any]) -> FieldKind | None:
    single = _drop_none(hint)
    if single is Clip:
        return "image" if OneFrame in marks else "clip"
    if typing.get_origin(single) is Literal:
        return "choice"
    kinds: dict[Any, FieldKind] = {
        str: "text",
        bool: "flag",
        int: "whole",
        float: "number",
        Mask: "mask",
        Size: "size",
        Plane: "plane",
        Sequence[int]: "numbers",
        Sequence[Condition]: "conditions",
    }
    return kinds.get(single)


def _drop_none(hint: Any) -> Any:
    """Return a type without None."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    members = tuple(each for each in typing.get_args(hint) if each is not type(None))
    return typing.Union[members]  # noqa: UP007 (of members that are computed)
