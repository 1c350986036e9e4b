"""Conversion of frozen, keyword-only dataclasses to JSON and back.

A config is written as an object whose key `type` holds the class's qualified name in the package that exports it, so a
class may move inside its package. The config is rebuilt by that name, but only if the class belongs to `dit_video` or
is registered (see `registry`), so a config file can never run foreign code. Files that other processes read are written
by `to_portable_json`, which refuses classes that those could not import. Tuples are written as lists and come back
as tuples (a config holds no lists), or as the NamedTuple that the field is annotated with. A class whose fields have
changed may read those of before: its class method `upgrade_json(fields)` returns fields that it has.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dit_video.core import registry
from dit_video.core.errors import UserError

_PACKAGE = "dit_video"
_REGISTER = "dit_video.core.registry.register(Class)"
_MAX_SHOWN = 8
"""Largest number of differences that a message names."""


def to_json(value: Any) -> Any:
    """Return a JSON value that `from_json` turns back into an equal `value`.

    Raises:
      TypeError: If a part is not a dataclass of this package or a registered one, a tuple, a dict with string keys, or
        a JSON scalar.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        if cls.__module__.split(".")[0] == _PACKAGE:
            name = f"{_find_home_module(cls)}:{cls.__qualname__}"
        elif registry.find_class(name := registry.get_class_name(cls)) is not cls:
            raise TypeError(f"{cls.__module__}.{cls.__qualname__} lies outside {_PACKAGE}; register it: {_REGISTER}")
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": name, **fields}
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(name): to_json(item) for name, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a config cannot hold a {type(value).__name__}")


def to_portable_json(value: Any) -> Any:
    """Return `to_json(value)`, for a file that other processes read.

    Raises:
      UserError: If a class is not registered, or is defined where other processes cannot import it: in a script, a
        notebook, a config file or a function; or `from_json` would refuse a value.
    """
    try:
        written = to_json(value)
    except TypeError as error:
        raise UserError(f"the config cannot be written: {error}") from error
    for name in _iter_types(written):
        check_importable(name)
    from_json(written)
    return written


def check_importable(name: str) -> None:
    """Check that other processes can import a class by its name in a config.

    Raises:
      UserError: If it is defined in a script, a notebook, a config file or a function.
    """
    module, _, qualname = name.partition(":")
    if "<locals>" in qualname or not _is_importable(module):
        raise UserError(
            f"config type {name!r} is invalid: it is defined in a script, a notebook, a config file or a function, "
            "from where other processes cannot import it. Use a module that can be imported: move the class there."
        )


def from_json(value: Any) -> Any:
    """Rebuild a value that `to_json` wrote.

    Raises:
      UserError: If a type is neither of this package nor registered, or is unknown to this version, a field does not
        exist in its type, or a value does not have its field's type.
    """
    if isinstance(value, list):
        return tuple(from_json(item) for item in value)
    if not isinstance(value, dict):
        return value
    if "type" not in value:
        return {name: from_json(item) for name, item in value.items()}
    cls = _resolve_class(value["type"])
    items = {name: from_json(item) for name, item in value.items() if name != "type"}
    if (upgrade := getattr(cls, "upgrade_json", None)) is not None:
        items = upgrade(items)
    fields = {field.name: (field.default, field.default_factory) for field in dataclasses.fields(cls)}
    if unknown := sorted(items.keys() - fields.keys()):
        raise UserError(f"{cls.__qualname__} has no field {', '.join(unknown)}; use the version that wrote this config")
    required = {name for name, defaults in fields.items() if defaults == (dataclasses.MISSING, dataclasses.MISSING)}
    if missing := sorted(required - items.keys()):
        raise UserError(f"{cls.__qualname__} lacks the field {', '.join(missing)}; use the version that wrote it")
    hints = typing.get_type_hints(cls)
    values = {name: _to_named_tuples(hints[name], item) for name, item in items.items()}
    for name, item in values.items():
        if not _is_valid(hints[name], item):
            default = fields[name][0]
            fix = f"Use {name}={default!r}." if isinstance(default, bool | int | float | str) else ""
            rule = f"{name}={item!r} of {cls.__qualname__} is invalid: it must be {_describe_type(hints[name])}"
            raise UserError(f"{rule}. {fix}" if fix else rule)
    return cls(**values)


def rewrite(value: Any) -> Any:
    """Return a JSON value with all configs in it as this version writes them; what it can't read stays as it is."""
    if isinstance(value, dict) and "type" in value:
        with contextlib.suppress(UserError):
            return to_json(from_json(value))
    if isinstance(value, dict):
        return {name: rewrite(item) for name, item in value.items()}
    return [rewrite(item) for item in value] if isinstance(value, list) else value


class Change(NamedTuple):
    """A value that differs between two configs in JSON."""

    path: str
    """Path of the value, such as `stages[1].data.max_pixels`."""
    old: Any
    """Value in the first config; None if it has no such value."""
    new: Any
    """Value in the second config; None if it has no such value."""


