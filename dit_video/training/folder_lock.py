"""One process, or one run of several, writes into a folder at a time."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax

from dit_video.core.errors import UserError

LOCK = ".lock"


class _Held:
    """The folders that this process holds: how many times, and the open file that holds it, where there are locks."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._times: dict[Path, int] = {}
        self._files: dict[Path, int | None] = {}

    def take(self, path: Path) -> None:
        with self._guard:
            if not self._times.get(path):
                self._files[path] = _lock(path)
            self._times[path] = self._times.get(path, 0) + 1

    def leave(self, path: Path) -> None:
        with self._guard:
            self._times[path] -= 1
            # The file stays where it is: were it removed, one process could lock it and another one its successor.
            if not self._times[path] and (file := self._files.pop(path)) is not None:
                os.close(file)


_held = _Held()


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if it isn't there.

    The lock is the operating system's (`flock`), on the file `.lock` in the folder: it ends with its process, however
    that ends, so that a dead one holds nothing. The same process may take it again. Of a run of several processes the
    first takes it for all. File systems without such locks go without, with a
    warning.

    Raises:
      UserError: another process holds it, which is named; the folder can't be written.
    """
    if jax.process_index() != 0:
        yield
        return
    path = Path(folder).absolute() / LOCK
    _held.take(path)
    try:
        yield
    finally:
        _held.leave(path)


def _lock(path: Path) -> int | None:
    """The open file that holds the lock; None where there are no locks."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be written ({error.strerror}); name a folder that can be, or make room"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise UserError(
            f"{path.parent} is in use by {_holder(path)}; stop that one, wait for it, or use another folder"
        ) from error
    except OSError as error:  # as on some network file systems
        os.close(file)
        warnings.warn(
            f"{path.parent} cannot be locked ({error.strerror}): see to it that no other process trains there",
            stacklevel=2,
        )
        return None
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # a full disk: the lock holds without saying whose it is
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(holder).encode(), 0)
    return file


def _holder(path: Path) -> str:
    """Who wrote the lock's file."""
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
