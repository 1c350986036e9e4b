"""Errors that a user can act on, and the exit codes of scripts."""

import _thread
import contextlib
import errno
import functools
import gc
import math
import numbers
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

EXIT_TRY_AGAIN = 75
"""Exit code of a run that something outside ended and that can restart without loss (`sysexits.h`: EX_TEMPFAIL)."""


class UserError(Exception):
    """A mistake of the user. The message states the rule, the value and the fix, on one line.

    (It is not a ValueError because libraries that catch those, such as tyro, would print it in a frame of their own.)
    """

    code = 2
    """Exit code of the script."""


class MissingError(UserError):
    """A file, folder, run or field that does not exist."""


class TransientError(UserError):
    """A problem that may be gone when the same command runs again, such as storage that does not answer.

    Its exit code makes a cluster start the run again; after the exit code of any other `UserError` the cluster gives
    up.
    """

    code = EXIT_TRY_AGAIN


class DecodeError(UserError):
    """Bytes that are not a readable video or image. Ingest skips such a clip and continues."""


DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the system's errors where there is no room for a file."""


def check_at_least(minimum: float | int, /, **values: float | int | None) -> None:
    """Refuse values below a minimum; None passes.

    Raises:
      UserError: If a value is too small or not a number; the message names the first one.
    """
    for name, value in values.items():
        if value is not None and not value >= minimum:
            raise UserError(f"{name}={value} is invalid: it must be at least {minimum}. Use {name}={minimum} or more.")


def check_whole(**values: object) -> None:
    """Refuse values that are not whole numbers; a NumPy integer is one, `True` and `2.0` are not.

    Raises:
      UserError: If a value is not; the message names the first one.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise UserError(f"{name}={value!r} is invalid: it must be a whole number. Use {name}=1.")


def check_number(**values: object) -> None:
    """Refuse values that are not real numbers; None passes, and a text, `True` or NaN does not.

    Raises:
      UserError: If a value is not; the message names the first one.
    """
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(float(value)):
            raise UserError(f"{name}={value!r} is invalid: it must be a number. Use {name}=1.")


class GracefulStop(KeyboardInterrupt):
    """A run that a signal stopped, with nothing lost. The message says what was stopped, and where."""

    code = 0
    """Exit code of the script."""

    def _render_traceback_(self, *_: object) -> list[str]:
        """Return the lines that IPython shows instead of a traceback, whose end a reader would have to search for."""
        return [f"stopped: {self}; run the cell again to continue"]


class AgreedStop(GracefulStop):
    """A stop that all processes of a run have agreed on, so that none of them waits for the others."""


def script(main: Callable[..., None], *, is_resumable: bool = True) -> Callable[..., None]:
    """Decorate a script's `main` so that errors a user can act on become one line on stderr.

    After a `GracefulStop` or Ctrl-C, the line ends with the command that continues the script, or restarts it if it is
    not resumable.

    Warnings are one line, too, without the place in our source.

    Exit codes: 2 after a `UserError`, or where the disk is full; 75 after a `TransientError`; 0 after a `GracefulStop`,
    because a preempted run did all that it could; 130 after Ctrl-C anywhere else.
    """

    @functools.wraps(main)
    def guarded(*args, **kwargs):
        try:
            with _preserve_interrupts(), _plain_warnings(), _explain_errors():
                main(*args, **kwargs)
        except UserError as error:
            message, code = f"error: {error}", error.code
        except GracefulStop as stopped:
            print(f"\nstopped: {stopped}; the same command continues from there: {get_command()}", file=sys.stderr)
            sys.stderr.flush()
            sys.exit(stopped.code)
        except KeyboardInterrupt:
            effect = "continues with the remaining work" if is_resumable else "starts again"
            print(f"\ninterrupted: the same command {effect}: {get_command()}", file=sys.stderr)
            sys.stderr.flush()
            sys.exit(130)
        except BrokenPipeError:
            os._exit(141)
        else:
            return
        # The exception is free only here. Libraries report futures that end with it, which should not come last.
        gc.collect()
        print(message, file=sys.stderr)
        sys.exit(code)

    return guarded


@contextlib.contextmanager
def _explain_errors() -> Iterator[None]:
    """Convert errors of other libraries that a user can act on: a full disk, and devices that are not there."""
    try:
        yield
    except (UserError, BrokenPipeError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
            fix = "Free disk space, then run the same command again."
            raise UserError(f"{error.filename or 'a file'} cannot be written: {error.strerror}. {fix}") from error
        check_devices()
        raise


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    before = warnings.formatwarning

    def format_warning(message: Warning | str, category: type[Warning], *arguments: Any, **options: Any) -> str:
        is_ours = issubclass(category, UserWarning)
        return f"warning: {message}\n" if is_ours else before(message, category, *arguments, **options)

    warnings.formatwarning = format_warning
    try:
        yield
    finally:
        warnings.formatwarning = before


def check_devices() -> None:
    """Check that the devices that JAX_PLATFORMS asks for are there; without it, or without JAX, there is nothing to do.

    JAX fails with other errors, at the first place that needs a device.

    Raises:
      UserError: If they are not.
    """
    jax = sys.modules.get("jax")
    if jax is None or not os.environ.get("JAX_PLATFORMS"):
        return
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # the latter without a message, if there is no plugin
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        rule = f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} is invalid: there is no such device{reason}"
        fix = "leave it out, or install what the device needs (pip install 'dit-video[gpu]', 'dit-video[tpu]')"
        raise UserError(f"{rule}; {fix}") from error


def get_command() -> str:
    """Return the command that started this script, as a shell takes it."""
    return shlex.join(["python", *sys.argv])


_interrupted = threading.Event()


def raise_if_interrupted() -> None:
    """Raise the KeyboardInterrupt of an earlier Ctrl-C again if other code has swallowed it.

    Long-running work calls this now and then (`Progress.update` does).
    """
    if _interrupted.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def _preserve_interrupts() -> Iterator[None]:
    """Make sure that a Ctrl-C is not lost.

    A KeyboardInterrupt is raised wherever the main thread happens to be. In a finalizer or a weak reference's callback,
    Python prints and forgets it, and compiled code that calls back may drop it too; the script would then continue as
    if nothing had happened. The interrupt is therefore recorded for `raise_if_interrupted`, and sent again if a
    finalizer loses it.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return

    def record_interrupt(_signal: int, _frame: FrameType | None) -> None:
        _interrupted.set()
        raise KeyboardInterrupt

    def resend_interrupt(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is not None and issubclass(unraisable.exc_type, KeyboardInterrupt):
            _thread.start_new_thread(_interrupt_after_callback, ())
        else:
            previous_hook(unraisable)

    previous_hook, previous_handler = sys.unraisablehook, signal.getsignal(signal.SIGINT)
    sys.unraisablehook = resend_interrupt
    if previous_handler is signal.default_int_handler:  # keep a handler that somebody has set on purpose
        signal.signal(signal.SIGINT, record_interrupt)
    try:
        yield
    finally:
        sys.unraisablehook = previous_hook
        if previous_handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, previous_handler)
        _interrupted.clear()


def _interrupt_after_callback() -> None:
    """Interrupt the main thread, once it has left the callback."""
    time.sleep(0.05)
    _thread.interrupt_main()
