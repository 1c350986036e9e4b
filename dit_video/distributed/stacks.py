"""Dumps of the stacks of all threads, and an end of the process that does not need Python."""

import contextlib
import ctypes
import faulthandler
import io
import sys
import time

from dit_video.core.errors import EXIT_TRY_AGAIN

_DUMP_SECONDS = 5.0
"""Time to write the stacks before the process ends."""


def dump_stacks() -> None:
    """Write the stacks of all threads to stderr, of threads in compiled code as far as Python sees them."""
    sys.stderr.flush()
    faulthandler.dump_traceback(_get_stderr_descriptor(), all_threads=True)


class ExitTimer:
    """A timer that dumps the stacks and ends the process, also if no Python code can run.

    Compiled code that hangs with Python's global lock stops all Python threads. faulthandler's timer is a thread
    without Python, but ends a process with code 1. So a timer of the C library calls `_exit` with the code that asks
    for another start; where there is none, as on macOS, the code is 1.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._timer = ctypes.c_void_p()
        event = _TimerEvent(value=EXIT_TRY_AGAIN, notify=_SIGEV_THREAD)
        self._has_timer, self._is_running = False, False
        if sys.platform == "linux" and hasattr(self._library, "timer_create"):
            event.function = ctypes.cast(self._library._exit, ctypes.c_void_p)
            arguments = (time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer))
            self._has_timer = self._library.timer_create(*arguments) == 0

    def restart(self, seconds: float) -> None:
        """End the process after `seconds`, unless the timer is restarted or cancelled before."""
        faulthandler.dump_traceback_later(seconds, exit=not self._has_timer, file=_get_stderr_descriptor())
        self._set_timer(seconds + _DUMP_SECONDS)
        self._is_running = True

    def cancel(self) -> None:
        """Stop the timer."""
        if self._is_running:  # Otherwise faulthandler's timer may be that of somebody else.
            faulthandler.cancel_dump_traceback_later()
            self._set_timer(0)
            self._is_running = False

    def close(self) -> None:
        """Stop and free the timer."""
        self.cancel()
        if self._has_timer:
            self._library.timer_delete(self._timer)
            self._has_timer = False

    def _set_timer(self, seconds: float) -> None:
        if self._has_timer:
            whole = int(seconds)
            times = (ctypes.c_long * 4)(0, 0, whole, int((seconds - whole) * 1e9))
            self._library.timer_settime(self._timer, 0, ctypes.byref(times), None)


_SIGEV_THREAD = 2


class _TimerEvent(ctypes.Structure):
    """The C structure `sigevent` of Linux, for a function that is called in a new thread."""

    _fields_ = (
        ("value", ctypes.c_long),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("rest", ctypes.c_byte * 32),
    )


def _get_stderr_descriptor() -> int:
    with contextlib.suppress(AttributeError, io.UnsupportedOperation):
        return sys.stderr.fileno()
    return 2
