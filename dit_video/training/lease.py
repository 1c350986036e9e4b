"""Lease of a folder: a lock that ends when its holder does not renew it.

Where the operating system's locks do not reach, in object stores and on some network disks, a folder belongs to the
process that has made its newest lease file, `.lease-NUMBER`. Its holder renews it every few seconds by changing its
content. A process that wants the folder watches the content by its own clock, as clocks of machines differ: if it does
not change for the time that it states, the process makes the file with the next number, which only one can do, and
removes older ones. A holder whose file is gone or no longer the newest has lost the folder.
"""

import contextlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dit_video.core.errors import MissingError, check_at_least
from dit_video.core.storage import StoragePath, convert_storage_errors, retry_read
from dit_video.training.process_identity import ProcessIdentity

_NAME = re.compile(r"\.lease-(\d+)")


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
    settle: float = 1.0
    """Time after which a new lease is read again, where a service might have let two processes make the same file."""

    def __post_init__(self) -> None:
        check_at_least(3 * self.renew_every, expires_after=self.expires_after)


@dataclass(frozen=True)
class LeaseRecord:
    """The content of the newest lease file, which another version may have written."""

    number: int
    """Number of the file; 0 without one."""
    content: bytes
    """Its bytes, which change with each renewal."""
    holder: ProcessIdentity | None = None
    """Process that holds the folder; None if the content does not tell."""
    id: str = ""
    """Random name of the lease."""
    since: str = ""
    """Time of day at which the lease began, by the holder's clock, for messages."""
    expires_after: float = LeaseConfig.expires_after
    """Time without a renewal after which it ends, in seconds."""
    has_file_lock: bool = False
    """Whether the holder also has the operating system's lock."""
    is_released: bool = False
    """Whether the holder has left the folder."""

    @property
    def is_over(self) -> bool:
        """True if nobody holds the folder: there is no lease, or its holder has left it or ended."""
        return self.number == 0 or self.is_released or (self.holder is not None and self.holder.has_ended)

    @property
    def holder_is_visible(self) -> bool:
        """True if the holder runs beside this process, so that a renewal means that it is not about to be replaced."""
        return self.holder is not None and self.holder.is_visible

    def __str__(self) -> str:
        return f"{self.holder or 'another process'}{self.since and f' since {self.since}'}"


class Lease:
    """A lease of a folder that this process holds."""

    def __init__(self, folder: StoragePath, number: int, config: LeaseConfig, *, has_file_lock: bool) -> None:
        self.folder = folder
        self.config = config
        self._number = number
        self._path = folder / _format_name(number)
        self._id = uuid.uuid4().hex
        self._renewals = 0
        self._fields = {
            **ProcessIdentity.get_current().to_json(),
            "id": self._id,
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "expires_after": config.expires_after,
            "has_file_lock": has_file_lock,
        }
        self._renewal_time = _get_time()

    @classmethod
    def try_create(
        cls, folder: StoragePath, number: int, config: LeaseConfig, *, has_file_lock: bool
    ) -> "Lease | None":
        """Return a new lease with this number; None if another process was first.

        Raises:
          OSError: If the folder cannot be written.
          UserError: If the address cannot be written.
        """
        lease = cls(folder, number, config, has_file_lock=has_file_lock)
        if not _create_file(lease._path, lease._make_content()):
            return None
        if not has_file_lock:
            time.sleep(config.settle)
        # Meanwhile, a lease with this number may have ended and been removed, and one with a higher number begun.
        if not lease.is_newest():
            return None
        lease._remove_older()
        return lease

    @property
    def id(self) -> str:
        """Random name of the lease."""
        return self._id

    @property
    def seconds_since_renewal(self) -> float:
        """Time since the last renewal, including time in which the machine or this process was suspended."""
        return _get_time() - self._renewal_time

    @property
    def may_be_lost(self) -> bool:
        """True if another process may have taken the folder over since the last renewal."""
        return self.seconds_since_renewal >= self.config.expires_after - self.config.renew_every

    def is_newest(self) -> bool:
        """Return False if another process has taken the folder over.

        Raises:
          OSError: If the folder cannot be read.
          UserError: If the address cannot be read.
        """
        if max((number for number, _ in _list_leases(self.folder)), default=0) > self._number:
            return False
        # A list may be old, and who takes the folder over removes this file.
        content = _read_file(self._path)
        return content is not None and _parse(self._number, content).id in ("", self._id)

    def renew(self) -> bool:
        """Change the content, and return True; return False, and write nothing, if the folder was taken over.

        The file is gone then, or another one is newer. It is not made again, except at an address, where it does no
        harm beside a newer one.

        Raises:
          OSError: If the folder cannot be read or written.
          UserError: If the address cannot be read or written.
        """
        start = _get_time()
        if not self.is_newest():
            return False
        self._renewals += 1
        try:
            _write_file(self._path, self._make_content())
        except FileNotFoundError:
            return False
        self._renewal_time = start
        return True

    def release(self) -> None:
        """Let others have the folder at once. An error leaves them to wait for the end of the lease."""
        # The file stays: without it, one process could make the next number and another one the same number as this.
        with contextlib.suppress(Exception):
            if self.is_newest():
                _write_file(self._path, self._make_content(is_released=True))

    def get_successor(self) -> str:
        """Return a description of the process that has taken the folder over."""
        with contextlib.suppress(Exception):
            return str(read_newest_lease(self.folder))
        return "another process"

    def _make_content(self, *, is_released: bool = False) -> bytes:
        fields = {**self._fields, "renewals": self._renewals, "is_released": is_released}
        return json.dumps(fields).encode()

    def _remove_older(self) -> None:
        with contextlib.suppress(Exception):  # they do no harm
            for number, path in _list_leases(self.folder):
                if number < self._number:
                    _remove_file(path)


