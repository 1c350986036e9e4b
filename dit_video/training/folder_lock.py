"""Lock that lets one run at a time write into a folder or an address.

On a disk it is the operating system's lock (`flock`), which ends with its process even if that is killed. Everywhere it
is also a lease (see `lease`), which ends if the machine of its holder is gone, and holds where there are no such locks
or they do not reach other machines. Leases decide; the system's lock only tells at once that a holder has ended.
"""

import contextlib
import fcntl
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from dit_video.core.errors import EXIT_TRY_AGAIN, TransientError, UserError
from dit_video.core.storage import StoragePath, StoragePathLike, is_transient, to_storage_path
from dit_video.distributed.faults.stacks import exit_now
from dit_video.training.agreement import call_together, format_error, raise_failure
from dit_video.training.lease import Lease, LeaseConfig, LeaseRecord, read_newest_lease
from dit_video.training.process_identity import ProcessIdentity

LOCK_FILE = ".lock"
_POLL_SECONDS = 1.0
"""Longest interval at which a process that waits for a folder looks at it."""
RELEASE_SECONDS = 30.0
"""Longest time to wait at the end for a renewal that the storage does not answer."""
_held_locks: list["_FolderLock"] = []
"""Locks that this process holds."""


@contextlib.contextmanager
def lock_folder(folder: StoragePathLike, *, config: LeaseConfig = LeaseConfig()) -> Iterator[None]:  # noqa: B008  # it is frozen
    """Keep other runs out of a folder or an address, which is created if it does not exist.

    If another run holds it, this waits for up to the time of its lease, with a message: a pod that is started again may
    meet the lease of its predecessor. In a run of several processes the first one holds the lock for all, and the
    others wait for it. The lock may be taken over if its process is suspended or cut off from the storage for longer
    than its lease. The process then ends with exit code 75: before it saves a checkpoint (`check_locks`), and otherwise
    at its next renewal that the storage answers; it may add lines to its logs until then.

    Args:
      folder: Path or address.
      config: Times of the lease.

    Raises:
      TransientError: If another run, which the error names, holds the lock and renews it, or the storage does not
        answer.
      UserError: If the folder cannot be written.
    """
    is_holder = jax.process_index() == 0
    with contextlib.ExitStack() as stack:

        def acquire() -> None:
            if is_holder:
                stack.callback(_FolderLock(to_storage_path(folder), config).release)

        result = call_together("lock the folder", acquire)
        if result.kind != "none":
            raise_failure(f"lock {folder}", result)
        yield


def check_locks() -> None:
    """Raise an error if another run may have taken over a folder that this process has locked.

    Called before something is written. It reads the storage only if a lease was not renewed in time.

    Raises:
      TransientError: If the folder was taken over, or the storage does not answer.
    """
    for lock in _held_locks:
        lock.check()


class _FolderLock:
    """A lock that this process holds, and the thread that renews its lease."""

    def __init__(self, folder: StoragePath, config: LeaseConfig) -> None:
        self._folder = Path(os.path.abspath(folder)) if isinstance(folder, Path) else folder
        self._file = _FileLock(self._folder) if isinstance(self._folder, Path) else None
        try:
            with _convert_errors(self._folder):
                self._lease = _acquire_lease(self._folder, config, self._file)
        except BaseException:
            if self._file is not None:
                self._file.release()
            raise
        self._released = threading.Event()
        self._renewal_lock = threading.Lock()
        _held_locks.append(self)
        self._thread = threading.Thread(target=self._renew_regularly, name="renew the lock", daemon=True)
        self._thread.start()

    @property
    def lease_id(self) -> str:
        return self._lease.id

    def release(self) -> None:
        _held_locks.remove(self)
        self._released.set()
        self._thread.join(RELEASE_SECONDS)
        # If the storage does not answer, the lease ends later, and the system's lock with this process.
        if self._file is not None and not self._thread.is_alive():
            self._file.release()

    def check(self) -> None:
        if not self._lease.may_be_lost:
            return
        with self._renewal_lock, _convert_errors(self._folder):
            if not self._lease.renew():
                raise TransientError(self._describe_loss())

    def _renew_regularly(self) -> None:
        has_warned = False
        while not self._released.wait(self._lease.config.renew_every):
            try:
                with self._renewal_lock:
                    is_held = self._lease.renew()
            except Exception as error:  # the storage may answer at the next renewal
                if not has_warned:
                    limit = f"others may take it over after {self._lease.config.expires_after:g} s"
                    message = f"the lock of {self._folder} cannot be renewed now ({format_error(error)}); {limit}"
                    print(f"warning: {message}", file=sys.stderr, flush=True)
                has_warned = True
                continue
            has_warned = False
            if not is_held and not self._released.is_set():
                self._end()
        self._lease.release()

    def _end(self) -> None:
        """End this process, which has lost its lock."""
        print(f"error: {self._describe_loss()}", file=sys.stderr)
        exit_now(EXIT_TRY_AGAIN)

    def _describe_loss(self) -> str:
        return (
            f"{self._folder} was taken over by {self._lease.get_successor()}, as this process was suspended or cut off "
            f"from it for more than {self._lease.config.expires_after:g} s. It ends without writing there."
        )


