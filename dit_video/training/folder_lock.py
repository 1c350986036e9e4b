"""File lock that lets one run at a time write into a folder."""

import contextlib
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax

from dit_video.core.errors import UserError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike) -> Iterator[None]:
    """Keep other processes out of a folder, which is created if it does not exist.

    The lock is the operating system's (`flock`), on the file `.lock` in the folder, so that it ends with its process
    even if that is killed. In a run of several processes the first one holds the lock for all. File systems without
    such locks are used unlocked, with a warning.

    Raises:
      UserError: A process, which the error names, holds the lock already, or the folder cannot be written.
    """
    if jax.process_index() != 0:
        yield
        return
    file = _open_lock(Path(folder).absolute() / LOCK_FILE)
    try:
        yield
    finally:
        # The file is not removed: otherwise one process could lock the old file and another process a new one.
        if file is not None:
            os.close(file)


def _open_lock(path: Path) -> int | None:
    """Return the open file that holds the lock; None on file systems without locks."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        fix = "Use a writable folder, or free disk space."
        raise UserError(f"{path.parent} cannot be written ({error.strerror}). {fix}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        fix = "Stop it, wait for it, or use another folder."
        raise UserError(f"{path.parent} is in use by {_describe_holder(path)}. {fix}") from error
    except OSError as error:  # some network file systems have no locks
        os.close(file)
        advice = "Make sure that no other process trains there."
        warnings.warn(f"{path.parent} cannot be locked ({error.strerror}). {advice}", stacklevel=2)
        return None
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # on a full disk the lock holds, but does not name its process
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(holder).encode(), 0)
    return file


def _describe_holder(path: Path) -> str:
    """Return a description of the process that holds the lock."""
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
