"""The processes of one run watch over each other, so that none waits for ever for one that is dead or slow.

JAX's own watch ends all processes too, but doesn't say whose fault it is in words that name a host, and takes a process
that hangs for a healthy one. Here each writes a sign of life, with the number of its steps, into the run's `Store`, and
reads the others'. The first that finds one silent, or behind, or ended, says so to all, and all end with exit code
`TRY_AGAIN`: started again, the run continues from its newest checkpoint.

The store lies in process 0. When that one dies, JAX ends the others at once, too soon for a word of theirs. So each has
a small process beside it that sees how it ends, and says it.
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
from dit_video.core.errors import TRY_AGAIN, Stopped, UserError
from dit_video.distributed.store import Store

_GRACE = 10.0
"""Seconds for the others to read what one says, and to end by themselves."""
_taken = 0


def count_step() -> None:
    """Say that this process has begun a further step: whether one is behind is known by this."""
    global _taken
    _taken += 1


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long the other processes of a run are waited for, in seconds.

    Raises:
      UserError: a time that is too short.
    """

    start: float = 300.0
    """until all have come"""
    silent: float = 60.0
    """without a sign of life of one"""
    behind: float = 1800.0
    """that one stays at a step while others are further: longer than it evaluates or samples alone"""

    def __post_init__(self) -> None:
        for name in ("start", "silent", "behind"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} s is too short for any process; give 1 or more")


class _Seen:
    """What one process knows of another: the newest sign of life, and since when it is that."""

    def __init__(self) -> None:
        self.beat, self.taken = -1, -1
        self.restart()

    def restart(self) -> None:
        self.changed = self.moved = time.monotonic()

    def take(self, sign: dict[str, Any]) -> None:
        now = time.monotonic()
        if sign["beat"] != self.beat:
            self.beat, self.changed = sign["beat"], now
        if sign["taken"] != self.taken:
            self.taken, self.moved = sign["taken"], now