class _FileLock:
    """The operating system's lock on the file `.lock` of a folder, as far as it can be had."""

    def __init__(self, folder: Path) -> None:
        """Make the folder and open the file.

        Raises:
          UserError: If the folder cannot be written.
        """
        self._path = folder / LOCK_FILE
        self.is_held = False
        self._is_supported = True
        with _convert_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    @property
    def is_blocked(self) -> bool:
        """True if another process has the lock, or it was not tried yet."""
        return self._is_supported and not self.is_held

    def try_acquire(self) -> None:
        """Take the lock if nobody has it."""
        if not self.is_blocked:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # some network file systems have no locks; there the lease decides alone
            self._is_supported = False
            return
        self.is_held = True
        holder = {**ProcessIdentity.get_current().to_json(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # it only informs
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(holder).encode(), 0)

    def release(self) -> None:
        # The file is not removed: otherwise one process could lock the old file and another process a new one.
        os.close(self._file)


def _acquire_lease(folder: StoragePath, config: LeaseConfig, file: _FileLock | None) -> Lease:
    """Wait until the folder is free or its lease has expired, and return a new lease.

    Raises:
      TransientError: If another process renews its lease, or holds the operating system's lock without a lease.
    """
    poll_seconds = min(_POLL_SECONDS, config.renew_every / 4)
    start = last = time.monotonic()
    content, waiting_for, unchanged_seconds = b"", "", 0.0
    while True:
        if file is not None:
            file.try_acquire()
        newest, now = read_newest_lease(folder), time.monotonic()
        # While the storage did not answer, or this process was suspended, the holder could not renew it, either.
        unchanged_seconds, last = unchanged_seconds + min(now - last, 2 * poll_seconds), now
        if newest.content != content:
            is_renewed = content != b"" and not _is_free(newest, file)
            if is_renewed and (newest.holder_is_visible or now - start >= newest.expires_after):
                raise _make_in_use_error(folder, newest)
            content, unchanged_seconds = newest.content, 0.0
        if newest.id in {lock.lease_id for lock in _held_locks}:
            raise _make_in_use_error(folder, newest)
        patience = newest.expires_after if newest.number else config.expires_after
        has_expired, is_free = unchanged_seconds >= patience, _is_free(newest, file)
        if has_expired and newest.number == 0:  # the lock of a version without leases, or of a process that hangs
            raise _make_in_use_error(folder, newest)
        is_waiting_for_file = file is not None and file.is_blocked and now - start < config.settle
        if has_expired or (is_free and not is_waiting_for_file):
            if has_expired and read_newest_lease(folder).content != content:  # renewed in the meantime
                continue
            if has_expired and not is_free:
                message = f"{newest} has not renewed its lock of {folder} for {newest.expires_after:g} s"
                print(f"{message}; taking it over", file=sys.stderr, flush=True)
            has_file_lock = file is not None and file.is_held
            lease = Lease.try_create(folder, newest.number + 1, config, has_file_lock=has_file_lock)
            if lease is not None:
                return lease
        elif str(newest) != waiting_for and not is_free:
            waiting_for = str(newest)
            limit = f"up to {patience:g} s for it to end or to fail to renew its lock"
            print(f"{folder} is in use by {waiting_for}; waiting {limit}", file=sys.stderr, flush=True)
        time.sleep(poll_seconds)


def _is_free(newest: LeaseRecord, file: _FileLock | None) -> bool:
    """Return whether nobody holds the folder, so that a new lease may begin at once."""
    if newest.number == 0:
        return file is None or not file.is_blocked
    if newest.is_released:
        return True
    # A holder on this machine had the lock of the operating system until its end.
    holder_had_lock = newest.has_file_lock and newest.holder is not None and newest.holder.is_on_this_machine
    if file is not None and holder_had_lock and (file.is_held or file.is_blocked):
        return file.is_held
    return newest.is_over


def _make_in_use_error(folder: StoragePath, newest: LeaseRecord) -> TransientError:
    return TransientError(f"{folder} is in use by {newest}. Stop it, wait for it, or use another folder.")


@contextlib.contextmanager
def _convert_errors(folder: StoragePath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if is_transient(error):
            advice = "Run the same command again; if that does not help, check the disk."
            raise TransientError(f"{folder} cannot be locked now ({reason}). {advice}") from error
        fix = "Use a writable folder, or free disk space."
        raise UserError(f"{folder} cannot be written ({reason}). {fix}") from error
