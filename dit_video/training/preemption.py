"""How a signal ends a training: after a step that is saved, in all processes the same one, and in time.

SIGTERM (preemption) and SIGINT (Ctrl-C) stop the loop after the step that runs; a second signal ends the process at
once. With several processes any of them may get the signal. A thread in each asks a few times a second whether one did;
then each says which step it is bound to reach, and the largest of these is the last for all: nobody is beyond it, and
nobody waits for a device meanwhile.
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
"""seconds between two looks at whether another process was asked to stop"""
_AGREEMENT = 60.0
"""seconds to wait for the other processes' answers, which their threads give at once"""
_END = 3600.0
"""Seconds in which all processes end a run that all have saved; `distributed.peers` finds those that never do."""
_numbers = itertools.count()


class Stop:
    """Whether a signal asked the run to stop, and whether that holds now."""

    def __init__(self) -> None:
        self.asked = ""
        """the signal's name"""
        self.told = False
        """whether `ended` said so: a signal that came too late for it is not forgotten"""

    def now(self) -> bool:
        """Whether no further step is to be taken."""
        return bool(self.asked)

    def passed(self, done: int) -> None:
        """So many steps are done, and another one begins unless `now` says no."""

    def ended(self) -> bool:
        """Whether a signal ended the run, or came in its last step: then what follows the run isn't begun either."""
        self.told = bool(self.asked)
        return self.told

    def close(self) -> None:
        """The run is over."""


class StopTogether(Stop):
    """The same for several processes. All make one for each of their runs, in the same order."""

    def __init__(self, done: int) -> None:
        """
        Args:
          done: how many steps are done at the start.
        """
        super().__init__()
        self._store = Store(f"stop/{next(_numbers)}")
        self._bound = done + 1
        """a step that this process takes in any case"""
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
        with self._lock:  # which is held while the processes agree
            if self._last is None:
                self._bound = done + 1
            else:
                self._holds = done >= self._last

    def ended(self) -> bool:
        self._store.write(f"end/{jax.process_index()}", self.asked)
        found = self._store.wait_for({f"end/{index}" for index in range(jax.process_count())}, _END)
        ends = {name: text for name, text in found.items() if name.startswith("end/") and text}
        self.asked = self.asked or next(iter(ends.values()), "")
        self.told = bool(ends)
        return self.told

    def close(self) -> None:
        self._closed.set()
        self._thread.join(_AGREEMENT)
        with contextlib.suppress(Exception):  # another one may still ask; and the first process may be gone already
            self._answer()

    def _listen(self) -> None:
        me, said = jax.process_index(), False
        while not self._closed.wait(_POLL):
            try:
                if self.asked and not said:
                    self._store.write(f"asked/{me}", self.asked)
                    said = True
                found = self._store.read()
                if asked := sorted(name for name in found if name.startswith("asked/")):
                    self.asked = self.asked or f"{found[asked[0]]} in process {asked[0].removeprefix('asked/')}"
                    self._agree()
                    return
            except Exception:  # no store any more: the process that keeps it is gone, and this one will not go far
                return

    def _answer(self) -> None:
        self._store.write(f"bound/{jax.process_index()}", str(self._bound))

    def _agree(self) -> None:
        with self._lock:
            self._answer()
            names = {f"bound/{index}" for index in range(jax.process_count())}
            found = self._store.wait_for(names, _AGREEMENT)
            self._last = max(int(found[name]) for name in names)


@contextlib.contextmanager
def signals(done: int, *, within: float) -> Iterator[Stop]:
    """Note the first SIGINT or SIGTERM, raise KeyboardInterrupt on the second; previous handlers come back.

    Python only takes handlers in the main thread; in another one signals are the caller's.

    Args:
      done: how many steps are done at the start.
      within: seconds after the first signal in which the block has to end, else the process does, with exit code
        `TRY_AGAIN`: where a step or a disk hangs, the machine is not waited for until somebody takes it away.
    """
    stop = Stop() if jax.process_count() == 1 else StopTogether(done)
    limit: list[threading.Timer] = []
    previous: dict[signal.Signals, Any] = {}
    came: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        name = signal.Signals(number).name
        stop.asked = stop.asked or name
        limit.append(threading.Timer(within, _too_late, (name, within)))
        limit[0].daemon = True
        limit[0].start()

    try:
        if threading.current_thread() is threading.main_thread():
            previous = {number: signal.signal(number, note) for number in _SIGNALS}
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for timer in limit:
            timer.cancel()
        stop.close()
    if came and not stop.told:
        signal.raise_signal(came[0])


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end what lies around a training as orderly as Ctrl-C does, with a `Stopped`."""

    def note(_number: int, _frame: FrameType | None) -> None:
        raise Stopped("SIGTERM came; what was finished before is kept")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _too_late(name: str, within: float) -> None:
    print(
        f"error: the state was not saved within {within:g} s after {name}; what was saved before is whole, and the "
        "same command goes on from there",
        file=sys.stderr,
        flush=True,
    )
    os._exit(TRY_AGAIN)
