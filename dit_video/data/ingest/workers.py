"""Worker processes that inspect clips, any of which may be lost at any time.

A process inspects one clip at a time, so that a lost process (killed by the system, crashed in a decoder, hanging)
identifies its clip. (`concurrent.futures` breaks the whole pool instead, and does not say which task is the cause.)
The caller inspects that clip once more after all others, alone: if the decoder crashes again, the clip is the cause.

The processes are started by `python -m` instead of `multiprocessing`, which would run the caller's script again in
each process, and requires a guard there.
"""

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.data.ingest.formats import ListedClip
from dit_video.data.ingest.inspection import Inspection, InspectionConfig, make_failure

MODULE = "dit_video.data.ingest.worker"
_START_TIMEOUT = 300.0
"""Seconds within which a process must finish its imports, on the slowest disk."""
_MEGABYTE, _GIGABYTE = 1 << 20, 1 << 30

Task = tuple[int, ListedClip]


def count_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def count_useful_processes(clips: Sequence[Task], max_count: int) -> int:
    """Return how many processes, up to `max_count`, are worth their start, half a second: one per megabyte of clips."""
    return min(max_count, len(clips), 1 + sum(clip.size for _, clip in clips) // _MEGABYTE)


def compute_time_limit(clip: ListedClip, time_limit: float | int) -> float:
    """Return the seconds that a clip may take: `time_limit`, plus ten times as much per gigabyte."""
    return time_limit * (1 + 10 * clip.size / _GIGABYTE)


_CRASH_SIGNALS = [signal.Signals[f"SIG{name}"] for name in ("SEGV", "BUS", "ABRT", "FPE", "ILL", "TRAP", "SYS")]
"""Signals by which a crashing decoder ends its process. Other signals come from outside, such as SIGKILL when the
machine is out of memory."""


class _WorkerLostError(Exception):
    """A lost process, with the reason and whether that is transient."""

    def __init__(self, reason: str, *, transient: bool = True):
        super().__init__(reason)
        self.transient = transient


class _WorkerProcess:
    def __init__(self, config: InspectionConfig):
        # Import the same modules as this process, but nothing from the current folder (hence -P and no empty path).
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-P", "-m", MODULE]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self.answer_pipe = self.process.stdin, self.process.stdout
        self._buffer = b""
        self.task: Task | None = None
        self.ready = False
        self.limit = _START_TIMEOUT
        self.deadline = time.monotonic() + _START_TIMEOUT
        self._send(config_json.to_json(config))

    def assign(self, task: Task, time_limit: float | int) -> None:
        self.task, self.limit = task, compute_time_limit(task[1], time_limit)
        self.deadline = time.monotonic() + self.limit
        self._send(list(task[1]))

    def _send(self, value: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # a process that ended is detected in `read_answer`
            self._requests.write(json.dumps(value).encode() + b"\n")
            self._requests.flush()

    def read_answer(self) -> dict | None:
        """Return the process's answer, or None while it is incomplete.

        Raises:
          _WorkerLostError: the process has ended.
        """
        chunk = os.read(self.answer_pipe.fileno(), 1 << 20)
        if not chunk:
            code = self.process.wait()
            ending = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            raise _WorkerLostError(ending, transient=code < 0 and -code not in _CRASH_SIGNALS)
        self._buffer += chunk
        if not chunk.endswith(b"\n"):
            return None
        answer, self._buffer = json.loads(self._buffer), b""
        self.deadline = math.inf
        return answer

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.answer_pipe.close()
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()


class Workers(contextlib.AbstractContextManager["Workers"]):
    """A pool of processes that inspect clips; a context manager. Processes start with the first clip.

    Args:
      count: number of processes.
      config: configuration of the inspection.
      time_limit: seconds for a clip, see `compute_time_limit`; a process that takes longer is assumed to hang.
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
          UserError: the screening cannot work for any clip, or a process cannot be started.
        """
        for (number, clip), answer in self._run_tasks(deque(clips), self._count):
            if isinstance(answer, _WorkerLostError):
                answer = make_failure(clip, str(answer), transient=True)
            yield number, answer

    def inspect_again(self, clips: Iterable[Task]) -> Iterator[tuple[int, Inspection]]:
        """Yield (number, verdict) of clips that failed for a transient reason, inspected one by one in new processes.

        Raises:
          UserError: see `inspect`.
        """
        for task in clips:
            self._stop()
            ((_, answer),) = self._run_tasks(deque([task]), 1)
            if isinstance(answer, _WorkerLostError):
                fix = "" if answer.transient else "; remove it or replace it"
                reason = f"{answer}, also when tried again alone{fix}"
                answer = make_failure(task[1], reason, transient=answer.transient)
            elif answer.transient:
                reason = f"{answer.reason}, also when tried again alone"
                answer = make_failure(task[1], reason, transient=True, sha256=answer.sha256)
            yield task[0], answer

    def _run_tasks(self, tasks: deque[Task], count: int) -> Iterator[tuple[Task, Inspection | _WorkerLostError]]:
        """Yield the tasks with their answers or losses."""
        while True:
            for process in self._processes:
                if tasks and process.ready and process.task is None:
                    process.assign(tasks.popleft(), self._time_limit)
            # Processes are started for waiting tasks alone: those that still import modules will take one each.
            starting = sum(not process.ready for process in self._processes)
            while len(self._processes) < count and starting < len(tasks):
                self._start()
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

    def _start(self) -> None:
        try:
            process = _WorkerProcess(self._config)
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
