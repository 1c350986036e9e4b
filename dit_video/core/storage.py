"""Local and remote storage of clips, data sets and caches.

A name that contains `://` is an address, which fsspec opens (`gs://`, `s3://`, `memory://` and all others that it
knows); any other name is a path on this machine. `to_storage_path` turns both into a `Path` or a `UPath`. Errors of
services, which have as many types as there are services, become a `UserError` of one line with a fix. Errors that may
pass by themselves become a `TransientError`, after reads have been repeated. The kinds of errors are at the end of the
module.
"""

import contextlib
import errno
import functools
import io
import json
import os
import random
import re
import socket
import ssl
import textwrap
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.registry import known_implementations
from upath import UPath

from dit_video.core import files
from dit_video.core.errors import DISK_FULL_ERRNOS, MissingError, TransientError, UserError

T = TypeVar("T")
StoragePath: TypeAlias = Path | UPath
StoragePathLike: TypeAlias = str | os.PathLike | UPath
"""A storage path, or its name."""

_MANGLED_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/(?!/)")
"""Pattern of an address that `pathlib` has mangled."""
_MAX_REASON = 300
"""Largest number of characters shown from a service's error message, which may be a whole page."""
_READ_AHEAD = 64 << 10
"""Number of bytes read at once from an open file at an address."""
_accessible: set[tuple[AbstractFileSystem, str]] = set()
"""Addresses to which this process has been given access."""


def get_default_cache() -> Path:
    """Return the folder for copies of remote files: `dit_video` in `$XDG_CACHE_HOME` (by default `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit_video"


def is_remote(path: StoragePathLike) -> bool:
    """Return True for an address, False for a path on this machine."""
    return "://" in _get_name(path) and not _get_name(path).startswith("file://")


def restore_address(path: StoragePathLike) -> str:
    """Return a path's name, or the address that `pathlib` has mangled: for example `gs://bucket` for `gs:/bucket`."""
    name = _get_name(path)
    match = _MANGLED_ADDRESS.match(name)
    return f"{match[1]}://{name[match.end() :]}" if match and match[1] in known_implementations else name


def to_storage_path(path: StoragePathLike) -> StoragePath:
    """Return the folder or file with this name, which need not exist; cached listings of an address are discarded.

    A process checks its access to each address only once.

    Raises:
      UserError: If the scheme is unknown or its package is not installed, `pathlib` has mangled the address, or the
        service denies access.
    """
    name = _get_name(path)
    if not is_remote(path):
        if (match := _MANGLED_ADDRESS.match(name)) and match[1] in known_implementations:
            raise UserError(f"{name} is an address that went through pathlib; give {match[1]}://… as a string")
        return Path(name.removeprefix("file://"))
    _check_scheme(name)
    with convert_storage_errors(name):
        # With some file systems, the path's name would keep a slash at its end.
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

    For paths on this machine, which may be on a network disk, only transient errors are converted.

    Raises:
      MissingError: If the path does not exist.
      TransientError: If the service does not answer, or is too busy.
      UserError: If the service denies access.
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
    """Return the sizes in bytes of all files below an address by their paths inside it, as the service lists them.

    Raises:
      UserError: If the service denies access, or cannot be reached.
    """
    root = folder.path.rstrip("/")
    with convert_storage_errors(folder):
        entries = retry_read(folder.fs, lambda: folder.fs.find(folder.path, detail=True))
    names = ((path.removeprefix(root).lstrip("/"), entry) for path, entry in entries.items())
    return {name: int(entry["size"]) for name, entry in names if name and not name.endswith("/")}


def open_file(path: StoragePathLike) -> io.BufferedReader:
    """Open a file for reading; at an address, only the parts that are read are transferred.

    Raises:
      OSError: If a file on this machine cannot be read.
      UserError: If an address cannot be read.
    """
    if not is_remote(path):
        return open(_get_name(path), "rb")
    return io.BufferedReader(_RemoteFile(_get_name(path)), _READ_AHEAD)


