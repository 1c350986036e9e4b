"""A watch that ends a process in which nothing goes on, as where all processes of a run wait for each other.

`heartbeat` names a process that is behind the others. Where all hang at the same step, in a collective operation or in
a read from storage, none is behind; and a single process has no others. So each process watches its own steps and
phases (`progress`), and ends with the stacks of all threads and with exit code 75, to be started again. Processes of a
run also watch what they do outside of trainings, where the progress of one counts for all: the others may wait for it.
"""

import math
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from dit_video.core.errors import EXIT_TRY_AGAIN
from dit_video.distributed.faults.progress import PROGRESS, Phase, ProgressRecord
from dit_video.distributed.faults.stacks import dump_stacks, exit_now
from dit_video.distributed.faults.timeouts import TimeoutConfig
from dit_video.distributed.faults.watchdog import Watchdog

_MAX_INTERVAL = 1.0
"""Longest interval between two looks at the progress, in seconds."""
_MIN_STALL = 10.0
"""Shortest time without Python after which the watchdog ends the process, in seconds."""
_MAX_END_SECONDS = 120.0
"""Time in which a process that hangs has to end by itself."""
_MEDIAN_STEPS = 20
"""Number of median steps that a step may take, if that is more than `TimeoutConfig.max_step`."""


def end_hanging_process(message: str) -> None:
    """Print that this process hangs, with the stacks of its threads, and end it."""
    advice = "Checkpoints are complete: start it again to continue from the newest one."
    print(f"error: this process hangs: {message}. Its stacks follow. {advice}", file=sys.stderr)
    dump_stacks()
    exit_now(EXIT_TRY_AGAIN)


class HangWatch:
    """A watch over the progress of this process, active as a context."""

    def __init__(
        self,
        timeouts: TimeoutConfig,
        *,
        end: Callable[[str], None] = end_hanging_process,
        is_waiting: Callable[[], bool] = lambda: False,
        count_run_changes: Callable[[], int] | None = None,
        progress: ProgressRecord = PROGRESS,
    ) -> None:
        """Initialize the watch.

        Args:
          timeouts: Limits of a step and of a phase.
          end: Function that ends the process; its argument says what hangs.
          is_waiting: Function that returns True while another process is in a phase, so that this one may wait for it.
          count_run_changes: Function that returns the number of signs of progress in all processes of a run, which is
            watched outside of loops, too; None for a single process.
          progress: What the process works on.
        """
        self._timeouts, self._end, self._is_waiting, self._progress = timeouts, end, is_waiting, progress
        self._count_run_changes = count_run_changes
        self._interval = min(_MAX_INTERVAL, timeouts.max_step / 10)
        self._changes = (-1, -1)
        """Numbers of signs of progress, here and in all processes, at the last look."""
        self._idle_seconds, self._remaining_seconds = 0.0, math.inf
        self._finished = threading.Event()
        self._watchdog = Watchdog()
        self._thread = threading.Thread(target=self._run, name="watch for hangs", daemon=True)

    def __enter__(self) -> "HangWatch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._finished.set()
        self._thread.join()
        self._watchdog.close()

    def get_step_limit(self) -> float:
        """Return the time without a step, in seconds, after which the process counts as hung."""
        return max(self._timeouts.max_step, _MEDIAN_STEPS * self._progress.median_step_seconds)

    def find_hang(self, seconds: float) -> str:
        """Return what hangs; empty if nothing does.

        Args:
          seconds: Time since the last call, in which the process was not suspended.
        """
        self._remaining_seconds = math.inf
        num_run_changes = 0 if self._count_run_changes is None else self._count_run_changes()
        with self._progress.lock:
            phases, is_looping = list(self._progress.phases), self._progress.num_loops > 0
            is_counting = self._progress.num_counted_works > 0
            changes = (self._progress.changes, num_run_changes)
        if changes != self._changes:
            self._changes, self._idle_seconds = changes, 0.0
        for phase in phases:
            phase.seconds += seconds
            limit = self._get_phase_limit(phase)
            if self._is_over(phase.seconds, limit):
                return f"the phase {phase.name} has not ended for {limit:g} s"
        is_single = self._count_run_changes is None
        if phases or (is_single and not is_looping) or self._is_waiting():
            return ""
        self._idle_seconds += seconds
        if is_looping:
            limit, problem = self.get_step_limit(), "no step was finished"
        else:
            limit = self._timeouts.max_step if is_counting else self._timeouts.max_idle
            problem = "no progress was made"
        return f"{problem} for {limit:g} s" if self._is_over(self._idle_seconds, limit) else ""

    def _get_phase_limit(self, phase: Phase) -> float:
        if phase.is_short:
            return self._timeouts.max_step
        return self._timeouts.max_phase if phase.max_seconds is None else phase.max_seconds

    def _is_over(self, seconds: float, limit: float) -> bool:
        self._remaining_seconds = min(self._remaining_seconds, limit - seconds)
        return seconds > limit

    def _run(self) -> None:
        last = time.monotonic()
        while not self._finished.wait(self._interval):
            now = time.monotonic()
            # A process that was suspended, or a laptop that slept, did not hang meanwhile.
            message = self.find_hang(min(now - last, 2 * self._interval))
            last = now
            if message:
                self._watchdog.expect_call(_MAX_END_SECONDS)
                self._end(message)
                return
            # It ends the process if no Python code, and so not this thread, can run until the limit.
            self._watchdog.expect_call(max(1.1 * self._remaining_seconds, _MIN_STALL))
