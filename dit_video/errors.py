"""Errors that a user can act on, and how a script ends on one."""

import _thread
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in what was asked for. The message states the rule, the value and the fix, on one line."""


class MissingError(UserError):
    """A file, folder, run or field that was named does not exist."""


class DecodeError(UserError):
    """Bytes that are not a readable video or image. Ingest sets such a clip aside and goes on."""


def script(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a script's `main`: a `UserError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""

    @functools.wraps(main)
    def guarded(*args, **kwargs):
        try:
            with _insistent_interrupts():
                main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("\ninterrupted: the same command continues where this one stopped", file=sys.stderr)
            sys.stderr.flush()
            sys.exit(130)
        except BrokenPipeError:
            os._exit(141)

    return guarded


@contextmanager
def _insistent_interrupts() -> Iterator[None]:
    """Repeat a Ctrl-C that Python dropped.

    A KeyboardInterrupt that is raised inside a finalizer or a weak reference's callback is printed and forgotten, as
    any exception there is; the script would go on as if nobody had asked it to stop.
    """
    previous = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            _thread.start_new_thread(_interrupt_soon, ())
        else:
            previous(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = previous


def _interrupt_soon() -> None:
    """Once the main thread has left the callback."""
    time.sleep(0.05)
    _thread.interrupt_main()