class _RemoteFile(io.RawIOBase):
    """A file at an address; each part is read by its own request, and every error is a `UserError`."""

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
    """Return `size` bytes of a file from an offset on, or fewer at its end; None returns all of them.

    At an address this is a single request. A file that is replaced meanwhile is read either as it was or as it becomes,
    whereas files that fsspec opens are cut where they ended before.

    Raises:
      OSError: If a file on this machine cannot be read.
      UserError: If an address cannot be read.
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
      MissingError: If a file does not exist.
      UserError: If a file cannot be read.
    """
    root = folder.path.rstrip("/")
    with convert_storage_errors(folder):
        # This avoids `cat`, which takes names with brackets for patterns.
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
      MissingError: If the file does not exist.
      UserError: If the file is not valid JSON, or cannot be reached.
    """
    if isinstance(path, Path):
        return files.read_json(path)
    return files.parse_json(read_range(path), path)


def write_text(path: StoragePath, text: str) -> None:
    """Write UTF-8 text atomically.

    Raises:
      UserError: If the file cannot be written.
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
      MissingError: If the file does not exist.
      UserError: If the file cannot be reached, or this machine has no room for it.
    """
    with convert_storage_errors(source), files.atomic_path(target) as temporary:
        try:
            retry_read(source.fs, lambda: source.fs.get_file(source.path, os.fspath(temporary)))
        except OSError as error:
            if error.errno in DISK_FULL_ERRNOS:
                raise UserError(f"{target} cannot be written ({error.strerror}). Free disk space there.") from error
            raise


def upload(source: Path, target: UPath) -> None:
    """Copy a file to an address. Object stores show it only once it is complete.

    Raises:
      UserError: If the file cannot be written.
    """
    with convert_storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.fs.put_file(os.fspath(source), target.path)


def _get_name(path: StoragePathLike) -> str:
    return str(path) if isinstance(path, UPath) else os.fspath(path)


def _check_scheme(name: str) -> None:
    """Raise `UserError` unless an installed package opens addresses with this scheme."""
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


# Attempts and kinds of errors

StorageProblem = Literal["transient", "access", "space", "missing"]
"""Kind of an error: it passes by itself; access is denied; there is no room; the file, the part of it that was
requested, or the bucket does not exist."""
ReadProblem = Literal["damage", "transient", "access"]
"""Kind of an error of reading: data are missing or wrong; it passes by itself; access is denied."""

RETRY_SECONDS = (1.0, 2.0, 4.0)
"""Waits between attempts, in seconds; each is lengthened at random by up to a half."""

_ERRNO_NAMES: dict[StorageProblem, str] = {
    "transient": (
        "EIO EREMOTEIO ESTALE EAGAIN EINTR EBUSY EBADF EMFILE ENFILE ENOMEM ENOBUFS ENOLCK ETIMEDOUT ECONNREFUSED "
        "ECONNRESET ECONNABORTED EPIPE ENOTCONN ESHUTDOWN ENETDOWN ENETRESET ENETUNREACH EHOSTDOWN EHOSTUNREACH"
    ),
    "access": "EACCES EPERM EROFS",
    "space": "ENOSPC EDQUOT EFBIG",
    "missing": "ENOENT ENOTDIR ENXIO",
}
"""Names of system errors; some systems lack some of them."""
_ERRNOS: dict[int, StorageProblem] = {
    getattr(errno, name, 0): problem for problem, names in _ERRNO_NAMES.items() for name in names.split()
}
_STATUSES: dict[int, StorageProblem] = {
    401: "access",
    403: "access",
    404: "missing",
    410: "missing",
    416: "missing",
    507: "space",
}
_TRANSIENT_STATUSES = {408, 425, 429, 500, *range(502, 600)} - {505, 507}
_CLASS_NAMES: dict[StorageProblem, str] = {
    "transient": (
        "aiohttp.ClientConnectionError aiohttp.ClientPayloadError botocore.ConnectionError botocore.HTTPClientError "
        "botocore.IncompleteReadError gcsfs.ChecksumError google.TransportError httpcore.NetworkError "
        "httpcore.TimeoutException httpx.TransportError requests.ChunkedEncodingError requests.ConnectionError "
        "requests.Timeout urllib3.HTTPError"
    ),
    "access": (
        "botocore.CredentialRetrievalError botocore.NoCredentialsError botocore.PartialCredentialsError "
        "botocore.TokenRetrievalError google.DefaultCredentialsError google.RefreshError"
    ),
}
"""Classes, or base classes, each as its package and name without modules."""
_CLASSES = {name: problem for problem, names in _CLASS_NAMES.items() for name in names.split()}
_TEXTS: tuple[tuple[str, StorageProblem], ...] = (
    (r"[Rr]ate.?[Ll]imit|SlowDown|Too Many Requests", "transient"),
    (r"No space left|[Dd]isk quota|File too large", "space"),
    (r"Read-only|[Pp]ermission denied|PERMISSION_DENIED|UNAUTHENTICATED|[Cc]redentials|^Forbidden", "access"),
    (r"\bUNAVAILABLE\b|\bDEADLINE_EXCEEDED\b|\bRESOURCE_EXHAUSTED\b|\bABORTED\b", "transient"),
    (r"\bNOT_FOUND\b", "missing"),
)
"""Patterns of messages without a code. The first match decides, as a full disk is RESOURCE_EXHAUSTED, too."""
_DAMAGE = re.compile(r"\b(DATA_LOSS|INVALID_ARGUMENT)\b")
"""Pattern of tensorstore's codes of damaged data, whose messages may hold any word."""
_OTHER_CODES = re.compile(r"(UNKNOWN|INTERNAL|CANCELLED|UNIMPLEMENTED|ALREADY_EXISTS)\b")
"""Pattern of messages that begin with a tensorstore code that says nothing about the data."""
_PATHS = re.compile(r"""\"[^"/]*/[^"]*"|'[^'/]*/[^']*'|\S*/\S*""")
"""Pattern of paths and addresses in messages, whose folders may have any name."""
_DEVICE_ERRORS = ("JaxRuntimeError", "XlaRuntimeError")
_BAD_CERTIFICATE = "CERTIFICATE_VERIFY_FAILED"
_CODES = re.compile(r"\[(?:[^\[\]]*, )?(os_error_code|http_response_code)='(\d+)'")
"""Pattern of the codes in tensorstore's messages."""


