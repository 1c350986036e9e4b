"""A watch that ends a process in which nothing goes on, as where all processes of a run wait for each other.

JAX ends the others of a process that is lost, but takes one that hangs for a healthy one. So each process watches its
own progress (`progress`): if there is none for the time that its work may take, it ends with the stacks of all threads
and with exit code 75, to be started again. Processes of a run wait for each other: the progress of one counts for all,
and so does the longest time that one of them may take. All end if one ends with an error.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType

import jax

from dit_video.core.errors import EXIT_TRY_AGAIN, UserError
from dit_video.distributed.faults.progress import PROGRESS, PROGRESS_NAME, STEP_NAME, ProgressRecord, Work
from dit_video.distributed.faults.stacks import dump_stacks, exit_now
from dit_video.distributed.faults.store import KeyValueStore
from dit_video.distributed.faults.timeouts import TimeoutConfig
from dit_video.distributed.faults.watchdog import Watchdog

_MAX_INTERVAL = 1.0
"""Longest interval between two looks at the progress, in seconds."""
_READ_SHARE = 0.1
"""Share of its limit after which a process without progress looks again if others have made some."""
_MIN_STALL = 20.0
"""Shortest time without Python after which the watchdog ends the process, in seconds."""
_PROGRESS, _ENDED = "progress/", "ended"
"""Names in the store: of the progress of each process, whose number follows, and of why the first one ended."""


class HangWatch:
    """A watch over the progress of this process, active as a context."""

    def __init__(
        self,
        timeouts: TimeoutConfig,
        store: KeyValueStore | None = None,
        *,
        name: str = "this process",
        progress: ProgressRecord = PROGRESS,
    ) -> None:
        """Initialize the watch.

        Args:
          timeouts: Longest times without progress.
          store: Store of the processes of a run; None for a single process.
          name: Name of this process for messages.
          progress: What the process works on.
        """
        self._timeouts, self._store, self._name, self._progress = timeouts, store, name, progress
        self._interval = min(_MAX_INTERVAL, timeouts.max_step / 10)
        if store is not None:
            self._interval = max(self._interval, store.group.get_interval(self._interval, calls=2))
        self._changes = -1
        self._others: Mapping[str, list[float]] = {}
        """Signs of progress and limits of all processes when they were last read."""
        self._seconds = self._read_seconds = 0.0
        """Time without a sign of progress, in which this process was not suspended, now and at the last read."""
        self.cause = ""
        """What another process has told of its end, after which this one ends, too."""
        self._tell_time = 0.0
        """Time at which this process told the others that it ends."""
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
        self._thread.join(5 * self._interval)  # a call of the store may hang
        self._watchdog.close()

    def find_hang(self, seconds: float) -> str:
        """Return what hangs; empty if nothing does.

        Args:
          seconds: Time since the last call, in which the process was not suspended.
        """
        with self._progress.lock:
            changes, works = self._progress.changes, list(self._progress.works)
        if changes != self._changes:
            self._changes, self._seconds, self._read_seconds = changes, 0.0, 0.0
        self._seconds += seconds
        work, limit = self._find_limit(works)
        if self._store is not None and self._seconds - self._read_seconds > _READ_SHARE * limit:
            others = {name: json.loads(text) for name, text in self._store.read(_PROGRESS).items()}
            if others != self._others:
                self._others, self._seconds = others, 0.0
            self._read_seconds = self._seconds
        limit = max([limit, *(other_limit for _, other_limit in self._others.values())])
        if self._seconds <= limit:
            return ""
        problem = {STEP_NAME: "no step was finished", PROGRESS_NAME: "no progress was made"}
        return f"{problem.get(work, f'the phase {work} has made no progress')} for {limit:g} s"

    def _find_limit(self, works: list[Work]) -> tuple[str, float]:
        """Return the innermost work, and the time that may pass without progress."""
        is_single = self._store is None
        watched = [work for work in works if not (is_single and work.name == PROGRESS_NAME)]
        if not watched:
            return PROGRESS_NAME, float("inf") if is_single else self._timeouts.max_idle
        limit = watched[-1].limit
        return watched[-1].name, getattr(self._timeouts, limit) if isinstance(limit, str) else limit

    def _run(self) -> None:
        last = time.monotonic()
        while not self._finished.wait(self._interval):
            now = time.monotonic()
            # A process that was suspended, or a laptop that slept, did not hang meanwhile.
            seconds, last = min(now - last, 2 * self._interval), now
            try:
                if self._store is not None:
                    self._follow(self._store)
                message = self.find_hang(seconds)
            except jax.errors.JaxRuntimeError:  # JAX ends this process if the first one, with the store, is gone.
                message = ""
            if message:
                message = f"{self._name} hangs: {message}"
                self.tell(message, EXIT_TRY_AGAIN)
                self.end(message, EXIT_TRY_AGAIN)
            # It ends the process if no Python code, and so not this thread, can run until the limit.
            _, limit = self._find_limit(self._progress.works)
            self._watchdog.expect_call(max(1.1 * (limit - self._seconds), _MIN_STALL))

    def _follow(self, store: KeyValueStore) -> None:
        """Publish the progress of this process, and end it if another one has ended with an error."""
        _, limit = self._find_limit(self._progress.works)
        store.write(f"{_PROGRESS}{store.group.process_id}", json.dumps([self._progress.changes, limit]))
        if not self._tell_time and (text := store.try_read(_ENDED)):
            self.cause, code = json.loads(text)
            if not self._finished.wait(self._timeouts.grace):  # It may have the same error, and reports it itself.
                self.end(self.cause, code if code == UserError.code else EXIT_TRY_AGAIN)

    def tell(self, message: str, code: int) -> None:
        """Tell all processes that this one ends with an error."""
        if self._store is not None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                if self._store.try_read(_ENDED) is None:
                    self._store.write(_ENDED, json.dumps([message, code]))
                    self._tell_time = time.monotonic()

    def end(self, message: str, code: int) -> None:
        """End this process with its stacks, because it hangs or another one has ended."""
        advice = "Checkpoints are complete: start it again to continue from the newest one."
        if code != EXIT_TRY_AGAIN:
            advice = "Correct that first. Checkpoints are complete: the same command continues from the newest one."
        print(f"error: {message}. {advice}", file=sys.stderr)
        if code == EXIT_TRY_AGAIN:
            dump_stacks()
        self.leave(code)

    def leave(self, code: int) -> None:
        """End this process at once; the first one, which keeps the store, once the others could end by themselves."""
        self._watchdog.close()
        grace = self._timeouts.grace
        if self._store is not None and self._store.group.is_first:
            time.sleep(max(0.0, self._tell_time + grace - time.monotonic()) + grace / 4)
        exit_now(code)
