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
from collections.abc import Callable, Iterator
from types import FrameType

import jax

from dit_video.core.errors import EXIT_TRY_AGAIN, GracefulStop
from dit_video.distributed.heartbeat import count_step
from dit_video.distributed.store import KeyValueStore

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_POLL_SECONDS = 0.25
"""Seconds between two polls for a signal in another process."""
_AGREEMENT_TIMEOUT = 60.0
"""Timeout in seconds for the steps of the other processes, whose threads publish them immediately."""
_END_TIMEOUT = 3600.0
"""Timeout in seconds for all processes to end a run that all have saved. Processes that hang are detected by
`distributed.heartbeat`."""
_run_numbers = itertools.count()


class StopRequest:
    """The request of a signal to stop the run."""

    def __init__(self) -> None:
        self.signal_name = ""
        """Name of the signal; empty without one."""
        self.acknowledged = False
        """True once the loop has seen the signal; a later signal is re-raised after the run."""

    def should_stop(self) -> bool:
        """Return True if the loop must not start another step."""
        return bool(self.signal_name)

    def record_step(self, steps_done: int) -> None:
        """Record the number of steps done; the next step begins unless `should_stop`."""

    def acknowledge(self) -> bool:
        """Return True if a signal came before the end of the run, in which case nothing is started after it."""
        self.acknowledged = bool(self.signal_name)
        return self.acknowledged

    def close(self) -> None:
        """Release resources at the end of the run."""


class SharedStopRequest(StopRequest):
    """A stop request shared by several processes, which all create one for each of their runs, in the same order."""

    def __init__(self, steps_done: int) -> None:
        """Start the polling thread; `steps_done` is the number of steps done at the start."""
        super().__init__()
        self._store = KeyValueStore(f"stop/{next(_run_numbers)}")
        self._committed_step = steps_done + 1
        """Step that this process reaches in any case."""
        self._last_step: int | None = None
        self._is_stopping = False
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="stop together", daemon=True)
        self._thread.start()

    def should_stop(self) -> bool:
        return self._is_stopping

    def record_step(self, steps_done: int) -> None:
        count_step()
        with self._lock:  # blocks while the processes agree, so that the published step stays true
            if self._last_step is None:
                self._committed_step = steps_done + 1
            else:
                self._is_stopping = steps_done >= self._last_step

    def acknowledge(self) -> bool:
        self._store.write(f"end/{jax.process_index()}", self.signal_name)
        values = self._store.wait_for({f"end/{index}" for index in range(jax.process_count())}, _END_TIMEOUT)
        signal_names = {name: text for name, text in values.items() if name.startswith("end/") and text}
        self.signal_name = self.signal_name or next(iter(signal_names.values()), "")
        self.acknowledged = bool(signal_names)
        return self.acknowledged

    def close(self) -> None:
        self._closed.set()
        self._thread.join(_AGREEMENT_TIMEOUT)
        # Another process may still wait for this one's step. The first process, which keeps the store, may be gone.
        with contextlib.suppress(Exception):
            self._publish_committed_step()

    def _poll(self) -> None:
        process, is_published = jax.process_index(), False
        while not self._closed.wait(_POLL_SECONDS):
            try:
                if self.signal_name and not is_published:
                    self._store.write(f"asked/{process}", self.signal_name)
                    is_published = True
                values = self._store.read()
                if requests := sorted(name for name in values if name.startswith("asked/")):
                    first = f"{values[requests[0]]} in process {requests[0].removeprefix('asked/')}"
                    self.signal_name = self.signal_name or first
                    self._agree_on_last_step()
                    return
            except Exception:  # the process that keeps the store is gone, so this one cannot go on for long either
                return

    def _publish_committed_step(self) -> None:
        self._store.write(f"bound/{jax.process_index()}", str(self._committed_step))

    def _agree_on_last_step(self) -> None:
        with self._lock:
            self._publish_committed_step()
            names = {f"bound/{index}" for index in range(jax.process_count())}
            values = self._store.wait_for(names, _AGREEMENT_TIMEOUT)
            self._last_step = max(int(values[name]) for name in names)


@contextlib.contextmanager
def handle_signals(steps_done: int, *, grace: float) -> Iterator[StopRequest]:
    """Record the first SIGINT or SIGTERM and raise KeyboardInterrupt on the second; restore the handlers at the end.

    Python allows handlers in the main thread only; in other threads signals are left to the caller.

    Args:
      steps_done: Number of steps done at the start.
      grace: Seconds after the first signal within which the block has to end. Otherwise, such as if a step or a disk
        hangs, the process exits with code `TRY_AGAIN`.
    """
    stop = StopRequest() if jax.process_count() == 1 else SharedStopRequest(steps_done)
    timers: list[threading.Timer] = []
    received: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        name = signal.Signals(number).name
        stop.signal_name = stop.signal_name or name
        timers.append(threading.Timer(grace, _exit_after_grace, (name, grace)))
        timers[0].daemon = True
        timers[0].start()

    try:
        with _install_handler(handle, *_SIGNALS):
            yield stop
    finally:
        for timer in timers:
            timer.cancel()
        stop.close()
    if received and not stop.acknowledged:
        signal.raise_signal(received[0])


@contextlib.contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Raise `Stopped` on SIGTERM, so that code around a training run ends as orderly as after Ctrl-C."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        raise GracefulStop("received SIGTERM; completed work is kept")

    with _install_handler(handle, signal.SIGTERM):
        yield


@contextlib.contextmanager
def _install_handler(handler: Callable[[int, FrameType | None], None], *signals: signal.Signals) -> Iterator[None]:
    """Handle signals by a function while the context lasts, in the main thread; in others, leave them to the caller."""
    is_main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handler) for number in signals if is_main}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)


def _exit_after_grace(name: str, grace: float) -> None:
    advice = "Earlier checkpoints are intact; run the same command to resume from them."
    print(f"error: the state was not saved within {grace:g} s after {name}. {advice}", file=sys.stderr, flush=True)
    os._exit(EXIT_TRY_AGAIN)