def retry_read(filesystem: AbstractFileSystem, function: Callable[[], T]) -> T:
    """Return the result of a read, which is repeated unless the filesystem itself does so, like gcsfs and s3fs."""
    return function() if hasattr(filesystem, "retries") else retry_transient(function)


def retry_transient(function: Callable[[], T]) -> T:
    """Return the result of a function, which is called again after transient errors of storage.

    Args:
      function: A function that may be called several times, such as a read.

    Raises:
      Exception: The error of the last attempt, or one that is not transient.
    """
    for seconds in RETRY_SECONDS:
        try:
            return function()
        except Exception as error:
            if not is_transient(error):
                raise
        time.sleep(seconds * random.uniform(1, 1.5))
    return function()


def classify_storage_error(error: BaseException) -> StorageProblem | None:
    """Return the kind of a storage error; None for an error of no kind, or one that storage did not cause.

    The status of an HTTP response decides first, even if it is the cause of another error. Then come classes, the
    number of the system's error, and the message without paths. Errors of JAX's devices, which have similar messages,
    damaged data, and a `UserError` that is not transient have no kind.
    """
    chain = list(_iterate_causes(error))
    for each in chain:
        if isinstance(each, UserError):
            return "transient" if isinstance(each, TransientError) else None
    if any(type(each).__name__ in _DEVICE_ERRORS for each in chain):
        return None
    if any(isinstance(each, ssl.SSLCertVerificationError) or _BAD_CERTIFICATE in str(each) for each in chain):
        return "access"
    if status := next(filter(None, map(_get_status, chain)), None):
        return "transient" if status in _TRANSIENT_STATUSES else _STATUSES.get(status)
    for each in chain:
        if problem := _classify_type(each):
            return problem
    texts = [_PATHS.sub("", str(each)) for each in chain]
    if any(map(_DAMAGE.search, texts)):
        return None
    return next((kind for text in texts for pattern, kind in _TEXTS if re.search(pattern, text)), None)


