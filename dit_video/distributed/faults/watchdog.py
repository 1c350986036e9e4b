"""A small process that ends this one where no Python code can run, as in compiled code that hangs with Python's lock.

No thread of this process can notice that, and a timer cannot do it either: one runs on while the process is suspended
(SIGSTOP, Ctrl-Z, `docker pause`), and would end a healthy one as soon as it goes on. So another process counts the
seconds in which this one is not suspended.

It ends this process without Python. The C library sends a real-time signal to the thread of the watch, as system calls
of other threads would be interrupted, and `faulthandler` prints the stacks. Then a byte completes an
asynchronous read, for which the C library calls `_exit` with the code that asks for another start. All of that needs
Linux; elsewhere such hangs are not noticed.
"""

import contextlib
import ctypes
import faulthandler
import functools
import os
import signal
import subprocess
import sys
import threading

from dit_video.core.errors import EXIT_TRY_AGAIN
from dit_video.distributed.faults.stacks import get_stderr_descriptor


class Watchdog:
    """The process that ends this one, which is started by the first call of `expect_call`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._is_supported = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "tgkill")

    def expect_call(self, seconds: float) -> None:
        """End this process if the thread that calls this does not call it again.

        Args:
          seconds: Time for the next call, in which this process is not suspended; infinity ends the watch.
        """
        if self._process is None and self._is_supported and seconds < float("inf"):
            self._start(seconds)
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError, BlockingIOError):  # Somebody ended or stopped the watchdog.
                self._process.stdin.write(f"{seconds}\n".encode())

    def close(self) -> None:
        """End the watch."""
        if self._process is not None:
            self._process.kill()
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process.wait()
            self._process = None
            faulthandler.unregister(_get_signal())

    def _start(self, seconds: float) -> None:
        exit_pipe = _open_exit_pipe(os.getpid())
        faulthandler.register(_get_signal(), file=get_stderr_descriptor(), all_threads=True)
        numbers = map(str, (os.getpid(), threading.get_native_id(), int(_get_signal()), exit_pipe, seconds))
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, *numbers],
            stdin=subprocess.PIPE,
            bufsize=0,
            pass_fds=(exit_pipe,),
            start_new_session=True,  # Ctrl-C and Ctrl-Z do not reach it.
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)


_PROGRAM = """
import ctypes, os, select, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM sends it to all processes of a job, which may go on for a while.
parent, thread, number, exit_pipe = map(int, sys.argv[1:5])
limit, passed, last = float(sys.argv[5]), 0.0, time.monotonic()
while passed <= limit:
    has_input = bool(select.select([0], [], [], 1.0)[0])
    if has_input:
        lines = os.read(0, 65536).split()
        if not lines:
            sys.exit()
        limit, passed = float(lines[-1]), 0.0
    elif os.getppid() != parent:
        sys.exit()
    else:
        try:
            with open(f"/proc/{parent}/stat") as file:
                state = file.read().rpartition(")")[2].split()[0]
        except OSError:  # It has just ended.
            sys.exit()
        if state not in "Tt":
            passed += min(time.monotonic() - last, 2.0)  # This process may have been suspended, too.
    last = time.monotonic()
print(
    f"error: this process hangs: no Python code could run in it for {passed:.0f} s. Its stacks follow. Checkpoints are "
    "complete: start it again to continue from the newest one.", file=sys.stderr, flush=True
)
ctypes.CDLL(None).tgkill(parent, thread, number)
time.sleep(1)
os.write(exit_pipe, b"x")
"""


def _get_signal() -> int:
    return signal.SIGRTMAX - 3


@functools.cache
def _open_exit_pipe(process_id: int) -> int:
    """Return a file descriptor; a byte that is written to it ends this process, also if no Python code can run.

    It is opened once for a process. A process that was forked has another one.
    """
    library = ctypes.CDLL(None)
    reader, writer = os.pipe()
    buffer = ctypes.create_string_buffer(1)
    event = _Event(value=EXIT_TRY_AGAIN, notify=_SIGEV_THREAD)
    event.function = ctypes.cast(library._exit, ctypes.c_void_p)
    request = _ReadRequest(descriptor=reader, buffer=ctypes.addressof(buffer), size=1, event=event)
    if library.aio_read(ctypes.byref(request)) != 0:
        raise OSError("aio_read failed")
    _requests.extend((buffer, request))
    return writer


_requests: list[object] = []
"""Objects to which the C library may write until the process ends."""
_SIGEV_THREAD = 2


class _Event(ctypes.Structure):
    """The C structure `sigevent` of Linux, for a function that is called in a new thread."""

    _fields_ = (
        ("value", ctypes.c_long),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("rest", ctypes.c_byte * 32),
    )


class _ReadRequest(ctypes.Structure):
    """The C structure `aiocb`, with more room than the C libraries of Linux need behind the fields that are set."""

    _fields_ = (
        ("descriptor", ctypes.c_int),
        ("operation", ctypes.c_int),
        ("priority", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("event", _Event),
        ("rest", ctypes.c_byte * 128),
    )
