"""The progress of this process: the steps that it finishes, and phases in which it finishes none.

A training counts its steps by `count_step`, inside `expect_steps`. Work between steps that may take long, such as
saving or sampling, is declared by `declare_phase`. `hang_watch` and `heartbeat` read both from other threads.
"""

import contextlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

_MEDIAN_STEPS = 101
"""Number of the newest steps of whose times the median is taken."""


@dataclass(eq=False)
class Phase:
    """Work during which no step is finished."""

    name: str
    """Name for messages, such as "save"."""
    max_seconds: float | None
    """Time after which the phase counts as hung; None for `TimeoutConfig.max_phase`."""
    seconds: float = 0.0
    """Time that the phase has taken, without time in which the process was suspended."""


@dataclass
class ProgressRecord:
    """The steps and phases of a process."""

    step_count: int = 0
    """Number of steps finished."""
    changes: int = 0
    """Number of signs of progress: steps, and begins and ends of phases."""
    num_loops: int = 0
    """Number of loops that are running, of which steps are expected."""
    phases: list[Phase] = field(default_factory=list)
    """Phases that are active, in the order of their begins."""
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_MEDIAN_STEPS))
    """Times of the newest steps, without phases."""
    step_start: float | None = None
    """Time at which the current step began; None before the first step of a loop, which compiles."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def median_step_seconds(self) -> float:
        """Return the median time of the newest steps; 0 before there are any."""
        with self.lock:
            return statistics.median(self.step_seconds) if self.step_seconds else 0.0

    def add_step(self) -> None:
        """Count a finished step."""
        with self.lock:
            now = time.monotonic()
            if self.step_start is not None:
                self.step_seconds.append(now - self.step_start)
            self.step_start = now
            self.step_count += 1
            self.changes += 1

    @contextlib.contextmanager
    def run_loop(self) -> Iterator[None]:
        """Expect steps inside the context."""
        with self.lock:
            self.num_loops += 1
            self.changes += 1
            self.step_start = None
        try:
            yield
        finally:
            with self.lock:
                self.num_loops -= 1
                self.changes += 1

    @contextlib.contextmanager
    def run_phase(self, phase: Phase) -> Iterator[None]:
        """Expect no steps inside the context."""
        with self.lock:
            self.phases.append(phase)
            self.changes += 1
        try:
            yield
        finally:
            with self.lock:
                self.phases.remove(phase)
                self.changes += 1
                if self.step_start is not None:
                    self.step_start = time.monotonic()


PROGRESS = ProgressRecord()
"""The progress of this process."""


def count_step() -> None:
    """Count a step that this process finished, by which it is compared with the others."""
    PROGRESS.add_step()


def expect_steps() -> contextlib.AbstractContextManager[None]:
    """Return a context in which steps are counted, so that a process that finishes none is found to hang."""
    return PROGRESS.run_loop()


def declare_phase(name: str, *, max_seconds: float | None = None) -> contextlib.AbstractContextManager[None]:
    """Return a context in which no step is expected, here and in the other processes, which may wait for this one.

    Args:
      name: Name of the work for messages, such as "save".
      max_seconds: Time after which the work counts as hung; None for `TimeoutConfig.max_phase`.
    """
    return PROGRESS.run_phase(Phase(name, max_seconds))
