"""Heartbeats between the processes of a run, so that none waits forever for one that is dead or slow.

JAX's own watchdog also ends all processes, but names no host, and takes a hanging process for a healthy one. Here each
process writes a heartbeat with its step count into the run's `KeyValueStore` and reads those of the others. The first
that finds one silent, behind or ended tells all, and all end with exit code `TRY_AGAIN`. When started again, the run
continues from its newest checkpoint.

Process 0 holds the store. When it dies, JAX ends the others at once, before they can print anything. So each of them
has a small watchdog process that sees how it ends and prints the reason.
"""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import jax

from dit_video.core import config_json
from dit_video.core.errors import EXIT_TRY_AGAIN, GracefulStop, UserError, check_at_least
from dit_video.distributed.store import KeyValueStore

_GRACE_SECONDS = 10.0
"""Seconds for the other processes to read a message and end by themselves."""
_step_count = 0


def count_step() -> None:
    """Count a step of this process, by which it is compared with the others."""
    global _step_count
    _step_count += 1


@dataclass(frozen=True, kw_only=True)
class TimeoutConfig:
    """Configuration of how long other processes are waited for, in seconds.

    Raises:
      UserError: If a time is too short.
    """

    startup: float = 300.0
    """Time until all processes have started."""
    max_silence: float = 60.0
    """Time without a heartbeat of a process."""
    max_lag: float = 1800.0
    """Time that a process stays at a step while others are ahead; longer than a step takes. Where one process writes or
    evaluates, the others wait for it at the same step, so that none is behind."""

    def __post_init__(self) -> None:
        check_at_least(1, startup=self.startup, max_silence=self.max_silence, max_lag=self.max_lag)


class _PeerState:
    """The newest heartbeat of another process, and the times of its last changes."""

    def __init__(self) -> None:
        self.beat, self.step_count = -1, -1
        self.restart()

    def restart(self) -> None:
        self.beat_time = self.step_time = time.monotonic()

    def update(self, sign: dict[str, Any]) -> None:
        now = time.monotonic()
        if sign["beat"] != self.beat:
            self.beat, self.beat_time = sign["beat"], now
        if sign["taken"] != self.step_count:
            self.step_count, self.step_time = sign["taken"], now


