"""The progress of this process: the steps that it finishes, and phases in which it finishes none.

A training counts its steps by `count_step`, inside `expect_steps`. Work between steps that may take long, such as
saving or sampling, is declared by `declare_phase`. Outside of trainings, `count_progress` counts what is done, such as
clips that are encoded. `hang_watch` and `heartbeat` read all of them from other threads.
"""

import contextlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

_MEDIAN_STEPS = 101
"""Number of newest steps whose median time is taken."""


@dataclass(eq=False)
class Phase:
    """Work during which no step is finished."""

    name: str
    """Name for messages, such as "save"."""
    max_seconds: float | None
    """Time after which the phase counts as hung; None for `TimeoutConfig.max_phase`."""
    is_short: bool = False
    """True if it may take as long as a step, `TimeoutConfig.max_step`; `max_seconds` is None then."""
    seconds: float = 0.0
    """Time that the phase has taken, without time in which the process was suspended."""


@dataclass
class ProgressRecord:
    """The steps and phases of a process."""

    step_count: int = 0
    """Number of steps finished."""
    changes: int = 0
    """Number of signs of progress: steps, other work that is counted, and begins and ends of loops and phases."""
    num_loops: int = 0
    """Number of running loops, from which steps are expected."""
    num_counted_works: int = 0
    """Number of works that are going on, from which progress besides steps is expected."""
    phases: list[Phase] = field(default_factory=list)
    """Phases that are active, in the order of their begins."""
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_MEDIAN_STEPS))
    """Times of the newest steps, without phases."""
    step_start: float | None = None
    """Time at which the current step began, moved by the duration of the phases since then; None before the first step
    of a loop, which compiles."""
    phase_start: float | None = None
    """Time at which the oldest of the active phases began, or the newest step inside it; None outside of phases."""
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
            self._exclude_phases(now)
            if self.step_start is not None:
                self.step_seconds.append(now - self.step_start)
            self.step_start = now
            self.step_count += 1
            self.changes += 1

    def _exclude_phases(self, now: float) -> None:
        """Move the begin of the step by the time of the phases that are active."""
        if self.phase_start is not None:
            if self.step_start is not None:
                self.step_start += now - self.phase_start
            self.phase_start = now

    def add_progress(self) -> None:
        """Count a sign of progress that is no step."""
        with self.lock:
            self.changes += 1

    @contextlib.contextmanager
    def run_counted_work(self) -> Iterator[None]:
        """Expect signs of progress inside the context."""
        with self.lock:
            self.num_counted_works += 1
            self.changes += 1
        try:
            yield
        finally:
            with self.lock:
                self.num_counted_works -= 1
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
            if not self.phases:
                self.phase_start = time.monotonic()
            self.phases.append(phase)
            self.changes += 1
        try:
            yield
        finally:
            with self.lock:
                self.phases.remove(phase)
                self.changes += 1
                if not self.phases:
                    self._exclude_phases(time.monotonic())
                    self.phase_start = None


PROGRESS = ProgressRecord()
"""The progress of this process."""


def count_step() -> None:
    """Count a step that this process finished, by which it is compared with the others."""
    PROGRESS.add_step()


def expect_steps() -> contextlib.AbstractContextManager[None]:
    """Return a context in which steps are counted, so that a process that finishes none is found to hang."""
    return PROGRESS.run_loop()


def count_progress() -> None:
    """Count something that this process has done outside of training steps, such as a clip that it encoded."""
    PROGRESS.add_progress()


def expect_progress() -> contextlib.AbstractContextManager[None]:
    """Return a context in which `count_progress` is called at least as often as a training finishes steps.

    In a run of several processes it counts as hung if none of them makes progress for `TimeoutConfig.max_step`. A
    single process is not watched outside of trainings.
    """
    return PROGRESS.run_counted_work()


def declare_phase(
    name: str, *, max_seconds: float | None = None, is_short: bool = False
) -> contextlib.AbstractContextManager[None]:
    """Return a context in which no step is expected, here and in the other processes, which may wait for this one.

    Args:
      name: Name of the work for messages, such as "save".
      max_seconds: Time after which the work counts as hung; None for `TimeoutConfig.max_phase`.
      is_short: True for the time of a step, `TimeoutConfig.max_step`, instead.
    """
    return PROGRESS.run_phase(Phase(name, max_seconds, is_short))
