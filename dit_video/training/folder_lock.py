"""Lock that lets one run at a time write into a folder or an address.

It is a lease: the newest file `.lease-NUMBER`, which its holder changes every few seconds. Who wants the folder watches
the file by its own clock, as clocks of machines differ; if it does not change for the time of a lease, this process
makes the file of the next number, which only one can do. A holder that finds a newer file has lost the folder. On a
disk a flock comes before: it holds between all containers of a machine, also for a process that is suspended.
(`SoftFileLease` of filelock cannot be taken over on network disks, which exchange no files.)
"""

import contextlib
import errno
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import jax

from dit_video.core.errors import EXIT_TRY_AGAIN, MissingError, TransientError, UserError, check_at_least
from dit_video.core.storage import (
    StoragePath,
    StoragePathLike,
    convert_storage_errors,
    is_transient,
    read_range,
    retry_read,
    retry_transient,
    to_storage_path,
    write_text,
)
from dit_video.distributed.faults.stacks import exit_now
from dit_video.training.agreement import call_together, format_error, raise_failure

LOCK_FILE, LEASE_FILE = ".lock", ".lease"
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)
"""Errors of network disks that have no flock, where the lease decides alone."""
_NUMBERED = re.compile(r"\.lease-(\d+)")


@dataclass(frozen=True, kw_only=True)
class LeaseConfig:
    """Times of a lease, in seconds.

    Raises:
      UserError: If a lease ends before it is renewed a few times.
    """

    renew_every: float = 10.0
    """Interval at which the holder renews it."""
    expires_after: float = 60.0
    """Time without a renewal after which others may take the folder over."""

    def __post_init__(self) -> None:
        check_at_least(3 * self.renew_every, expires_after=self.expires_after)


_held: list[tuple[StoragePathLike, "_Lease"]] = []
"""Folders that this process has locked, with their leases."""


@contextlib.contextmanager
def lock_folder(folder: StoragePathLike, *, config: LeaseConfig = LeaseConfig()) -> Iterator[None]:
    """Keep other runs out of a folder or an address, which is created if it does not exist.

    If another run holds it, this waits for up to the time of its lease, with a message: a pod that is started again may
    meet the lease of its predecessor. In a run of several processes the first one holds the lock for all, and the
    others wait for it. A process that is cut off from the storage for longer than its lease, or is suspended and not on
    the machine of the other, may lose the folder to another run. It then ends with exit code 75: before it saves a
    checkpoint (`check_locks`), and otherwise at its next renewal that the storage answers; it may add lines to its logs
    until then.

    Args:
      folder: Path or address.
      config: Times of the lease, which must be the same in all runs.

    Raises:
      TransientError: If another run, which the error names, holds the lock and renews it, or the storage does not
        answer.
      UserError: If the folder cannot be written.
    """
    is_holder = jax.process_index() == 0
    with contextlib.ExitStack() as stack:

        def acquire() -> None:
            if is_holder:
                stack.enter_context(_hold(folder, config))

        result = call_together("lock the folder", acquire)
        if result.kind != "none":
            raise_failure(f"lock {folder}", result)
        yield


@contextlib.contextmanager
def _hold(folder: StoragePathLike, config: LeaseConfig) -> Iterator[None]:
    path = to_storage_path(folder)
    with contextlib.ExitStack() as stack:
        with _convert_errors(folder):
            is_blocked = isinstance(path, Path) and not stack.enter_context(_try_flock(path, config.renew_every))
            lease = _Lease(path, config, is_blocked=is_blocked)
            stack.callback(lease.release)
            if isinstance(path, Path):
                (path / LOCK_FILE).touch()  # Its time tells when the newest run began.
        _held.append((folder, lease))
        stack.callback(_held.remove, (folder, lease))
        yield