class Peers:
    """The others of this process; a context, inside of which they are watched."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._store, self._start = Store("peers"), Store("start")
        self._me, self._count = jax.process_index(), jax.process_count()
        self._seen = {index: _Seen() for index in range(self._count)}
        self._names = dict.fromkeys(range(self._count), "")
        self._read: dict[str, str] = {}
        self._answered = time.monotonic()
        self._over = threading.Event()
        self._failed = False
        """whether this process ends with an error of its own, which is for itself to tell"""
        self._ending = threading.Lock()
        self._pause = min(1.0, patience.silent / 10)
        self._guard: subprocess.Popen | None = None

    def __enter__(self) -> "Peers":
        self._start.write(f"who/{self._me}", json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        found = self._all("who", self._patience.start)
        for index, text in found.items():
            who = json.loads(text)
            self._names[index] = f"process {index} ({who['host']}, pid {who['pid']})"
        if self._me != 0:
            self._guard = _start_guard(self._names[0], self._me)
        self._look_anew()  # the last one may have come late
        for work in (self._beat, self._judge):
            threading.Thread(target=work, name="watch over processes", daemon=True).start()
        return self

    def compare(self, told: dict[str, Any]) -> None:
        """Stop the run, here as in the others, if one of them was told something else.

        Raises:
          UserError: naming the first difference, and the processes.
        """
        text = json.dumps(told, sort_keys=True)
        self._start.write(f"digest/{self._me}", hashlib.sha256(text.encode()).hexdigest())
        if len(set(self._all("digest", self._patience.start).values())) == 1:
            return
        self._start.write(f"told/{self._me}", text)
        each = {index: json.loads(text) for index, text in self._all("told", self._patience.start).items()}
        for index in range(1, self._count):
            for what in told:
                if found := config_json.difference(each[index][what], each[0][what], what):
                    raise UserError(
                        f"{self._names[index]} was started with another {what} than {self._names[0]}: {found} (there "
                        "is the former, here the latter); start all with the same"
                    )

    def _all(self, kind: str, seconds: float) -> dict[int, str]:
        """What all processes have said of a kind."""
        names = {f"{kind}/{index}": index for index in range(self._count)}
        try:
            found = self._start.wait_for(set(names), seconds)
        except TimeoutError as error:
            raise UserError(f"nothing was heard of processes within {seconds:g} s: {error}; start all again") from error
        return {index: found[name] for name, index in names.items()}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._leave()
            else:
                self._fail(error)
        finally:
            self._over.set()
            if self._guard is not None and self._guard.stdin is not None:
                with contextlib.suppress(OSError):
                    self._guard.stdin.write(b"bye")
                    self._guard.stdin.close()
                self._guard.wait()

    def _leave(self) -> None:
        """Wait for the others, who may have more to do, while they are watched."""
        self._store.write(f"left/{self._me}", "")
        self._store.wait_for({f"left/{index}" for index in range(self._count)}, float("inf"))

    def _fail(self, error: BaseException) -> None:
        """End with the others: they would wait for this one, and JAX at its end for them."""
        names = set(map(str, range(self._count)))
        try:
            if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):  # which JAX gives as a ValueError
                # Of a connection that another one's death has broken, and that one is to be named; or all have it.
                self._store.write(f"trouble/{self._me}", "")
                with contextlib.suppress(TimeoutError):
                    self._store.wait_for({f"trouble/{name}" for name in names}, self._patience.silent + 2 * _GRACE)
            self._failed = True
            self._store.write(f"left/{self._me}", f"{type(error).__name__}: {error}")
            self._store.wait_for({f"left/{name}" for name in names}, 2 * _GRACE)
            return  # all have ended, with errors of their own
        except TimeoutError:
            pass
        except Exception:  # of the store, with the process that keeps it
            if self._me != 0:
                self._end(f"{self._names[0]}, which keeps the run together, is gone")
        stopped = error.code if isinstance(error, Stopped) else 0
        for kind, code in ((UserError, 2), (Stopped, stopped), (KeyboardInterrupt, 130)):
            if isinstance(error, kind):
                print(f"{'error' if code == 2 else 'stopped'}: {error}", file=sys.stderr)
                self._end_now(code)
        traceback.print_exception(error)
        self._end_now(1)

    def _beat(self) -> None:
        """Write signs of life, and read those of the others. Its calls may hang where process 0 does."""
        beat = 0
        while not self._over.is_set():
            with contextlib.suppress(Exception):
                beat += 1
                self._store.write(f"alive/{self._me}", json.dumps({"beat": beat, "taken": _taken}))
                self._read = self._store.read()
                self._answered = time.monotonic()
                for index, seen in self._seen.items():
                    if sign := self._read.get(f"alive/{index}"):
                        seen.take(json.loads(sign))
            self._over.wait(self._pause)

    def _judge(self) -> None:
        woken = time.monotonic()
        while not self._over.wait(self._pause):
            now = time.monotonic()
            if now - woken > self._patience.silent / 2:  # this process itself was stopped
                self._look_anew()
            woken = now
            if message := self._verdict(time.monotonic()):
                self._end(message)

    def _look_anew(self) -> None:
        self._answered = time.monotonic()
        for seen in self._seen.values():
            seen.restart()

    def _verdict(self, now: float) -> str:
        """What is wrong with another process; empty where nothing is."""
        read, silent = self._read, self._patience.silent
        if self._failed:
            return ""
        if "verdict" in read:
            return read["verdict"]
        present = [index for index in self._seen if f"left/{index}" not in read]
        for index in self._seen:
            if (reason := read.get(f"left/{index}")) and index != self._me and f"left/{self._me}" not in read:
                self._over.wait(_GRACE)  # in which this one has the same error, perhaps
                return "" if f"left/{self._me}" in self._read else f"{self._names[index]} has ended ({reason})"
        if self._me != 0 and now - self._answered > silent:
            return f"{self._names[0]}, which keeps the run together, has not answered for {silent:g} s"
        for index in present:
            if now - self._seen[index].changed > silent and now - self._answered <= silent and index != self._me:
                return f"{self._names[index]} has not been heard of for {silent:g} s: dead, stopped, or cut off"
        steps = {index: self._seen[index].taken for index in present}
        for index, taken in steps.items():
            if taken < max(steps.values()) and now - self._seen[index].moved > self._patience.behind:
                return f"{self._names[index]} has been behind the others for {self._patience.behind:g} s"
        return ""

    def _end(self, message: str) -> None:
        with self._ending:
            if self._over.is_set():
                return
            with contextlib.suppress(Exception):
                if "verdict" not in self._read and self._answered > time.monotonic() - self._patience.silent:
                    self._store.write("verdict", message)
            print(
                f"error: {message}; this one ({self._me}) ends too, and what was saved is whole: start all again to go "
                "on from there",
                file=sys.stderr,
            )
            self._end_now(TRY_AGAIN)

    def _end_now(self, code: int) -> None:
        """Without JAX's end, which waits for the others."""
        if self._guard is not None:
            self._guard.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        if self._me == 0:
            time.sleep(_GRACE)  # the others read what was said: the store ends with this process
        os._exit(code)


_GUARD = """
import socket, sys
name, host, port, index = sys.argv[1:]
if not sys.stdin.buffer.read():  # until its writer has ended: without a word
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        print(
            f"error: {name}, which keeps the run together, is gone ({error.strerror or error}); process {index} ended "
            "with it, and what was saved is whole: start all again to go on from there", file=sys.stderr, flush=True
        )
"""


def _start_guard(first: str, index: int) -> subprocess.Popen:
    from jax._src import distributed  # private: the address, where JAX found it out

    host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
    command = [sys.executable, "-I", "-S", "-c", _GUARD, first, host.strip("[]"), port, str(index)]
    # In a session of its own: Ctrl-C and the end of a terminal are not for it.
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, bufsize=0)