def describe_difference(old: Any, new: Any, path: str = "") -> str:
    """Describe where two JSON values differ, naming the first few differences; empty if they are equal."""
    return describe_changes(list_changes(old, new, path))


def describe_changes(changes: Sequence[Change]) -> str:
    """Describe changes, naming the first few; empty if there are none."""
    texts = [f"{change.path} is {change.old!r} there and {change.new!r} here" for change in changes[:_MAX_SHOWN]]
    more = f" and {len(changes) - _MAX_SHOWN} more" if len(changes) > _MAX_SHOWN else ""
    return ", ".join(texts) + more


def list_changes(old: Any, new: Any, path: str = "") -> tuple[Change, ...]:
    """Return the values that differ between two JSON values; lists of different lengths differ as a whole.

    A mapping in a config differs from another one if their names are in another order: it may mean something, as that
    of guidance scales does.
    """
    return tuple(_iter_changes(old, new, path))


def _iter_changes(old: Any, new: Any, path: str, *, is_config: bool = False) -> Iterator[Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        is_mapping = is_config and "type" not in old
        is_config = is_config or "type" in old
        if is_mapping and old.keys() == new.keys() and [*old] != [*new]:
            yield Change(path, [*old], [*new])
        for name in (*old, *(name for name in new if name not in old)):
            inner = f"{path}.{name}" if path else name
            yield from _iter_changes(old.get(name), new.get(name), inner, is_config=is_config)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, items in enumerate(zip(old, new, strict=True)):
            yield from _iter_changes(*items, f"{path}[{index}]", is_config=is_config)
    elif old != new:
        yield Change(path, old, new)


def _iter_types(written: Any) -> Iterator[str]:
    """Yield the names of the classes in what `to_json` returned."""
    if isinstance(written, dict):
        if "type" in written:
            yield written["type"]
        written = list(written.values())
    if isinstance(written, list):
        for item in written:
            yield from _iter_types(item)


def _is_importable(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # ValueError: of a file that runs, such as a script
        return False
    return spec is not None and spec.name == module  # `python -m package.module` has the spec of `package.module`


def _find_home_module(cls: type) -> str:
    """Return the module that a class is known by: the outermost package that exports it, or its own."""
    parts = cls.__module__.split(".")
    for length in range(2, len(parts)):
        package = ".".join(parts[:length])
        if getattr(sys.modules[package], cls.__qualname__, None) is cls:
            return package
    return cls.__module__


def _to_named_tuples(hint: Any, value: Any) -> Any:
    """Convert a tuple to the NamedTuple of the field's annotation, or its items if that is a tuple of NamedTuples."""
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[1:] == (...,) and isinstance(value, tuple):
        return tuple(_to_named_tuples(typing.get_args(hint)[0], item) for item in value)
    fields = getattr(hint, "_fields", None)
    if fields is None or not isinstance(value, tuple):
        return value
    if len(value) != len(fields):
        raise UserError(f"{len(value)} values are invalid: {hint.__name__} has {len(fields)} ({', '.join(fields)})")
    return hint(*value)


def _describe_type(hint: Any) -> str:
    """Return what a value of an annotated type is: `of type int`, or the values of a `Literal`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe_type(argument) for argument in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if hint is type(None):
        return "None"
    return f"of type {hint.__name__ if isinstance(hint, type) else hint}"


def _is_valid(hint: Any, value: Any) -> bool:
    """Return True if a value has the annotated type, or if JSON cannot hold such a type (a protocol, for example)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_valid(argument, value) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        inner = arguments[:1] * len(value) if arguments[-1:] == (...,) else arguments
        return len(inner) == len(value) and all(map(_is_valid, inner, value))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    if hints := typing.get_type_hints(hint) if hasattr(hint, "_fields") else {}:
        return isinstance(value, hint) and all(map(_is_valid, hints.values(), value))
    is_checked = isinstance(hint, type) and (dataclasses.is_dataclass(hint) or inspect.isabstract(hint))
    return isinstance(value, hint) if is_checked else True


def _resolve_class(name: str) -> type:
    module, _, qualname = str(name).partition(":")
    if module.split(".")[0] != _PACKAGE:
        if (registered := registry.find_class(str(name))) is None:
            raise UserError(
                f"config type {name!r} lies outside {_PACKAGE} and is not registered. Import what calls {_REGISTER}; "
                f'for a script, let an installed package name the module "{module}" in its entry points of the group '
                f"{registry.GROUP}"
            )
        return registered
    try:
        cls: Any = importlib.import_module(module)
        for part in qualname.split("."):
            cls = getattr(cls, part)
    except (ImportError, AttributeError) as error:
        raise UserError(f"config type {name!r} does not exist in this version of {_PACKAGE}") from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise UserError(f"config type {name!r} is not a dataclass, as configs are")
    return cls
