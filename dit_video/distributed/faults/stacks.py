"""Dumps of the stacks of all threads, and the immediate end of a process."""

import contextlib
import faulthandler
import io
import os
import sys
import threading
from typing import NoReturn

_FLUSH_SECONDS = 5.0
"""Time to write what was printed, such as to a disk that does not answer."""


def get_stderr_descriptor() -> int:
    """Return the file descriptor of `sys.stderr`, or the process's where it is no file."""
    with contextlib.suppress(AttributeError, io.UnsupportedOperation):
        return sys.stderr.fileno()
    return 2


def dump_stacks() -> None:
    """Write the stacks of all threads to stderr, of threads in compiled code as far as Python sees them."""
    sys.stderr.flush()
    faulthandler.dump_traceback(get_stderr_descriptor(), all_threads=True)


def exit_now(code: int) -> NoReturn:
    """End the process with what was printed, but without cleanup, which may hang."""
    thread = threading.Thread(target=_flush_outputs, daemon=True)
    thread.start()
    thread.join(_FLUSH_SECONDS)
    os._exit(code)


def _flush_outputs() -> None:
    for stream in (sys.stderr, sys.stdout):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # There is none, or it is closed.
            stream.flush()
