"""Classes of other packages that configs may hold.

A config file names classes, and reading one must never run code that the file chooses. `config_json` rebuilds only
classes of `dit_video` and classes that were registered before. The user's own code registers them, or an installed
package with an entry point in the group `dit_video`, whose module registers them when it is imported:

    [project.entry-points.dit_video]
    my_samplers = "my_package.samplers"

A class of a script, a notebook or a config file may be registered, too, but is not written (`to_portable_json`): no
other process could read it.
"""

import dataclasses
import functools
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TypeVar

from dit_video.core.errors import UserError

GROUP = "dit_video"
AnyClass = TypeVar("AnyClass", bound=type)
Value = TypeVar("Value")
_CLASSES: dict[str, type] = {}


def get_class_name(cls: type) -> str:
    """Return the name of a registered class in a config: `module:class`."""
    return f"{cls.__module__}:{cls.__qualname__}"


def register(cls: AnyClass) -> AnyClass:
    """Let configs hold a dataclass of another package; usable as a decorator.

    A class that is defined again, as in a notebook, replaces the earlier one.

    Raises:
      UserError: If the class is not a dataclass.
    """
    if not dataclasses.is_dataclass(cls):
        raise UserError(f"{cls.__qualname__} is not a dataclass; add @dataclass(frozen=True, kw_only=True)")
    _CLASSES[get_class_name(cls)] = cls
    return cls


def find_class(name: str) -> type | None:
    """Return the registered class with this name, or None; installed packages are searched, too."""
    return find_named(_CLASSES, name)


def find_named(table: Mapping[str, Value], name: str) -> Value | None:
    """Return the value of a name, or None; if it is missing, entry points are loaded, which may add it to the table."""
    if name not in table:
        load_entry_points()
    return table.get(name)


@functools.cache
def load_entry_points() -> None:
    """Import the modules that installed packages name as entry points, once."""
    for entry_point in entry_points(group=GROUP):
        entry_point.load()
