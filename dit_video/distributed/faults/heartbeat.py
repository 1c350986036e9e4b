"""Heartbeats between the processes of a run, so that none waits forever for one that is dead or slow.

JAX's own watchdog also ends all processes, but names no host, and takes a hanging process for a healthy one. Here each
process writes a heartbeat with its step count into the run's `KeyValueStore`. Process 0 reads and checks all of them,
and publishes the health of the run (`RunHealth`), which the others read; so its work grows with the number of processes
and not with its square. If a process is silent, behind, hung or ended, all end with exit code 75. When started again,
the run continues from its newest checkpoint. If one has ended by a mistake of the user, all end with its code, 2.

Process 0 holds the store. If it no longer answers, the others see that the health is not updated. When it dies, JAX
ends the others at once, before they can print anything. So each of them has a small watchdog process that sees how it
ends and prints the reason.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax

from dit_video.core import config_json
from dit_video.core.errors import EXIT_TRY_AGAIN, GracefulStop, TransientError, UserError
from dit_video.distributed.faults.hang_watch import end_hanging_process
from dit_video.distributed.faults.health import (
    EXIT,
    GRACE_SECONDS,
    HEARTBEAT,
    TROUBLE,
    HealthChecker,
    Heartbeat,
    ProcessExit,
    RunHealth,
)
from dit_video.distributed.faults.progress import PROGRESS
from dit_video.distributed.faults.stacks import dump_stacks, exit_now
from dit_video.distributed.faults.store import KeyValueStore
from dit_video.distributed.faults.timeouts import TimeoutConfig
from dit_video.distributed.process_group import ProcessGroup

_HEALTH = "health"
_LOST_CONNECTION = re.compile(r"Gloo|\bDEADLINE_EXCEEDED\b|\bUNAVAILABLE\b")
"""Pattern of the messages of JAX's errors where other processes do not answer, or not in time."""


