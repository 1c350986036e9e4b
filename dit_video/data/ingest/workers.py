"""Worker processes that inspect clips; any of them may be lost at any time.

A process inspects one clip at a time, so that a lost process (killed by the system, crashed in a decoder, hanging)
identifies its clip. (`concurrent.futures` breaks the whole pool instead, and does not say which task is the cause.)
The caller inspects that clip once more after all others, alone: if the decoder crashes again, the clip is the cause.

The processes are started by `python -m` instead of `multiprocessing`, which would run the caller's script again in
each process, and requires a guard there.

A file may exploit its decoder. So the processes get no environment but what decoding needs, in particular no
credentials, and no network where bubblewrap (`bwrap`) is installed and allowed to. Clips in buckets need both.
"""

import contextlib
import functools
import json
import math
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.storage import is_remote
from dit_video.data.ingest.formats import ListedClip
from dit_video.data.ingest.inspection import Inspection, InspectionConfig, make_failure

MODULE = "dit_video.data.ingest.worker"
_START_TIMEOUT = 300.0
"""Seconds within which a process must finish its imports, on the slowest disk."""
_MEGABYTE, _GIGABYTE = 1 << 20, 1 << 30
_PIXELS_PER_SECOND = 25e6
"""Pixels that are decoded and measured in a second at least, with the default time limit of 120 s."""
_MAX_PIXELS_PER_BYTE = 4000
"""Pixels that a byte of video may stand for: a header may claim any duration."""
_KEPT_VARIABLES = re.compile(
    r"PATH|PYTHON(?!STARTUP|INSPECT).*|VIRTUAL_ENV|LD_LIBRARY_PATH|DYLD_.*|LANG|LANGUAGE|LC_.*|TZ|TMPDIR|TEMP|TMP"
    r"|DIT_VIDEO_.*|COVERAGE_.*"
)
"""Environment variables that a process keeps."""
_SINGLE_THREADED = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")
"""Variables by which threads that are not used take no address space; there is a process a core."""

Task = tuple[int, ListedClip]