def read_newest_lease(folder: StoragePath) -> LeaseRecord:
    """Return the newest lease of a folder, which need not exist.

    Raises:
      OSError: If the folder cannot be read.
      UserError: If the address cannot be read.
    """
    number, path = max(_list_leases(folder), default=(0, None), key=lambda lease: lease[0])
    if path is None:
        return LeaseRecord(0, b"")
    return _parse(number, _read_file(path) or b"")


def _parse(number: int, content: bytes) -> LeaseRecord:
    try:
        fields = json.loads(content)
        return LeaseRecord(
            number,
            content,
            ProcessIdentity.from_json(fields),
            id=str(fields["id"]),
            since=str(fields["since"]),
            expires_after=float(fields["expires_after"]),
            has_file_lock=bool(fields["has_file_lock"]),
            is_released=bool(fields["is_released"]),
        )
    except (ValueError, KeyError, TypeError):  # it is just being written, or its disk was full
        return LeaseRecord(number, content)


def _format_name(number: int) -> str:
    return f".lease-{number:06d}"


def _list_leases(folder: StoragePath) -> Iterator[tuple[int, StoragePath]]:
    try:
        if isinstance(folder, Path):
            names = os.listdir(folder)
        else:
            with convert_storage_errors(folder):
                folder.fs.invalidate_cache()
                names = retry_read(folder.fs, lambda: folder.fs.ls(folder.path, detail=False))
    except (FileNotFoundError, MissingError):
        return
    for name in (str(each).rstrip("/").rpartition("/")[2] for each in names):
        if match := _NAME.fullmatch(name):
            yield int(match[1]), folder / name


def _create_file(path: StoragePath, content: bytes) -> bool:
    """Make a file, and return True; return False if it exists."""
    if isinstance(path, Path):
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(file, content)
        finally:
            os.close(file)
        return True
    with convert_storage_errors(path):
        try:
            path.fs.pipe_file(path.path, content, mode="create")
        except FileExistsError:
            # A request that was repeated, as its answer was lost, meets its own file.
            return _read_file(path) == content
    return True


def _write_file(path: StoragePath, content: bytes) -> None:
    """Change the content of a file, which on a disk has to exist."""
    if isinstance(path, Path):
        # In place: a file that replaces another is not seen at once by all machines of some network disks.
        file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(file, content, 0)
            os.ftruncate(file, len(content))
        finally:
            os.close(file)
        return
    with convert_storage_errors(path):
        path.fs.pipe_file(path.path, content)


def _read_file(path: StoragePath) -> bytes | None:
    """Return the content of a file; None if it was removed."""
    try:
        if isinstance(path, Path):
            return path.read_bytes()
        with convert_storage_errors(path):
            path.fs.invalidate_cache()
            return retry_read(path.fs, lambda: path.fs.cat_file(path.path))
    except (FileNotFoundError, MissingError):
        return None


def _remove_file(path: StoragePath) -> None:
    if isinstance(path, Path):
        path.unlink(missing_ok=True)
    else:
        path.fs.rm_file(path.path)


def _get_time() -> float:
    """Return the seconds since the start of the machine, including those in which it was suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
