"""Type checks that are generated when a function is first called: a process calls few of all functions."""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.door import die_if_unbearable

CONF = BeartypeConf(is_pep484_tower=True)
"""An int is a float, as type checkers say."""


def check(function: Callable) -> Callable:
    """Return a function that checks its annotations with beartype, as `beartype.beartype` does.

    A dataclass that converts its arguments in `__post_init__` is checked by the fields that it then has.
    """
    get_checked = functools.cache(functools.partial(beartype(conf=CONF), function))

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        __tracebackhide__ = True
        if function.__name__ != "__init__" or not hasattr(type(arguments[0]), "__post_init__"):
            return get_checked()(*arguments, **options)
        values = vars(arguments[0])  # none at the first call, before the object is made
        for name, hint in get_hints(type(arguments[0])).items() if values else ():
            die_if_unbearable(values[name], hint, conf=CONF)
        return function(*arguments, **options)

    return call


@functools.cache
def get_hints(cls: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}
