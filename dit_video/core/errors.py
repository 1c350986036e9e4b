"""Errors that a user can act on, and how a script ends on one."""

import _thread
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

TRY_AGAIN = 75
"""The exit code of a run that was ended from outside and loses nothing by another start (`sysexits.h`: EX_TEMPFAIL)."""


class UserError(Exception):
    """A mistake in what was asked for. The message states the rule, the value and the fix, on one line.

    (Not a ValueError: libraries that catch those, such as tyro, would print it in a frame of their own.)
    """


class MissingError(UserError):
    """A file, folder, run or field that was named does not exist."""


class DecodeError(UserError):
    """Bytes that are not a readable video or image. Ingest sets such a clip aside and goes on."""


class Stopped(KeyboardInterrupt):
    """A signal asked a run to stop, and it has, with nothing lost. The message says what was stopped, and where."""

    code = 0
    """what a script ends with then"""


def script(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a script's `main`: errors that a user can act on become one line on stderr.

    Exit codes: 2 after a `UserError`; 0 after a `Stopped`, for a preempted run did all that it could; 130 after Ctrl-C
    anywhere else.
    """

    @functools.wraps(main)
    def guarded(*args, **kwargs):
        try:
            with _insistent_interrupts():
                main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except Stopped as stopped:
            print(f"\nstopped: {stopped}; the same command goes on from there", file=sys.stderr)
            sys.stderr.flush()
            sys.exit(stopped.code)
        except KeyboardInterrupt:
            print("\ninterrupted: started again, the same command does what is left", file=sys.stderr)
            sys.stderr.flush()
            sys.exit(130)
        except BrokenPipeError:
            os._exit(141)

    return guarded


_interrupted = threading.Event()


def stop_if_interrupted() -> None:
    """Raise the KeyboardInterrupt of a script's Ctrl-C again, where what ran meanwhile has dropped it.

    Long work calls this now and then (`Progress.update` does).
    """
    if _interrupted.is_set():
        raise KeyboardInterrupt


@contextmanager
def _insistent_interrupts() -> Iterator[None]:
    """Make a Ctrl-C last.

    A KeyboardInterrupt is raised wherever the main thread happens to be: in a finalizer or a weak reference's callback
    Python itself prints and forgets it, and compiled code that calls back may drop it too. The script would go on as if
    nobody had asked it to stop. So it is noted for `stop_if_interrupted`, and out of finalizers it is sent again.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return

    def note(_signal: int, _frame: FrameType | None) -> None:
        _interrupted.set()
        raise KeyboardInterrupt

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is not None and issubclass(unraisable.exc_type, KeyboardInterrupt):
            _thread.start_new_thread(_interrupt_soon, ())
        else:
            hook_before(unraisable)

    hook_before, handler_before = sys.unraisablehook, signal.getsignal(signal.SIGINT)
    sys.unraisablehook = hook
    if handler_before is signal.default_int_handler:  # else somebody wants it ignored, or handled otherwise
        signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        sys.unraisablehook = hook_before
        if handler_before is signal.default_int_handler:
            signal.signal(signal.SIGINT, handler_before)
        _interrupted.clear()


def _interrupt_soon() -> None:
    """Once the main thread has left the callback."""
    time.sleep(0.05)
    _thread.interrupt_main()
