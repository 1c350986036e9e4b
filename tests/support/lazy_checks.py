"""Type checks that are generated when a function is first called: a process calls few of all functions."""

import functools
from collections.abc import Callable
from typing import Any

from beartype import beartype


def check(function: Callable) -> Callable:
    """Return a function that checks its annotations with beartype, as `beartype.beartype` does."""
    checked = []

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        __tracebackhide__ = True
        if not checked:
            checked.append(beartype(function))
        return checked[0](*arguments, **options)

    return call