class HeartbeatMonitor:
    """A monitor of the other processes, active as a context."""

    def __init__(self, timeouts: TimeoutConfig, group: ProcessGroup | None = None) -> None:
        """Initialize the monitor.

        Args:
          timeouts: How long other processes are waited for.
          group: Processes that are monitored; None for all of this run.
        """
        self._timeouts = timeouts
        self._has_watchdog = group is None
        self._group = group or ProcessGroup.get_current()
        self._store, self._startup_store = KeyValueStore("peers", self._group), KeyValueStore("start", self._group)
        self._health_store = KeyValueStore("health", self._group)
        self._checker: HealthChecker | None = None
        self._first_name = ""
        """Name of process 0 for messages."""
        self._health, self._answer_time = RunHealth(), time.monotonic()
        self._hang = ""
        self._all_in_trouble, self._all_left = threading.Event(), threading.Event()
        self._finished = threading.Event()
        self._has_failed = False
        """This process ends with an error of its own, which it reports itself."""
        self._end_lock = threading.Lock()
        self._interval = min(self._group.get_interval(1.0, calls=2), timeouts.max_silence / 10)
        self._threads = [
            threading.Thread(target=task, name="watch over processes", daemon=True)
            for task in (self._exchange_heartbeats, self._watch_health)
        ]
        self._watchdog: subprocess.Popen | None = None

    def __enter__(self) -> "HeartbeatMonitor":
        process = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
        self._first_name = self._meet("who", process, self._make_checker)
        if self._has_watchdog and not self._group.is_first:
            self._watchdog = _start_watchdog(self._first_name, self._group.process_id)
        self._restart_times()  # Waiting for the last process to start must not count as silence.
        for thread in self._threads:
            thread.start()
        return self

    def _make_checker(self, processes: list[str]) -> str:
        infos = map(json.loads, processes)
        self._names = [f"process {index} ({info['host']}, pid {info['pid']})" for index, info in enumerate(infos)]
        self._checker = HealthChecker(self._names, self._timeouts)
        return self._names[0]

    @property
    def is_other_busy(self) -> bool:
        """True if a process was in a phase at the last interval, so that the others may wait for it."""
        return self._health.is_busy

    @property
    def num_changes(self) -> int:
        """Number of signs of progress of all processes, at the last interval."""
        return self._health.changes

    def compare(self, settings: dict[str, Any]) -> None:
        """Stop the run in all processes if one of them has different settings.

        Raises:
          UserError: If one differs; the message names the first difference and the processes.
        """
        text = json.dumps(settings, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if self._meet("digest", digest, lambda digests: str(len(set(digests)))) == "1":
            return
        if message := self._meet("settings", text, self._describe_difference):
            raise UserError(message)

    def _describe_difference(self, texts: list[str]) -> str:
        first, *others = map(json.loads, texts)
        for index, other in enumerate(others, 1):
            for name in first:
                if difference := config_json.describe_difference(other.get(name), first[name], name):
                    return (
                        f"{self._names[index]} was started with another {name} than {self._names[0]}: {difference} "
                        f"(there is the former, here the latter). Use the same {name} for all processes."
                    )
        return ""

    def _meet(self, name: str, text: str, combine: Callable[[list[str]], str]) -> str:
        """Return what process 0 makes of the texts of all processes, in the time for their start."""
        seconds = self._timeouts.startup
        try:
            return self._startup_store.meet(name, text, combine=combine, seconds=seconds)
        except TimeoutError as error:
            problem = f"no message from processes within {seconds:g} s: {error}"
            raise TransientError(f"{problem}. Start all processes again.") from error

    def report_hang(self, message: str) -> None:
        """End the run because this process hangs; all processes show their stacks.

        Args:
          message: What hangs.
        """
        self._hang = message
        # This process ends when process 0 tells all, like the others, unless that does not come.
        self._finished.wait(4 * self._interval + GRACE_SECONDS)
        if not self._finished.is_set():
            end_hanging_process(message)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            if error is None:
                # The others may have more to do; they are monitored meanwhile.
                self._store.write(f"{EXIT}{self._group.process_id}", ProcessExit().to_text())
                self._all_left.wait()
            else:
                self._end_with_error(error)
        finally:
            self._finished.set()
            for thread in self._threads:
                thread.join(1.0)  # before JAX closes the client that they use
            if self._watchdog is not None and self._watchdog.stdin is not None:
                with contextlib.suppress(OSError):
                    self._watchdog.stdin.write(b"bye")
                    self._watchdog.stdin.close()
                self._watchdog.wait()

    def _end_with_error(self, error: BaseException) -> None:
        """End together with the others, which would wait for this process, and for which JAX would wait at exit."""
        process_id, code = self._group.process_id, _get_code(error)
        try:
            if _is_of_jax(error):
                # Another process' death breaks connections and should be reported instead of this error. So the error
                # is reported only if all processes have it.
                self._store.write(f"{TROUBLE}{process_id}", "")
                self._all_in_trouble.wait(self._timeouts.max_silence + 2 * GRACE_SECONDS)
            self._has_failed = True
            ended = ProcessExit(error=f"{type(error).__name__}: {error}", code=code)
            self._store.write(f"{EXIT}{process_id}", ended.to_text())
            if self._all_left.wait(2 * GRACE_SECONDS) and not (_is_of_jax(error) and code == EXIT_TRY_AGAIN):
                return  # All have ended, with errors of their own.
        except jax.errors.JaxRuntimeError:  # The store fails if process 0, which holds it, is gone.
            if not self._group.is_first:
                self._end(f"{self._first_name}, which keeps the run together, is gone")
        if isinstance(error, UserError | KeyboardInterrupt):
            print(f"{'error' if isinstance(error, UserError) else 'stopped'}: {error}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        self._end_now(code)

    def _exchange_heartbeats(self) -> None:
        """Write heartbeats, and read or publish the run's health. Its calls may hang if process 0 does."""
        beat = 0
        while not self._finished.is_set():
            beat += 1
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # The other thread notices silence.
                phases = PROGRESS.phases[-1:]
                phase = phases[0].name if phases else ""
                counts = {"step_count": PROGRESS.step_count, "changes": PROGRESS.changes}
                heartbeat = Heartbeat(beat=beat, **counts, phase=phase, hang=self._hang)
                self._store.write(f"{HEARTBEAT}{self._group.process_id}", heartbeat.to_text())
                self._take_health(self._read_health() if self._checker is None else self._publish_health(beat))
            self._finished.wait(self._interval)

    def _publish_health(self, beat: int) -> RunHealth:
        assert self._checker is not None
        self._checker.update(self._store.read())
        health = self._checker.check(beat)
        self._health_store.write(_HEALTH, health.to_text())
        return health

    def _read_health(self) -> RunHealth:
        text = self._health_store.try_read(_HEALTH)
        return RunHealth() if text is None else RunHealth(**json.loads(text))

    def _take_health(self, health: RunHealth) -> None:
        if health.beat != self._health.beat:
            self._answer_time = time.monotonic()
        self._health = health
        if health.all_in_trouble:
            self._all_in_trouble.set()
        if health.all_left:
            self._all_left.set()

    def _watch_health(self) -> None:
        """End the process if another one has failed, or if process 0 does not answer."""
        last_check = time.monotonic()
        while not self._finished.wait(min(1.0, self._interval)):
            now = time.monotonic()
            # If this process was suspended, all heartbeats look old.
            if now - last_check > self._timeouts.max_silence / 2:
                self._restart_times()
            last_check = now
            if self._has_failed:
                continue
            if self._health.failure:
                self._end(self._health.failure, is_hang=self._health.is_hang, code=self._health.exit_code)
            max_silence = self._timeouts.max_silence
            if not self._group.is_first and now - self._answer_time > max_silence:
                self._end(f"{self._first_name}, which keeps the run together, has not answered for {max_silence:g} s")

    def _restart_times(self) -> None:
        self._answer_time = time.monotonic()
        if self._checker is not None:
            self._checker.restart()

    def _end(self, message: str, *, is_hang: bool = False, code: int = EXIT_TRY_AGAIN) -> None:
        with self._end_lock:
            if self._finished.is_set():
                return
            advice = "Checkpoints are complete: start all processes again to continue from the newest one."
            if code != EXIT_TRY_AGAIN:
                advice = "Correct that first. Checkpoints are complete; all processes continue from the newest one."
            print(f"error: {message}; process {self._group.process_id} ends too. {advice}", file=sys.stderr)
            if is_hang:
                dump_stacks()
            self._end_now(code)

    def _end_now(self, code: int) -> None:
        """End the process without JAX's shutdown, which waits for the others."""
        if self._watchdog is not None:
            self._watchdog.kill()
        if self._group.is_first:
            time.sleep(GRACE_SECONDS)  # The store ends with this process; the others have to read the message before.
        exit_now(code)


def _is_of_jax(error: BaseException) -> bool:
    """Return whether an error may come from another process; JAX raises Gloo's errors as a ValueError, too."""
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


def _get_code(error: BaseException) -> int:
    """Return the exit code of a process after an error."""
    if isinstance(error, UserError | GracefulStop):
        return error.code
    if _is_of_jax(error) and _LOST_CONNECTION.search(str(error)):
        return EXIT_TRY_AGAIN
    return 130 if isinstance(error, KeyboardInterrupt) else 1


_WATCHDOG_PROGRAM = """
import signal, socket, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM sends it to all processes of a job, which may go on for a while.
name, host, port, index = sys.argv[1:]
if not sys.stdin.buffer.read():  # Returns when the parent has ended; it is empty if the parent did not say goodbye.
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        print(
            f"error: {name}, which keeps the run together, is gone ({error.strerror or error}); process {index} ended "
            "too. Checkpoints are complete: start all processes again to continue from the newest one.",
            file=sys.stderr, flush=True
        )
"""


def _start_watchdog(first: str, process_id: int) -> subprocess.Popen:
    from jax._src import distributed  # Private: the address that JAX has found.

    host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
    command = [sys.executable, "-I", "-S", "-c", _WATCHDOG_PROGRAM, first, host.strip("[]"), port, str(process_id)]
    # It runs in its own session, so that Ctrl-C and the end of a terminal do not reach it.
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, bufsize=0)
