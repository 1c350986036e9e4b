"""A key-value store for short texts of all processes of a run, kept by the first process."""

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import jax

from dit_video.distributed.process_group import ProcessGroup

T = TypeVar("T")
_PREFIX = "dit_video"
_RETRY_SECONDS = (0.1, 0.3, 0.6, 1.0)
"""Pauses before the further tries of a call that failed."""
_MIN_PAUSE, _MAX_PAUSE = 0.02, 1.0
"""Shortest and, in small groups, longest pause between two reads of a text that is awaited, in seconds."""


class AbortedWaitError(Exception):
    """Raised by a wait that another thread ended."""


class KeyValueStore:
    """Texts by name, shared by all processes of the run.

    It is the store of JAX's coordination service. Calls that fail are tried again for two seconds; then they raise
    JAX's error, and process 0 is likely to be gone. A call may also hang as long as process 0 does.

    Process 0 works for all calls of all processes. So only process 0 reads the texts of all (`read`), and publishes
    what it makes of them under one name. Who waits for a text reads it at growing intervals: a blocking call of JAX's
    client does not let Python handle signals, and each that times out leaves 14 kB behind in process 0.
    """

    def __init__(self, namespace: str, group: ProcessGroup | None = None) -> None:
        """Open a namespace of the store.

        Args:
          namespace: Prefix that separates names from others.
          group: Processes that share the store; None for all of this run.
        """
        self.group = group or ProcessGroup.get_current()
        self._prefix = f"{_PREFIX}/{namespace}/"

    def write(self, name: str, text: str) -> None:
        """Write a text under a name, replacing any earlier one."""
        self._retry(lambda: self.group.client.key_value_set(self._prefix + name, text, allow_overwrite=True))

    def try_read(self, name: str) -> str | None:
        """Return the text of a name; None if there is none."""
        try:
            return self._retry(lambda: self.group.client.key_value_try_get(self._prefix + name))
        except jax.errors.JaxRuntimeError as error:
            if _is_missing(error):
                return None
            raise

    def read(self, folder: str = "") -> dict[str, str]:
        """Return all texts of the namespace, or of those names that begin with `folder`, without that beginning."""
        prefix = self._prefix + folder
        texts = self._retry(lambda: self.group.client.key_value_dir_get(prefix))
        return {name.removeprefix(prefix): text for name, text in texts}

    def wait_for(self, name: str, seconds: float = math.inf, *, abort: threading.Event | None = None) -> str:
        """Return the text of a name, once there is one.

        Raises:
          TimeoutError: After `seconds`.
          AbortedWaitError: If `abort` was set.
        """
        text = self._wait(lambda: self.try_read(name), seconds, abort)
        if text is None:
            raise TimeoutError(f"{name} is missing")
        return text

    def meet(
        self,
        name: str,
        text: str = "",
        *,
        combine: Callable[[list[str]], str] = lambda _: "",
        seconds: float = math.inf,
        abort: threading.Event | None = None,
    ) -> str:
        """Wait until all processes have called this with the same name, and return what process 0 makes of their texts.

        May be called again after an error.

        Args:
          name: Name of the meeting, unique in the namespace.
          text: Text of this process.
          combine: Function of the texts of all processes, in their order, which must not raise. Process 0 calls it.
          seconds: Time to wait.
          abort: Event that ends the wait.

        Raises:
          TimeoutError: After `seconds`; in process 0 the message lists the processes that are missing.
          AbortedWaitError: If `abort` was set.
        """
        self.join_meeting(name, text)
        if not self.group.is_first:
            return self.wait_for(name, seconds, abort=abort)
        result = self.try_read(name)
        if result is None:
            result = combine(self._gather(_get_folder(name), seconds, abort))
            self.write(name, result)
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self.group.client.key_value_delete(self._prefix + _get_folder(name))
        return result

    def join_meeting(self, name: str, text: str = "") -> None:
        """Give a meeting the text of this process, without waiting for it."""
        self.write(f"{_get_folder(name)}{self.group.process_id}", text)

    def _gather(self, folder: str, seconds: float, abort: threading.Event | None) -> list[str]:
        names = list(map(str, range(self.group.process_count)))

        def read_all() -> dict[str, str] | None:
            texts = self.read(folder)
            return texts if texts.keys() >= set(names) else None

        texts = self._wait(read_all, seconds, abort)
        if texts is None:
            raise TimeoutError(", ".join(sorted(set(names) - self.read(folder).keys(), key=int)))
        return [texts[name] for name in names]

    def _wait(self, read: Callable[[], T | None], seconds: float, abort: threading.Event | None) -> T | None:
        """Return the first result that is not None; None after `seconds`.

        A pause is a tenth of the time that passed, so that the wait becomes at most a tenth longer.
        """
        start, longest = time.monotonic(), self.group.get_interval(_MAX_PAUSE)
        while True:
            if (result := read()) is not None:
                return result
            passed = time.monotonic() - start
            if passed > seconds:
                return None
            pause = min(max(_MIN_PAUSE, passed / 10), longest, max(_MIN_PAUSE, seconds - passed))
            if abort is None:
                time.sleep(pause)
            elif abort.wait(pause):
                raise AbortedWaitError

    def _retry(self, call: Callable[[], T]) -> T:
        pauses: Iterable[float | None] = itertools.chain(_RETRY_SECONDS, [None])
        for pause in pauses:
            try:
                return call()
            except jax.errors.JaxRuntimeError as error:
                if pause is None or _is_missing(error):
                    raise
                time.sleep(pause)
        raise AssertionError


def _is_missing(error: Exception) -> bool:
    return str(error).startswith("NOT_FOUND")


def _get_folder(meeting: str) -> str:
    # Not `meeting/`: to delete that deletes the result of the meeting, too.
    return f"{meeting}.texts/"