def count_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def count_useful_processes(clips: Sequence[Task], max_count: int) -> int:
    """Return how many processes, up to `max_count`, are worth their start, half a second: one per megabyte of clips."""
    return min(max_count, len(clips), 1 + sum(clip.size for _, clip in clips) // _MEGABYTE)


def compute_time_limit(clip: ListedClip, time_limit: float | int, pixels: int = 0) -> float:
    """Return the seconds that a clip may take.

    They are `time_limit`, plus ten times as much per gigabyte, plus a time for the pixels of all its frames: with a
    limit of 120 s, 20 hours for an hour of 4K at 60 frames per second.
    """
    believed = min(pixels, clip.size * _MAX_PIXELS_PER_BYTE)
    return time_limit * (1 + 10 * clip.size / _GIGABYTE + believed / _PIXELS_PER_SECOND / 120)


def make_environment(*, is_trusted: bool) -> dict[str, str]:
    """Return the environment of a process: this process's own, without credentials unless the other is trusted."""
    kept = {name: text for name, text in os.environ.items() if is_trusted or _KEPT_VARIABLES.fullmatch(name)}
    # The same modules as in this process are imported, but nothing from the current folder.
    return {**kept, **_SINGLE_THREADED, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@functools.cache
def find_sandbox() -> tuple[str, ...]:
    """Return the command that starts a program without network; empty where there is none."""
    program = shutil.which("bwrap")
    if program is None:
        return ()
    command = (program, "--dev-bind", "/", "/", "--unshare-net", "--die-with-parent", "--")
    checked = subprocess.run([*command, "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return command if checked.returncode == 0 else ()  # containers forbid it


_CRASH_SIGNALS = [signal.Signals[f"SIG{name}"] for name in ("SEGV", "BUS", "ABRT", "FPE", "ILL", "TRAP", "SYS")]
"""Signals by which a crashing decoder ends its process. Other signals come from outside, such as SIGKILL when the
machine is out of memory."""


class _WorkerLostError(Exception):
    """A lost process, with the reason and whether that is transient."""

    def __init__(self, reason: str, *, transient: bool = True):
        super().__init__(reason)
        self.transient = transient


class _WorkerProcess:
    def __init__(self, config: InspectionConfig, *, memory_factor: int, is_trusted: bool):
        environment = make_environment(is_trusted=is_trusted)
        self._sandbox = () if is_trusted else find_sandbox()
        command = [*self._sandbox, sys.executable, "-P", "-m", MODULE, str(memory_factor)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self.answer_pipe = self.process.stdin, self.process.stdout
        self._buffer = b""
        self.task: Task | None = None
        self.ready = False
        self.is_trusted = is_trusted
        self.limit = _START_TIMEOUT
        self.deadline = time.monotonic() + _START_TIMEOUT
        self._send(config_json.to_json(config))

    def assign(self, task: Task, time_limit: float | int) -> None:
        self.task, self.limit = task, compute_time_limit(task[1], time_limit)
        self._assigned, self._time_limit = time.monotonic(), time_limit
        self.deadline = self._assigned + self.limit
        self._send(list(task[1]))

    def extend_limit(self, pixels: int) -> None:
        """Give more time to a clip of so many pixels in all frames."""
        assert self.task is not None
        self.limit = max(self.limit, compute_time_limit(self.task[1], self._time_limit, pixels))
        self.deadline = self._assigned + self.limit

    def _send(self, value: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # a process that ended is detected in `read_answer`
            self._requests.write(json.dumps(value).encode() + b"\n")
            self._requests.flush()

    def read_answer(self) -> dict | None:
        """Return the process's answer, or None while it is incomplete; a report before it extends the time limit.

        Raises:
          _WorkerLostError: If the process has ended.
        """
        chunk = os.read(self.answer_pipe.fileno(), 1 << 20)
        if not chunk:
            code = self.process.wait()
            code = 128 - code if self._sandbox and code > 128 else code  # as a shell does, it returns 128 + the signal
            ending = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            raise _WorkerLostError(ending, transient=code < 0 and -code not in _CRASH_SIGNALS)
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        for answer in map(json.loads, lines):
            if "pixels" not in answer:
                self.deadline = math.inf
                return answer
            self.extend_limit(answer["pixels"])
        return None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.answer_pipe.close()
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()


class Workers(contextlib.AbstractContextManager["Workers"]):
    """A pool of processes that inspect clips; a context manager. Processes start with the first clip.

    Args:
      count: Number of processes.
      config: Configuration of the inspection.
      time_limit: Seconds for a clip, see `compute_time_limit`; a process that takes longer is assumed to hang.
    """

    def __init__(self, count: int, config: InspectionConfig, time_limit: float | int):
        self._count, self._config, self._time_limit = count, config, time_limit
        self._processes: list[_WorkerProcess] = []
        self._selector = selectors.DefaultSelector()

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._selector.close()

    def inspect(self, clips: Iterable[Task]) -> Iterator[tuple[int, Inspection]]:
        """Yield (number, verdict) of numbered clips as they complete; a lost process is always a transient reason.

        Raises:
          UserError: If the screening cannot work for any clip, or a process cannot be started.
        """
        for (number, clip), answer in self._run_tasks(deque(clips), self._count, memory_factor=1):
            if isinstance(answer, _WorkerLostError):
                answer = make_failure(clip, str(answer), transient=True)
            yield number, answer

    def inspect_again(self, clips: Iterable[Task]) -> Iterator[tuple[int, Inspection]]:
        """Yield (number, verdict) of clips that failed for a transient reason, inspected one by one in new processes.

        A process may take twice the usual memory; what needs more fails for good.

        Raises:
          UserError: As `inspect`.
        """
        for task in clips:
            self._stop()
            ((_, answer),) = self._run_tasks(deque([task]), 1, memory_factor=2)
            if isinstance(answer, _WorkerLostError):
                fix = "" if answer.transient else "; remove it or replace it"
                reason = f"{answer}, also when tried again alone{fix}"
                answer = make_failure(task[1], reason, transient=answer.transient)
            elif answer.transient:
                reason = f"{answer.reason}, also when tried again alone"
                answer = make_failure(task[1], reason, transient=True, sha256=answer.sha256)
            yield task[0], answer

    def _run_tasks(
        self, tasks: deque[Task], count: int, *, memory_factor: int
    ) -> Iterator[tuple[Task, Inspection | _WorkerLostError]]:
        """Yield the tasks with their answers or losses."""
        is_trusted = any(is_remote(clip.path) for _, clip in tasks)
        if any(process.is_trusted != is_trusted for process in self._processes):
            self._stop()
        while True:
            for process in self._processes:
                if tasks and process.ready and process.task is None:
                    process.assign(tasks.popleft(), self._time_limit)
            # Processes are started for waiting tasks alone: those that still import modules will take one each.
            starting = sum(not process.ready for process in self._processes)
            while len(self._processes) < count and starting < len(tasks):
                self._start(memory_factor, is_trusted)
                starting += 1
            if not tasks and all(process.task is None for process in self._processes):
                return
            yield from self._wait()

    def _wait(self) -> Iterator[tuple[Task, Inspection | _WorkerLostError]]:
        timeout = min(process.deadline for process in self._processes) - time.monotonic()
        events = self._selector.select(None if math.isinf(timeout) else max(timeout, 0))
        for key, _ in events:
            yield from self._receive_answer(key.data)
        for process in [*self._processes]:
            if time.monotonic() > process.deadline:
                lost = _WorkerLostError(f"takes more than {process.limit:g} s to decode")
                yield from self._handle_loss(process, lost)

    def _receive_answer(self, process: _WorkerProcess) -> Iterator[tuple[Task, Inspection | _WorkerLostError]]:
        try:
            answer = process.read_answer()
        except _WorkerLostError as lost:
            reason = f"ends the process that decodes it ({lost})"
            yield from self._handle_loss(process, _WorkerLostError(reason, transient=lost.transient))
            return
        if answer is None:
            return
        if "error" in answer:
            raise UserError(answer["error"])
        if process.task is None:  # the first answer, which has no verdict
            process.ready = True
            return
        task, process.task = process.task, None
        yield task, Inspection.from_json(answer["inspected"])

    def _handle_loss(self, process: _WorkerProcess, lost: _WorkerLostError) -> Iterator[tuple[Task, _WorkerLostError]]:
        self._remove(process)
        if not process.ready:
            raise UserError(f"a process that inspects clips could not start ({lost}); see its message above")
        if process.task is not None:
            yield process.task, lost

    def _start(self, memory_factor: int, is_trusted: bool) -> None:
        try:
            process = _WorkerProcess(self._config, memory_factor=memory_factor, is_trusted=is_trusted)
        except OSError as error:  # the system's limits, on processes, memory or open files
            running = len(self._processes)
            fix = f"use --workers {running}" if running else "end other programs"
            raise UserError(
                f"process {running + 1} of {self._count} for inspecting clips could not be started "
                f"({error.strerror or error}); {fix}, or raise the limits that `ulimit -a` shows"
            ) from error
        self._processes.append(process)
        self._selector.register(process.answer_pipe, selectors.EVENT_READ, process)

    def _stop(self) -> None:
        for process in [*self._processes]:
            self._remove(process)

    def _remove(self, process: _WorkerProcess) -> None:
        self._processes.remove(process)
        self._selector.unregister(process.answer_pipe)
        process.kill()
