"""Type checks that are generated when a function is first called: a process calls few of all functions."""

import functools
from collections.abc import Callable
from typing import Any

from beartype import beartype


def check(function: Callable) -> Callable:
    """Return a function that checks its annotations with beartype, as `beartype.beartype` does."""
    get_checked = functools.cache(functools.partial(beartype, function))

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        __tracebackhide__ = True
        return get_checked()(*arguments, **options)

    return call
