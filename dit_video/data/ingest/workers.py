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
from dit_video.data.ingest.formats import Listed
from dit_video.data.ingest.inspection import Inspected, InspectionConfig

MODULE = "dit_video.data.ingest.worker"
_STARTING = 300.0
"""Seconds within which a process must finish its imports, on the slowest disk."""
_MEGABYTE, _GIGABYTE = 1 << 20, 1 << 30

Task = tuple[int, Listed]


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def worth(clips: Sequence[Task], most: int) -> int:
    """Return how many processes, up to `max_count`, are worth their start of one second: one per megabyte of clips."""
    return min(most, len(clips), 1 + sum(clip.size for _, clip in clips) // _MEGABYTE)


def limit_of(clip: Listed, time_limit: float | int) -> float:
    """Return the seconds that a clip may take: `time_limit`, plus ten times as much per gigabyte."""
    return time_limit * (1 + 10 * clip.size / _GIGABYTE)


_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS)
"""Signals by which a crashing decoder ends its process. Other signals come from outside, such as SIGKILL when the
machine is out of memory."""


class _Lost(Exception):
    """A lost process, with the reason and whether that is transient."""

    def __init__(self, reason: str, *, passing: bool = True):
        super().__init__(reason)
        self.passing = passing


class _Process:
    def __init__(self, config: InspectionConfig):
        # Import the same modules as this process, but nothing from the current folder (hence -P and no empty path).
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self.answers = self.process.stdin, self.process.stdout
        self._buffer = b""
        self.task: Task | None = None
        self.ready = False
        self.limit = _STARTING
        self.deadline = time.monotonic() + _STARTING
        self._send(config_json.to_json(config))

    def give(self, task: Task, time_limit: float | int) -> None:
        self.task, self.limit = task, limit_of(task[1], time_limit)
        self.deadline = time.monotonic() + self.limit
        self._send(list(task[1]))

    def _send(self, value: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # a process that ended is detected in `read_answer`
            self._requests.write(json.dumps(value).encode() + b"\n")
            self._requests.flush()

    def read(self) -> dict | None:
        """Return the process's answer, or None while it is incomplete.

        Raises:
          _WorkerLostError: the process has ended.
        """
        chunk = os.read(self.answers.fileno(), 1 << 20)
        if not chunk:
            code = self.process.wait()
            ending = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            raise _Lost(ending, passing=code < 0 and -code not in _CRASHES)
        self._buffer += chunk
        if not chunk.endswith(b"\n"):
            return None
        answer, self._buffer = json.loads(self._buffer), b""
        self.deadline = math.inf
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.answers.close()
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()


class Workers:
    """A pool of processes that inspect clips; a context manager. Processes start with the first clip.

    Args:
      count: number of processes.
      config: configuration of the inspection.
      time_limit: seconds for a clip, see `compute_time_limit`; a process that takes longer is assumed to hang.
    """

    def __init__(self, count: int, config: InspectionConfig, time_limit: float | int):
        self._count, self._config, self._time_limit = count, config, time_limit
        self._processes: list[_Process] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._selector.close()

    def inspect(self, clips: Iterable[Task]) -> Iterator[tuple[int, Inspected]]:
        """Yield (number, verdict) of numbered clips as they complete; a lost process is always a transient reason.

        Raises:
          UserError: the screening cannot work for any clip, or a process cannot be started.
        """
        for (number, _), answer in self._ask(deque(clips), self._count):
            yield number, Inspected(str(answer), passing=True) if isinstance(answer, _Lost) else answer

    def inspect_again(self, clips: Iterable[Task]) -> Iterator[tuple[int, Inspected]]:
        """Yield (number, verdict) of clips that failed for a transient reason, inspected one by one in new processes.

        Raises:
          UserError: see `inspect`.
        """
        for task in clips:
            self._stop()
            ((_, answer),) = self._ask(deque([task]), 1)
            if isinstance(answer, _Lost):
                fix = "" if answer.passing else "; remove it or replace it"
                answer = Inspected(f"{answer}, also when tried again alone{fix}", passing=answer.passing)
            elif answer.passing:
                answer = answer._replace(reason=f"{answer.reason}, also when tried again alone")
            yield task[0], answer

    def _ask(self, tasks: deque[Task], count: int) -> Iterator[tuple[Task, Inspected | _Lost]]:
        """Yield the tasks with their answers or losses."""
        while True:
            for process in self._processes:
                if tasks and process.ready and process.task is None:
                    process.give(tasks.popleft(), self._time_limit)
            # Processes are started for waiting tasks alone: those that still import modules will take one each.
            starting = sum(not process.ready for process in self._processes)
            while len(self._processes) < count and starting < len(tasks):
                self._start()
                starting += 1
            if not tasks and all(process.task is None for process in self._processes):
                return
            yield from self._wait()

    def _wait(self) -> Iterator[tuple[Task, Inspected | _Lost]]:
        timeout = min(process.deadline for process in self._processes) - time.monotonic()
        events = self._selector.select(None if math.isinf(timeout) else max(timeout, 0))
        for key, _ in events:
            yield from self._hear(key.data)
        for process in [*self._processes]:
            if time.monotonic() > process.deadline:
                yield from self._lose(process, _Lost(f"takes more than {process.limit:g} s to decode"))

    def _hear(self, process: _Process) -> Iterator[tuple[Task, Inspected | _Lost]]:
        try:
            answer = process.read()
        except _Lost as lost:
            reason = f"ends the process that decodes it ({lost})"
            yield from self._lose(process, _Lost(reason, passing=lost.passing))
            return
        if answer is None:
            return
        if "error" in answer:
            raise UserError(answer["error"])
        if not process.ready:
            process.ready = True
            return
        assert process.task is not None
        task, process.task = process.task, None
        yield task, Inspected.from_json(answer["inspected"])

    def _lose(self, process: _Process, lost: _Lost) -> Iterator[tuple[Task, _Lost]]:
        self._end(process)
        if not process.ready:
            raise UserError(f"a process that inspects clips could not start ({lost}); see its message above")
        if process.task is not None:
            yield process.task, lost

    def _start(self) -> None:
        try:
            process = _Process(self._config)
        except OSError as error:  # the system's limits, on processes, memory or open files
            running = len(self._processes)
            fix = f"use --workers {running}" if running else "end other programs"
            raise UserError(
                f"process {running + 1} of {self._count} for inspecting clips could not be started "
                f"({error.strerror or error}); {fix}, or raise the limits that `ulimit -a` shows"
            ) from error
        self._processes.append(process)
        self._selector.register(process.answers, selectors.EVENT_READ, process)

    def _stop(self) -> None:
        for process in [*self._processes]:
            self._end(process)

    def _end(self, process: _Process) -> None:
        self._processes.remove(process)
        self._selector.unregister(process.answers)
        process.end()