class HeartbeatMonitor:
    """A monitor of the other processes, active as a context."""

    def __init__(self, timeouts: TimeoutConfig) -> None:
        self._timeouts = timeouts
        self._store, self._startup_store = KeyValueStore("peers"), KeyValueStore("start")
        self._index, self._count = jax.process_index(), jax.process_count()
        self._peers = {index: _PeerState() for index in range(self._count)}
        self._names = dict.fromkeys(range(self._count), "")
        self._messages: dict[str, str] = {}
        self._answer_time = time.monotonic()
        self._finished = threading.Event()
        self._failed = False
        """This process ends with an error of its own, which it reports itself."""
        self._end_lock = threading.Lock()
        self._poll_interval = min(1.0, timeouts.max_silence / 10)
        self._watchdog: subprocess.Popen | None = None

    def __enter__(self) -> "HeartbeatMonitor":
        self._startup_store.write(f"who/{self._index}", json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        processes = self._wait_for_all("who", self._timeouts.startup)
        for index, text in processes.items():
            info = json.loads(text)
            self._names[index] = f"process {index} ({info['host']}, pid {info['pid']})"
        if self._index != 0:
            self._watchdog = _start_watchdog(self._names[0], self._index)
        self._reset_timers()  # Waiting for the last process to start must not count as silence.
        for task in (self._send_heartbeats, self._monitor_peers):
            threading.Thread(target=task, name="watch over processes", daemon=True).start()
        return self

    def compare(self, settings: dict[str, Any]) -> None:
        """Stop the run in all processes if one of them has different settings.

        Raises:
          UserError: If one differs; the message names the first difference and the processes.
        """
        text = json.dumps(settings, sort_keys=True)
        self._startup_store.write(f"digest/{self._index}", hashlib.sha256(text.encode()).hexdigest())
        if len(set(self._wait_for_all("digest", self._timeouts.startup).values())) == 1:
            return
        self._startup_store.write(f"told/{self._index}", text)
        texts = self._wait_for_all("told", self._timeouts.startup)
        first, *others = (json.loads(texts[index]) for index in range(self._count))
        for index, other in enumerate(others, 1):
            for name in settings:
                if difference := config_json.describe_difference(other[name], first[name], name):
                    raise UserError(
                        f"{self._names[index]} was started with another {name} than {self._names[0]}: {difference} "
                        f"(there is the former, here the latter). Use the same {name} for all processes."
                    )

    def _wait_for_all(self, kind: str, seconds: float) -> dict[int, str]:
        """Return the messages of one kind of all processes."""
        names = {f"{kind}/{index}": index for index in range(self._count)}
        try:
            messages = self._startup_store.wait_for(set(names), seconds)
        except TimeoutError as error:
            problem = f"no message from processes within {seconds:g} s: {error}"
            raise UserError(f"{problem}. Start all processes again.") from error
        return {index: messages[name] for name, index in names.items()}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            if error is None:
                # The others may have more to do; they are monitored meanwhile.
                self._store.write(f"left/{self._index}", "")
                self._store.wait_for({f"left/{index}" for index in range(self._count)}, float("inf"))
            else:
                self._end_with_error(error)
        finally:
            self._finished.set()
            if self._watchdog is not None and self._watchdog.stdin is not None:
                with contextlib.suppress(OSError):
                    self._watchdog.stdin.write(b"bye")
                    self._watchdog.stdin.close()
                self._watchdog.wait()

    def _end_with_error(self, error: BaseException) -> None:
        """End together with the others, which would wait for this process, and for which JAX would wait at exit."""
        names = set(map(str, range(self._count)))
        try:
            if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):  # JAX raises these as ValueError.
                # Another process' death breaks connections and should be reported instead of this error. So the error
                # is reported only if all processes have it.
                self._store.write(f"trouble/{self._index}", "")
                seconds = self._timeouts.max_silence + 2 * _GRACE_SECONDS
                with contextlib.suppress(TimeoutError):
                    self._store.wait_for({f"trouble/{name}" for name in names}, seconds)
            self._failed = True
            self._store.write(f"left/{self._index}", f"{type(error).__name__}: {error}")
            self._store.wait_for({f"left/{name}" for name in names}, 2 * _GRACE_SECONDS)
            return  # All have ended, with errors of their own.
        except TimeoutError:
            pass
        except Exception:  # The store fails if process 0, which holds it, is gone.
            if self._index != 0:
                self._end(f"{self._names[0]}, which keeps the run together, is gone")
        stop_code = error.code if isinstance(error, GracefulStop) else 0
        for kind, code in ((UserError, 2), (GracefulStop, stop_code), (KeyboardInterrupt, 130)):
            if isinstance(error, kind):
                print(f"{'error' if code == 2 else 'stopped'}: {error}", file=sys.stderr)
                self._end_now(code)
        traceback.print_exception(error)
        self._end_now(1)

    def _send_heartbeats(self) -> None:
        """Write heartbeats, and read those of the others. Its calls may hang if process 0 does."""
        beat = 0
        while not self._finished.is_set():
            with contextlib.suppress(Exception):
                beat += 1
                self._store.write(f"alive/{self._index}", json.dumps({"beat": beat, "taken": _step_count}))
                self._messages = self._store.read()
                self._answer_time = time.monotonic()
                for index, peer in self._peers.items():
                    if heartbeat := self._messages.get(f"alive/{index}"):
                        peer.update(json.loads(heartbeat))
            self._finished.wait(self._poll_interval)

    def _monitor_peers(self) -> None:
        """End the run when another process has failed."""
        last_check = time.monotonic()
        while not self._finished.wait(self._poll_interval):
            now = time.monotonic()
            # If this process was suspended, all heartbeats look old.
            if now - last_check > self._timeouts.max_silence / 2:
                self._reset_timers()
            last_check = now
            if message := self._find_failure(time.monotonic()):
                self._end(message)

    def _reset_timers(self) -> None:
        self._answer_time = time.monotonic()
        for peer in self._peers.values():
            peer.restart()

    def _find_failure(self, now: float) -> str:
        """Return what is wrong with another process; empty if nothing is."""
        messages, max_silence = self._messages, self._timeouts.max_silence
        if self._failed:
            return ""
        if "verdict" in messages:
            return messages["verdict"]
        present = [index for index in self._peers if f"left/{index}" not in messages]
        others = [index for index in self._peers if index != self._index]
        for index in others:
            if (reason := messages.get(f"left/{index}")) and f"left/{self._index}" not in messages:
                self._finished.wait(_GRACE_SECONDS)  # This process may have the same error, and then reports its own.
                return "" if f"left/{self._index}" in self._messages else f"{self._names[index]} has ended ({reason})"
        if self._index != 0 and now - self._answer_time > max_silence:
            return f"{self._names[0]}, which keeps the run together, has not answered for {max_silence:g} s"
        is_answering = now - self._answer_time <= max_silence
        for index in others:
            if index in present and is_answering and now - self._peers[index].beat_time > max_silence:
                return f"{self._names[index]} has sent no heartbeat for {max_silence:g} s: dead, stopped, or cut off"
        steps = {index: self._peers[index].step_count for index in present}
        for index, step_count in steps.items():
            if step_count < max(steps.values()) and now - self._peers[index].step_time > self._timeouts.max_lag:
                return f"{self._names[index]} has been behind the others for {self._timeouts.max_lag:g} s"
        return ""

    def _end(self, message: str) -> None:
        with self._end_lock:
            if self._finished.is_set():
                return
            with contextlib.suppress(Exception):
                is_answering = self._answer_time > time.monotonic() - self._timeouts.max_silence
                if "verdict" not in self._messages and is_answering:
                    self._store.write("verdict", message)
            advice = "Checkpoints are complete: start all processes again to continue from the newest one."
            print(f"error: {message}; process {self._index} ends too. {advice}", file=sys.stderr)
            self._end_now(EXIT_TRY_AGAIN)

    def _end_now(self, code: int) -> None:
        """End the process without JAX's shutdown, which waits for the others."""
        if self._watchdog is not None:
            self._watchdog.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        if self._index == 0:
            time.sleep(_GRACE_SECONDS)  # The store ends with this process; the others have to read the message before.
        os._exit(code)


_WATCHDOG_PROGRAM = """
import socket, sys
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


def _start_watchdog(first: str, index: int) -> subprocess.Popen:
    from jax._src import distributed  # Private: the address that JAX has found.

    host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
    command = [sys.executable, "-I", "-S", "-c", _WATCHDOG_PROGRAM, first, host.strip("[]"), port, str(index)]
    # It runs in its own session, so that Ctrl-C and the end of a terminal do not reach it.
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, bufsize=0)