@contextlib.contextmanager
def _try_flock(folder: Path, seconds: float) -> Iterator[bool]:
    """Yield False if another process has the flock of a folder; True if this one has it, or the disk has none."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK_FILE, fallback_to_soft=False, thread_local=False)
    is_free = True
    try:
        lock.acquire(timeout=seconds)
    except filelock.Timeout:
        is_free = False
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
    try:
        yield is_free
    finally:
        with contextlib.suppress(OSError):  # A flock ends with its process.
            lock.release()


def check_locks() -> None:
    """Raise an error if another run has taken over a folder that this process has locked; before something is written.

    Raises:
      TransientError: If the folder was taken over, or the storage does not answer.
    """
    for folder, lease in _held:
        with _convert_errors(folder):
            if lease.is_lost():
                raise TransientError(_describe_loss(folder))


def _describe_loss(folder: StoragePathLike) -> str:
    return (
        f"the lock of {folder} is lost: another run has taken it over, as this process was suspended or cut off from "
        "the storage, or it cannot be renewed. This process ends without writing there."
    )


def _end(folder: StoragePathLike) -> None:
    """End this process, which has lost its lock."""
    print(f"error: {_describe_loss(folder)}", file=sys.stderr)
    exit_now(EXIT_TRY_AGAIN)


def _make_in_use_error(folder: StoragePathLike, holder: str) -> TransientError:
    return TransientError(f"{folder} is in use by {holder}. Stop it, wait for it, or use another folder.")


def _describe_holder(record: dict[str, Any]) -> str:
    return f"process {record['pid']} on {record.get('host')}" if "pid" in record else "another process"


def _tell_wait(folder: StoragePathLike, holder: str, config: LeaseConfig) -> None:
    limit = f"up to {config.expires_after:g} s for it to end or to fail to renew its lock"
    print(f"{folder} is in use by {holder}; waiting {limit}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _convert_errors(folder: StoragePathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if is_transient(error):
            advice = "Run the same command again; if that does not help, check the disk."
            raise TransientError(f"{folder} cannot be locked now ({reason}). {advice}") from error
        fix = "Use a writable folder, or free disk space."
        raise UserError(f"{folder} cannot be written ({reason}). {fix}") from error


class _Lease:
    """Lease of a folder or an address, and the thread that renews it."""

    def __init__(self, folder: StoragePath, config: LeaseConfig, *, is_blocked: bool) -> None:
        """Wait until the folder is free, or its lease has expired.

        Args:
          folder: The folder or address.
          config: Times of the lease.
          is_blocked: Whether another process has the flock of the folder.

        Raises:
          TransientError: If another run renews its lease, or the storage does not answer.
          UserError: If the folder cannot be written.
        """
        self._folder, self._config = folder, config
        self._fields = {"pid": os.getpid(), "host": socket.gethostname(), "machine": _identify_machine()}
        self._fields["id"] = uuid.uuid4().hex
        self._renewals = 0
        self._number = self._acquire(is_blocked=is_blocked)
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew_regularly, name="renew the lock", daemon=True)
        self._thread.start()

    def _acquire(self, *, is_blocked: bool) -> int:
        """Return the number of the file that this process has made."""
        config, pause = self._config, min(1.0, self._config.renew_every / 4)
        last = time.monotonic()
        content, waited_seconds, unchanged_seconds = b"", 0.0, 0.0
        while True:
            number = self._find_newest()
            newest, now = self._read(number), time.monotonic()
            record = _parse(newest)
            # While the storage did not answer, or this process was suspended, the holder could not renew it, either.
            passed, last = min(now - last, 2 * pause), now
            waited_seconds, unchanged_seconds = waited_seconds + passed, unchanged_seconds + passed
            has_expired = newest == content and unchanged_seconds >= config.expires_after
            has_ended = _has_ended(record)
            is_free = not number or record.get("is_released") or has_expired or has_ended
            holder = _describe_holder(record)
            # A server may keep the flock of a machine that is gone. On this machine its holder lives, suspended or not;
            # without a lease, it has just begun.
            if is_blocked and not has_ended and (not number or _is_of_this_machine(record)):
                raise _make_in_use_error(self._folder, holder)
            if is_free and self._create(number + 1):
                return number + 1
            if waited_seconds >= config.expires_after + config.renew_every:
                raise _make_in_use_error(self._folder, holder)
            if newest != content:
                if not content:
                    _tell_wait(self._folder, holder, config)
                content, unchanged_seconds = newest, 0.0
            time.sleep(pause)

    def is_lost(self) -> bool:
        """Return whether another process has taken the folder over."""
        # A list may be old, and who takes the folder over removes this file.
        own = self._read(self._number)
        return self._find_newest() > self._number or _parse(own).get("id") != self._fields["id"]

    def release(self) -> None:
        """End the lease."""
        self._released.set()
        self._thread.join(3 * self._config.renew_every)  # If the storage does not answer, the lease ends later.

    def _renew_regularly(self) -> None:
        has_warned = False
        while not self._released.wait(self._config.renew_every):
            try:
                if self.is_lost():
                    _end(self._folder)
                self._renewals += 1
                self._write()
                has_warned = False
            except Exception as error:  # the storage may answer at the next renewal
                if not has_warned:
                    limit = f"others may take it over after {self._config.expires_after:g} s"
                    message = f"the lock of {self._folder} cannot be renewed now ({format_error(error)}); {limit}"
                    print(f"warning: {message}", file=sys.stderr, flush=True)
                has_warned = True
        with contextlib.suppress(Exception):  # Others wait for the end of the lease.
            # The file stays: without it, one process could make the next number and another one the same as this.
            if not self.is_lost():
                self._write(is_released=True)

    # Files

    def _get_path(self, number: int) -> StoragePath:
        return self._folder / f"{LEASE_FILE}-{number:06d}"

    def _list_numbers(self) -> list[int]:
        folder = self._folder
        try:
            if isinstance(folder, Path):
                names = retry_transient(lambda: os.listdir(folder))
            else:
                folder.fs.invalidate_cache()
                with convert_storage_errors(folder):
                    names = retry_read(folder.fs, lambda: folder.fs.ls(folder.path, detail=False))
        except (FileNotFoundError, MissingError):
            return []
        matches = (_NUMBERED.fullmatch(str(name).rstrip("/").rpartition("/")[2]) for name in names)
        return [int(match[1]) for match in matches if match]

    def _find_newest(self) -> int:
        return max(self._list_numbers(), default=0)

    def _read(self, number: int) -> bytes:
        """Return the content of a file; empty if there is none."""
        path = self._get_path(number)
        try:
            return retry_transient(lambda: read_range(path)) if isinstance(path, Path) else read_range(path)
        except (FileNotFoundError, MissingError):
            return b""

    def _make_content(self, *, is_released: bool = False) -> str:
        return json.dumps({**self._fields, "renewals": self._renewals, "is_released": is_released})

    def _write(self, *, is_released: bool = False) -> None:
        write_text(self._get_path(self._number), self._make_content(is_released=is_released))

    def _create(self, number: int) -> bool:
        """Make a file that does not exist, and return True; return False if another process was first."""
        path, content = self._get_path(number), self._make_content().encode()
        with convert_storage_errors(path):
            try:
                if isinstance(path, Path):
                    with path.open("xb") as file:
                        file.write(content)
                else:
                    path.fs.pipe_file(path.path, content, mode="create")
            except FileExistsError:
                # A request that was repeated, as its answer was lost, meets its own file.
                if self._read(number) != content:
                    return False
        with contextlib.suppress(Exception):  # Older ones do no harm.
            for older in self._list_numbers():
                if older < number:
                    self._get_path(older).unlink()
        return True


def _identify_machine() -> str:
    """Identify the boot of this machine and its table of processes; empty if the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_of_this_machine(record: dict[str, Any]) -> bool:
    """Return whether the holder of a lease runs, or ran, since the newest boot of this machine, in any container."""
    boot = _identify_machine().partition(" ")[0]
    return boot != "" and str(record.get("machine")).partition(" ")[0] == boot


def _has_ended(record: dict[str, Any]) -> bool:
    """Return whether the holder of a lease is known to have ended on this machine."""
    machine = _identify_machine()
    is_here = machine != "" and record.get("machine") == machine
    return is_here and not Path(f"/proc/{record.get('pid')}").exists()


def _parse(content: bytes) -> dict[str, Any]:
    """Return the fields of a lease; none if another program has written it."""
    try:
        record = json.loads(content)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
