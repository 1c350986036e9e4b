"""Graceful end of a training run after a signal: after the same saved step in all processes, and in time.

SIGTERM (preemption) and SIGINT (Ctrl-C) stop the loop after the current step; one that is repeated ends the process
immediately. In a run of several processes any of them may receive the signal. It publishes the request, which a thread
in each process polls for. Then each process tells the step that it will reach in any case, and process 0 publishes the
largest of these as the last step of all: no process is beyond it, and none has to wait for a device to agree.

The machine says by DIT_VIDEO_PREEMPTION_GRACE how many seconds it leaves a process after the signal. A process that has
not ended by then, in the time of `preemption_grace` or of this variable, exits with its earlier checkpoints intact.
"""

import contextlib
import functools
import itertools
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

import jax

from dit_video.core.errors import EXIT_TRY_AGAIN, GracefulStop, UserError
from dit_video.distributed.faults.stacks import dump_stacks, exit_now
from dit_video.distributed.faults.store import AbortedWaitError, KeyValueStore

GRACE_VARIABLE = "DIT_VIDEO_PREEMPTION_GRACE"
"""Environment variable with the seconds between SIGTERM and the end of the process, which launch files set."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_POLL_SECONDS = 0.25
"""Seconds between two polls for a signal in another process, in a small group."""
_JOIN_SECONDS = 10.0
"""Time to wait for the thread at the end of a run; it ends with the process if a call of it hangs."""
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
    """A stop request shared by several processes, which all create one for each of their runs, in the same order.

    Calls to other processes may fail for a while: they are repeated until the end of the run, and an agreement that
    comes late is obeyed like any other.
    """

    def __init__(
        self,
        steps_done: int,
        *,
        on_request: Callable[[], None] = lambda: None,
        store: KeyValueStore | None = None,
    ) -> None:
        """Start the polling thread.

        Args:
          steps_done: Number of steps done at the start.
          on_request: Function that is called once this process knows of the signal.
          store: Store of the processes that stop together; None for a new one of all processes of this run.
        """
        super().__init__()
        self._on_request = on_request
        self._store = store or KeyValueStore(f"stop/{next(_run_numbers)}")
        self._poll_seconds = self._store.group.get_interval(_POLL_SECONDS)
        self._committed_step = steps_done + 1
        """Step that this process reaches in any case."""
        self._last_step: int | None = None
        self._is_stopping = False
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._stop_together, name="stop together", daemon=True)
        self._thread.start()

    def should_stop(self) -> bool:
        return self._is_stopping

    def record_step(self, steps_done: int) -> None:
        with self._lock:  # blocks while the processes agree, so that the published step stays true
            if self._last_step is None:
                self._committed_step = steps_done + 1
            else:
                self._is_stopping = steps_done >= self._last_step

    def acknowledge(self) -> bool:
        combine = functools.partial(max, key=bool)  # the first name that is not empty
        signal_name = self._store.meet("end", self.signal_name, combine=combine)
        self.signal_name = self.signal_name or signal_name
        self.acknowledged = bool(signal_name)
        return self.acknowledged

    def close(self) -> None:
        self._closed.set()
        self._thread.join(_JOIN_SECONDS)
        # Others may still wait for this one's step. The first process, which keeps the store, may be gone.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._store.join_meeting("last_step", str(self._committed_step))

    def _stop_together(self) -> None:
        with contextlib.suppress(AbortedWaitError):
            self._repeat(self._wait_for_request)
            self._on_request()
            with self._lock:
                self._repeat(self._agree_on_last_step)

    def _repeat(self, attempt: Callable[[], bool]) -> None:
        """Attempt something until it succeeds or the run ends."""
        while True:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # The heartbeat ends the process if it must.
                if attempt():
                    return
            if self._closed.wait(self._poll_seconds):
                raise AbortedWaitError

    def _wait_for_request(self) -> bool:
        if self.signal_name:
            self._store.write("request", f"{self.signal_name} in process {self._store.group.process_id}")
            return True
        request = self._store.try_read("request")
        if request is None:
            return False
        self.signal_name = self.signal_name or request  # A signal may have come meanwhile.
        return True

    def _agree_on_last_step(self) -> bool:
        step = self._store.meet(
            "last_step", str(self._committed_step), combine=lambda steps: str(max(map(int, steps))), abort=self._closed
        )
        self._last_step = int(step)
        return True


@contextlib.contextmanager
def handle_signals(steps_done: int, *, grace: float) -> Iterator[StopRequest]:
    """Record SIGINT and SIGTERM, and raise KeyboardInterrupt if one is repeated; restore the handlers at the end.

    Ctrl-C reaches all processes of a terminal, and a launcher among them may send SIGTERM to the others. Python allows
    handlers in the main thread only; in other threads signals are left to the caller.

    Args:
      steps_done: Number of steps done at the start.
      grace: Seconds after the first signal, to any process of the run, within which the block has to end. Otherwise,
        such as if a step or a disk hangs, the process exits with code 75. A shorter time of the machine
        (`GRACE_VARIABLE`) comes first.

    Raises:
      UserError: If the time of the machine is not a number of at least one second.
    """
    grace = min(grace, get_machine_grace())
    received: list[int] = []
    timer = threading.Timer(grace, lambda: _exit_after_grace(stop.signal_name, grace))
    timer.daemon = True

    def start_timer() -> None:
        with contextlib.suppress(RuntimeError):  # It is started already.
            timer.start()

    def handle(number: int, _frame: FrameType | None) -> None:
        if number in received:
            raise KeyboardInterrupt
        received.append(number)
        stop.signal_name = stop.signal_name or signal.Signals(number).name
        start_timer()

    stop: StopRequest
    stop = StopRequest() if jax.process_count() == 1 else SharedStopRequest(steps_done, on_request=start_timer)
    try:
        with _install_handler(handle, *_SIGNALS):
            yield stop
    finally:
        timer.cancel()
        stop.close()
    if received and not stop.acknowledged:
        signal.raise_signal(received[0])


def get_machine_grace(environment: Mapping[str, str] = os.environ) -> float:
    """Return the seconds that the machine leaves a process after a signal; infinity if it does not say.

    Raises:
      UserError: If the variable is not a number of at least one second.
    """
    text = environment.get(GRACE_VARIABLE, "")
    if not text:
        return math.inf
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 1:
        rule = "it must be a number of seconds, at least 1."
        raise UserError(f"{GRACE_VARIABLE}={text} is invalid: {rule} Use {GRACE_VARIABLE}=100.")
    return seconds


@contextlib.contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Raise `GracefulStop` on SIGTERM, so that code around a training run ends as orderly as after Ctrl-C.

    Raises:
      UserError: If the machine's time after a signal is invalid, which no training should find at its first step.
    """
    get_machine_grace()

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
    dump_stacks()
    exit_now(EXIT_TRY_AGAIN)
