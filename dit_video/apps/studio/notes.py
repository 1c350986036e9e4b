"""Warnings about a job, such as a prompt that is cut, for the page of its user instead of the server's log."""

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any

_LOCAL = threading.local()


@contextlib.contextmanager
def collect_notes() -> Iterator[list[str]]:
    """Collect the texts of warnings in this thread, each once, after `show_warnings_as_notes` was called."""
    notes: list[str] = []
    before = getattr(_LOCAL, "notes", None)
    _LOCAL.notes = notes
    try:
        yield notes
    finally:
        _LOCAL.notes = before


def show_warnings_as_notes() -> None:
    """Have warnings become notes in threads that collect them; in others they are shown as before.

    `warnings.catch_warnings` would collect those of all threads.
    """
    show = warnings.showwarning

    def show_or_collect(message: Warning | str, category: type[Warning], *arguments: Any, **options: Any) -> None:
        notes = getattr(_LOCAL, "notes", None)
        if notes is None or not issubclass(category, UserWarning):
            show(message, category, *arguments, **options)
        elif str(message) not in notes:
            notes.append(str(message))

    warnings.filterwarnings("always", category=UserWarning)  # by default a second job has none
    warnings.showwarning = show_or_collect