def classify_read_error(error: BaseException) -> ReadProblem | None:
    """Return the kind of an error in reading data; None for an error that says nothing about storage or data.

    Damage means missing and shortened files, and wrong values, such as errors of JSON or tensorstore. Other system
    errors are transient, as they say nothing about the data. Mistakes in a program have no kind.
    """
    problem, chain = classify_storage_error(error), list(_iterate_causes(error))
    if any(isinstance(each, UserError) or type(each).__name__ in _DEVICE_ERRORS for each in chain):
        return "transient" if problem == "transient" else None
    if problem == "access":
        return "access"
    if problem == "missing" and not any(isinstance(each, socket.gaierror) for each in chain):
        return "damage"
    texts = [_PATHS.sub("", str(each)) for each in chain]
    has_system_code = any("os_error_code=" in text for text in texts)
    if problem is not None or has_system_code or any(isinstance(each, OSError) for each in chain):
        return "transient"
    if any(map(_get_status, chain)):
        return None
    # Orbax wraps errors of tensorstore in a plain `Exception`.
    origin = next((each for each in chain if type(each) not in (Exception, RuntimeError)), error)
    is_of_value = isinstance(origin, ValueError | KeyError | EOFError) and not _OTHER_CODES.match(str(origin))
    return "damage" if is_of_value or any(map(_DAMAGE.search, texts)) else None


def is_transient(error: BaseException) -> bool:
    """Return True for an error of storage that may be gone at the next attempt."""
    return classify_storage_error(error) == "transient"


def _iterate_causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        # `requests` and `urllib` keep the underlying error as an attribute.
        reason = getattr(error, "reason", None)
        error = error.__cause__ or (reason if isinstance(reason, BaseException) else None)


def _get_status(error: BaseException) -> int | None:
    """Return the HTTP status, 400 or more, that an error stands for; each client stores it in its own way."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        candidates: list[Any] = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
    else:
        owners = (error, response)
        candidates = [getattr(owner, name, None) for owner in owners for name in ("status", "status_code", "code")]
    if match := _CODES.search(str(error)):
        candidates.append(match[2] if match[1] == "http_response_code" else None)
    numbers = (int(each) for each in candidates if isinstance(each, int) or (isinstance(each, str) and each.isdigit()))
    return next((number for number in numbers if 400 <= number < 600), None)


def _classify_type(error: BaseException) -> StorageProblem | None:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "missing"
    if isinstance(error, PermissionError):
        return "access"
    if isinstance(error, socket.gaierror):
        return "transient" if error.errno == socket.EAI_AGAIN else "missing"
    if isinstance(cause := getattr(error, "os_error", None), socket.gaierror):  # aiohttp's
        return _classify_type(cause)
    if isinstance(error, TimeoutError | ConnectionError | ssl.SSLError):
        return "transient"
    if getattr(error, "retryable", False) is True:  # google.auth
        return "transient"
    for base in type(error).__mro__:
        if problem := _CLASSES.get(f"{base.__module__.partition('.')[0]}.{base.__name__}"):
            return problem
    if isinstance(error, OSError) and error.errno is not None:
        return _ERRNOS.get(error.errno)
    if (match := _CODES.search(str(error))) and match[1] == "os_error_code":
        return _ERRNOS.get(int(match[2]))
    return None
