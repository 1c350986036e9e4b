"""Local and remote storage of clips, data sets and caches.

A name that contains `://` is an address, which fsspec opens (`gs://`, `s3://`, `memory://` and all others that it
knows); any other name is a path on this machine. `to_storage_path` turns both into a `Path` or a `UPath`. Errors of
services, which have as many types as there are services, become a `UserError` of one line with a fix; those that may
pass by themselves become a `TransientError`, after reads have been repeated (see `storage_errors`).
"""

import contextlib
import errno
import functools
import io
import json
import os
import re
import textwrap
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.registry import known_implementations
from upath import UPath

from dit_video.core import files
from dit_video.core.errors import MissingError, TransientError, UserError
from dit_video.core.storage_errors import is_transient, retry_transient

T = TypeVar("T")
StoragePath: TypeAlias = Path | UPath
StoragePathLike: TypeAlias = str | os.PathLike | UPath
"""A storage path, or its name."""

_MANGLED_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/(?!/)")
"""Pattern of an address that `pathlib` has mangled."""
_MAX_REASON = 300
"""Maximum length of a service's error message in characters, which may be a whole page."""
_READ_AHEAD = 64 << 10
"""Bytes that are read at once of an open file at an address."""
_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_accessible: set[tuple[AbstractFileSystem, str]] = set()
"""Addresses to which this process has been given access."""


def get_default_cache() -> Path:
    """Return the folder of copies of remote files: `dit_video` in `$XDG_CACHE_HOME` (by default `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit_video"


def is_remote(path: StoragePathLike) -> bool:
    """Return True for an address, False for a path on this machine."""
    return "://" in _get_name(path) and not _get_name(path).startswith("file://")


def restore_address(path: StoragePathLike) -> str:
    """Return the name of a path, or the address that `pathlib` has mangled, such as `gs:/bucket` of `gs://bucket`."""
    name = _get_name(path)
    match = _MANGLED_ADDRESS.match(name)
    return f"{match[1]}://{name[match.end() :]}" if match and match[1] in known_implementations else name


def to_storage_path(path: StoragePathLike) -> StoragePath:
    """Return the folder or file of that name, which need not exist, with cached listings of an address discarded.

    A process asks once for each address whether access is denied.

    Raises:
      UserError: the scheme is unknown or its package is not installed; `pathlib` has mangled the address; or the
        service denies access.
    """
    name = _get_name(path)
    if not is_remote(path):
        if (match := _MANGLED_ADDRESS.match(name)) and match[1] in known_implementations:
            raise UserError(f"{name} is an address that went through pathlib; give {match[1]}://… as a string")
        return Path(name.removeprefix("file://"))
    _check_scheme(name)
    with convert_storage_errors(name):
        # With some file systems, the name of the path would keep a slash at its end.
        remote = path if isinstance(path, UPath) else UPath(re.sub(r"(?<![:/])/+$", "", name))
        remote.fs.invalidate_cache()
        if (place := (remote.fs, remote.path)) not in _accessible:
            # Not `exists`, which returns False if access is denied.
            with contextlib.suppress(FileNotFoundError):
                retry_read(remote.fs, lambda: remote.fs.info(remote.path))
            _accessible.add(place)
    return remote


@contextlib.contextmanager
def convert_storage_errors(path: StoragePathLike) -> Iterator[None]:
    """Convert errors of a service into `UserError`s of one line.

    Of the errors of paths on this machine, which may be on a network disk, only transient ones are converted.

    Raises:
      MissingError: the path does not exist.
      TransientError: the service does not answer, or is too busy.
      UserError: the service denies access.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error), _MAX_REASON, placeholder=" …") or type(error).__name__
        is_of_disk = isinstance(error, OSError) and not isinstance(error, BrokenPipeError)
        if is_transient(error) and (is_remote(path) or is_of_disk):
            fix = "run the same command again; if that does not help, check the connection"
            raise TransientError(f"{path} cannot be reached ({reason}); {fix}") from error
        if not is_remote(path):
            raise
        if isinstance(error, FileNotFoundError):
            raise MissingError(f"no such file: {path}. Check the address.") from error
        fix = "check the address, the connection and your credentials"
        raise UserError(f"{path} cannot be opened ({reason}); {fix}") from error


def list_files(folder: UPath) -> dict[str, int]:
    """Return the sizes in bytes of all files below an address, by their paths inside it, as the service lists them.

    Raises:
      UserError: the service denies access, or cannot be reached.
    """
    root = folder.path.rstrip("/")
    with convert_storage_errors(folder):
        entries = retry_read(folder.fs, lambda: folder.fs.find(folder.path, detail=True))
    names = ((path.removeprefix(root).lstrip("/"), entry) for path, entry in entries.items())
    return {name: int(entry["size"]) for name, entry in names if name and not name.endswith("/")}


