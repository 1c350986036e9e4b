"""The progress of this process: what it works on, and signs that it goes on.

A training counts its steps. Work between steps that may take long, such as saving or sampling, is declared by
`declare_phase`; elsewhere `count_progress` counts what is done, such as clips that are encoded. `hang_watch` reads both
from another thread.
"""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Limit = float | Literal["max_step", "max_phase"]
"""Longest time without a sign of progress: seconds, or the name of a field of `TimeoutConfig`."""
STEP_NAME, PROGRESS_NAME = "step", "progress"
"""Names of works that are no phases."""


@dataclass(frozen=True, eq=False)
class Work:
    """Something that this process does, with the longest time between two signs of its progress."""

    name: str
    limit: Limit


@dataclass
class ProgressRecord:
    """The works of a process that are going on, and a counter of its signs of progress."""

    changes: int = 0
    """Number of signs of progress: steps, other things that are counted, and begins and ends of works."""
    works: list[Work] = field(default_factory=list)
    """Works that are going on, each inside the one before it."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self) -> None:
        """Count a sign of progress."""
        with self.lock:
            self.changes += 1

    @contextlib.contextmanager
    def do(self, work: Work) -> Iterator[None]:
        """Expect progress at the rate of this work inside the context."""
        with self.lock:
            self.works.append(work)
            self.changes += 1
        try:
            yield
        finally:
            with self.lock:
                self.works.remove(work)
                self.changes += 1


PROGRESS = ProgressRecord()
"""The progress of this process."""


def count_progress() -> None:
    """Count something that this process has done: a training step, or a clip that it encoded."""
    PROGRESS.count()


def expect_steps() -> contextlib.AbstractContextManager[None]:
    """Return the context of a training's loop, which counts its steps at least every `TimeoutConfig.max_step`."""
    return PROGRESS.do(Work(STEP_NAME, "max_step"))


def expect_progress() -> contextlib.AbstractContextManager[None]:
    """Return a context in which `count_progress` is called at least every `TimeoutConfig.max_step`.

    A single process is not watched outside of trainings.
    """
    return PROGRESS.do(Work(PROGRESS_NAME, "max_step"))


def declare_phase(name: str, limit: Limit = "max_phase") -> contextlib.AbstractContextManager[None]:
    """Return a context for work of a training in which it finishes no step; the other processes may wait for it.

    Args:
      name: Name of the work for messages, such as "save".
      limit: Longest time without a sign of progress, after which the work counts as hung.
    """
    return PROGRESS.do(Work(name, limit))
