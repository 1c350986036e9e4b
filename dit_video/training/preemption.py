"""Graceful end of a training run after a signal: after the same saved step in all processes, and in time.

SIGTERM (preemption) and SIGINT (Ctrl-C) stop the loop after the current step; a second signal ends the process
immediately. In a run of several processes any of them may receive the signal. A thread in each process polls a few
times per second whether one did. Then each process publishes the step that it will reach in any case, and the largest
of these is the last step of all: no process is beyond it, and no process has to wait for a device to agree.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax

from dit_video.core.errors import TRY_AGAIN, Stopped
from dit_video.distributed.heartbeat import count_step
from dit_video.distributed.store import Store

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_POLL = 0.25
"""Seconds between two polls for a signal in another process."""
_AGREEMENT = 60.0
"""Timeout in seconds for the steps of the other processes, whose threads publish them immediately."""
_END = 3600.0
"""Timeout in seconds for all processes to end a run that all have saved. Processes that hang are detected by
`distributed.heartbeat`."""
_numbers = itertools.count()


class Stop:
    """The request of a signal to stop the run."""

    def __init__(self) -> None:
        self.asked = ""
        """Name of the signal; empty without one."""
        self.told = False
        """True once the loop has seen the signal; a later signal is re-raised after the run."""

    def now(self) -> bool:
        """Return True if the loop must not start another step."""
        return bool(self.asked)

    def passed(self, done: int) -> None:
        """Record the number of steps done; the next step begins unless `should_stop`."""

    def ended(self) -> bool:
        """Return True if a signal came before the end of the run, in which case nothing is started after it."""
        self.told = bool(self.asked)
        return self.told

    def close(self) -> None:
        """Release resources at the end of the run."""


class StopTogether(Stop):
    """A stop request shared by several processes, which all create one for each of their runs, in the same order."""

    def __init__(self, done: int) -> None:
        """Start the polling thread; `steps_done` is the number of steps done at the start."""
        super().__init__()
        self._store = Store(f"stop/{next(_numbers)}")
        self._bound = done + 1
        """Step that this process reaches in any case."""
        self._last: int | None = None
        self._holds = False
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="stop together", daemon=True)
        self._thread.start()

    def now(self) -> bool:
        return self._holds

    def passed(self, done: int) -> None:
        count_step()
        with self._lock:  # blocks while the processes agree, so that the published step stays true
            if self._last is None:
                self._bound = done + 1
            else:
                self._holds = done >= self._last

    def ended(self) -> bool:
        self._store.write(f"end/{jax.process_index()}", self.asked)
        values = self._store.wait_for({f"end/{index}" for index in range(jax.process_count())}, _END)
        signal_names = {name: text for name, text in values.items() if name.startswith("end/") and text}
        self.asked = self.asked or next(iter(signal_names.values()), "")
        self.told = bool(signal_names)
        return self.told

    def close(self) -> None:
        self._closed.set()
        self._thread.join(_AGREEMENT)
        # Another process may still wait for this one's step. The first process, which keeps the store, may be gone.
        with contextlib.suppress(Exception):
            self._answer()

    def _listen(self) -> None:
        process, is_published = jax.process_index(), False
        while not self._closed.wait(_POLL):
            try:
                if self.asked and not is_published:
                    self._store.write(f"asked/{process}", self.asked)
                    is_published = True
                values = self._store.read()
                if requests := sorted(name for name in values if name.startswith("asked/")):
                    self.asked = self.asked or f"{values[requests[0]]} in process {requests[0].removeprefix('asked/')}"
                    self._agree()
                    return
            except Exception:  # the process that keeps the store is gone, so this one cannot go on for long either
                return

    def _answer(self) -> None:
        self._store.write(f"bound/{jax.process_index()}", str(self._bound))

    def _agree(self) -> None:
        with self._lock:
            self._answer()
            names = {f"bound/{index}" for index in range(jax.process_count())}
            values = self._store.wait_for(names, _AGREEMENT)
            self._last = max(int(values[name]) for name in names)


@contextlib.contextmanager
def signals(done: int, *, within: float) -> Iterator[Stop]:
    """Record the first SIGINT or SIGTERM and raise KeyboardInterrupt on the second; restore the handlers at the end.

    Python allows handlers in the main thread only; in other threads signals are left to the caller.

    Args:
      steps_done: Number of steps done at the start.
      grace: Seconds after the first signal within which the block has to end. Otherwise, such as if a step or a disk
        hangs, the process exits with code `TRY_AGAIN`.
    """
    stop = Stop() if jax.process_count() == 1 else StopTogether(done)
    timers: list[threading.Timer] = []
    previous: dict[signal.Signals, Any] = {}
    received: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        name = signal.Signals(number).name
        stop.asked = stop.asked or name
        timers.append(threading.Timer(within, _too_late, (name, within)))
        timers[0].daemon = True
        timers[0].start()

    try:
        if threading.current_thread() is threading.main_thread():
            previous = {number: signal.signal(number, handle) for number in _SIGNALS}
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for timer in timers:
            timer.cancel()
        stop.close()
    if received and not stop.told:
        signal.raise_signal(received[0])


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise `Stopped` on SIGTERM, so that code around a training run ends as orderly as after Ctrl-C."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        raise Stopped("received SIGTERM; completed work is kept")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _too_late(name: str, within: float) -> None:
    print(
        f"error: the state was not saved within {within:g} s after {name}. Earlier checkpoints are intact; run the "
        "same command to resume from them.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(TRY_AGAIN)
