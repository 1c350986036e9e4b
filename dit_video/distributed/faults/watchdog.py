"""A small process that ends this one where no Python code can run, as in a read that hangs with Python's lock.

No thread of this process can notice that, and no timer can end it, such as `faulthandler.dump_traceback_later`: a timer
runs on while the process is suspended (SIGSTOP, Ctrl-Z, `docker pause`), and would end a healthy one as soon as it goes
on. So another process counts the seconds in which this one is not suspended. It lets `faulthandler` print the stacks,
which needs no Python code, and kills this process. It reads states of processes as Linux tells them; elsewhere such
hangs are not noticed.
"""

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys

from dit_video.distributed.faults.stacks import get_stderr_descriptor


class Watchdog:
    """The process that ends this one, which is started by the first call of `expect_call`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def expect_call(self, seconds: float) -> None:
        """End this process if this is not called again.

        Args:
          seconds: Time for the next call, in which this process is not suspended; infinity ends the watch.
        """
        if self._process is None and sys.platform == "linux" and seconds < float("inf"):
            self._process = self._start()
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

    @staticmethod
    def _start() -> subprocess.Popen:
        faulthandler.register(_get_signal(), file=get_stderr_descriptor(), all_threads=True)
        command = [sys.executable, "-I", "-S", "-c", _PROGRAM, str(os.getpid()), str(int(_get_signal()))]
        # In its own session, so that Ctrl-C and Ctrl-Z do not reach it.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, start_new_session=True)
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        return process


_PROGRAM = """
import os, select, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM sends it to all processes of a job, which may go on for a while.
parent, number = map(int, sys.argv[1:])
limit, passed, last = float("inf"), 0.0, time.monotonic()
while passed <= limit:
    if select.select([0], [], [], 1.0)[0]:
        lines = os.read(0, 65536).split()
        if not lines:
            sys.exit()
        limit, passed = float(lines[-1]), 0.0
    elif os.getppid() != parent:
        sys.exit()
    else:
        with open(f"/proc/{parent}/stat") as file:
            state = file.read().rpartition(")")[2].split()[0]
        if state not in "Tt":
            passed += min(time.monotonic() - last, 2.0)  # This process may have been suspended, too.
    last = time.monotonic()
print(
    f"error: this process hangs: no Python code could run in it for {passed:.0f} s. Its stacks follow. Checkpoints are "
    "complete: start it again to continue from the newest one.", file=sys.stderr, flush=True
)
os.kill(parent, number)
time.sleep(1)
os.kill(parent, signal.SIGKILL)
"""


def _get_signal() -> int:
    return signal.SIGRTMAX - 3