def open_file(path: StoragePathLike) -> io.BufferedReader:
    """Open a file for reading; at an address, only the parts that are read are transferred.

    Raises:
      OSError: a file of this machine cannot be read.
      UserError: an address cannot be read.
    """
    if not is_remote(path):
        return open(_get_name(path), "rb")
    return io.BufferedReader(_RemoteFile(_get_name(path)), _READ_AHEAD)


class _RemoteFile(io.RawIOBase):
    """A file at an address whose parts are read by requests of their own; every error is a `UserError`."""

    def __init__(self, address: str):
        self._address, self._position = address, 0
        with convert_storage_errors(address):
            self._filesystem, self._path = fsspec.core.url_to_fs(address)
            self._size = int(retry_read(self._filesystem, lambda: self._filesystem.info(self._path))["size"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        with convert_storage_errors(self._address):
            cat_file = self._filesystem.cat_file
            content = retry_read(self._filesystem, lambda: cat_file(self._path, start=self._position, end=end))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def read_range(path: StoragePathLike, offset: int = 0, size: int | None = None) -> bytes:
    """Return `size` bytes of a file from an offset on, fewer at its end; all of them if None.

    At an address it is one request: a file that is replaced meanwhile is read as it was before or is afterwards, while
    files that fsspec opens are cut where they ended before.

    Raises:
      OSError: a file of this machine cannot be read.
      UserError: an address cannot be read.
    """
    if not is_remote(path):
        with open(_get_name(path), "rb") as file:
            file.seek(offset)
            return file.read() if size is None else file.read(size)
    with convert_storage_errors(path):
        filesystem, name = fsspec.core.url_to_fs(_get_name(path))
        end = None if size is None else offset + size
        return retry_read(filesystem, lambda: filesystem.cat_file(name, start=offset or None, end=end))


def read_files(folder: UPath, names: Collection[str]) -> dict[str, bytes]:
    """Return the contents of files below an address by their paths inside it, read at once.

    Raises:
      MissingError: a file does not exist.
      UserError: a file cannot be read.
    """
    root = folder.path.rstrip("/")
    with convert_storage_errors(folder):
        # Not `cat`, which takes names with brackets for patterns.
        paths = [f"{root}/{name}" for name in names]
        contents = retry_read(folder.fs, lambda: folder.fs.cat_ranges(paths, None, None, on_error="return"))
    for index, (name, path) in enumerate(zip(names, paths, strict=True)):
        with convert_storage_errors(folder / name):
            if isinstance(error := contents[index], Exception):  # as old fsspec ignores `on_error="raise"`
                if not is_transient(error):
                    raise error
                contents[index] = retry_read(folder.fs, functools.partial(folder.fs.cat_file, path))
    return dict(zip(names, contents, strict=True))


def read_document(path: StoragePath) -> Any:
    """Read a JSON file.

    Raises:
      MissingError: the file does not exist.
      UserError: the file is not valid JSON, or cannot be reached.
    """
    if isinstance(path, Path):
        return files.read_json(path)
    return files.parse_json(read_range(path), path)


def write_text(path: StoragePath, text: str) -> None:
    """Write UTF-8 text atomically.

    Raises:
      UserError: the file cannot be written.
    """
    if isinstance(path, Path):
        files.write_text(path, text)
        return
    with convert_storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.fs.pipe_file(path.path, text.encode())


def write_document(path: StoragePath, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def download(source: UPath, target: Path) -> None:
    """Copy a file to this machine atomically.

    Raises:
      MissingError: the file does not exist.
      UserError: the file cannot be reached, or this machine has no room for it.
    """
    with convert_storage_errors(source), files.atomic_path(target) as temporary:
        try:
            retry_read(source.fs, lambda: source.fs.get_file(source.path, os.fspath(temporary)))
        except OSError as error:
            if error.errno in _DISK_FULL_ERRNOS:
                raise UserError(f"{target} cannot be written ({error.strerror}). Free disk space there.") from error
            raise


def upload(source: Path, target: UPath) -> None:
    """Copy a file to an address. In object stores it becomes visible once it is complete.

    Raises:
      UserError: the file cannot be written.
    """
    with convert_storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.fs.put_file(os.fspath(source), target.path)


def retry_read(filesystem: AbstractFileSystem, function: Callable[[], T]) -> T:
    """Return the result of a function that reads. It is repeated unless the filesystem does that, as gcsfs and s3fs."""
    return function() if hasattr(filesystem, "retries") else retry_transient(function)


def _get_name(path: StoragePathLike) -> str:
    return str(path) if isinstance(path, UPath) else os.fspath(path)


def _check_scheme(name: str) -> None:
    """Raise `UserError` unless an installed package opens addresses of this scheme."""
    scheme = name.partition("://")[0]
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError as error:
        raise UserError(
            f"{name} begins with {scheme}://, which fsspec doesn't know; use gs://, s3://, another that it knows, or a "
            "local folder"
        ) from error
    except ImportError as error:
        package = known_implementations[scheme]["class"].partition(".")[0]
        fix = str(error) if package == "fsspec" else f"pip install {package}"  # fsspec's own message names the package
        raise UserError(f"{name} needs a package that is not installed: {fix}") from error
