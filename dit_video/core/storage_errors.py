"""Classification of the errors of storage: those that pass by themselves, and those that need a person.

Local and network disks raise an `OSError`, fsspec's filesystems those of their HTTP clients, and tensorstore (under
Orbax) a `ValueError` with the code in its message. The packages of the clients need not be installed: their classes are
recognised by name.
"""

import errno
import random
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

from dit_video.core.errors import TransientError, UserError

T = TypeVar("T")

StorageProblem = Literal["transient", "access", "space", "missing"]
"""Kind of an error: it passes by itself; access is denied; there is no room; the file, the part of it that was
requested, or the bucket does not exist."""
ReadProblem = Literal["damage", "transient", "access"]
"""Kind of an error of reading: data are missing or wrong; it passes by itself; access is denied."""

RETRY_SECONDS = (1.0, 2.0, 4.0)
"""Waits between attempts, in seconds, each of which is lengthened by up to a half at random."""

_ERRNO_NAMES: dict[StorageProblem, str] = {
    "transient": (
        "EIO EREMOTEIO ESTALE EAGAIN EINTR EBUSY EBADF EMFILE ENFILE ENOMEM ENOBUFS ENOLCK ETIMEDOUT ECONNREFUSED "
        "ECONNRESET ECONNABORTED EPIPE ENOTCONN ESHUTDOWN ENETDOWN ENETRESET ENETUNREACH EHOSTDOWN EHOSTUNREACH"
    ),
    "access": "EACCES EPERM EROFS",
    "space": "ENOSPC EDQUOT EFBIG",
    "missing": "ENOENT ENOTDIR ENXIO",
}
"""Names of the system's errors, some of which other systems lack."""
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
"""Classes, or classes from which others are derived, as the package and the name, without modules."""
_CLASSES = {name: problem for problem, names in _CLASS_NAMES.items() for name in names.split()}
_TEXTS: tuple[tuple[str, StorageProblem], ...] = (
    (r"[Rr]ate.?[Ll]imit|SlowDown|Too Many Requests", "transient"),
    (r"No space left|[Dd]isk quota|File too large", "space"),
    (r"Read-only|[Pp]ermission denied|PERMISSION_DENIED|UNAUTHENTICATED|[Cc]redentials|^Forbidden", "access"),
    (r"\bUNAVAILABLE\b|\bDEADLINE_EXCEEDED\b|\bRESOURCE_EXHAUSTED\b|\bABORTED\b", "transient"),
    (r"\bNOT_FOUND\b", "missing"),
)
"""Patterns of messages without a code, the first of which decides: a full disk is RESOURCE_EXHAUSTED, too."""
_DAMAGE = re.compile(r"\b(DATA_LOSS|INVALID_ARGUMENT)\b")
"""Pattern of tensorstore's codes of damaged data, whose messages may hold any word."""
_OTHER_CODES = re.compile(r"(UNKNOWN|INTERNAL|CANCELLED|UNIMPLEMENTED|ALREADY_EXISTS)\b")
"""Pattern of messages that begin with a code of tensorstore that says nothing about the data."""
_PATHS = re.compile(r"""\"[^"/]*/[^"]*"|'[^'/]*/[^']*'|\S*/\S*""")
"""Pattern of paths and addresses in messages, whose folders may have any name."""
_DEVICE_ERRORS = ("JaxRuntimeError", "XlaRuntimeError")
_BAD_CERTIFICATE = "CERTIFICATE_VERIFY_FAILED"
_CODES = re.compile(r"\[(?:[^\[\]]*, )?(os_error_code|http_response_code)='(\d+)'")
"""Pattern of the codes in tensorstore's messages."""


def classify_storage_error(error: BaseException) -> StorageProblem | None:
    """Return the kind of an error of storage, or None for one that is of no kind, or not of storage.

    The status of an HTTP response decides first, also where it is the cause of another error, then classes, the number
    of the system's error, and the message without paths. Errors of JAX's devices, whose messages are alike, and damaged
    data are of no kind, nor is a `UserError` that is not transient.
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
    return next(filter(None, map(_classify_text, texts)), None)


def classify_read_error(error: BaseException) -> ReadProblem | None:
    """Return the kind of an error of reading data; None for one that says nothing about storage or data.

    Damaged are missing and shortened files, and wrong values, such as errors of JSON or of tensorstore. Other errors of
    the system are transient, as they say nothing about the data. Mistakes in a program are of no kind.
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


def _iterate_causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        # `requests` and `urllib` keep what went wrong below them as an attribute.
        reason = getattr(error, "reason", None)
        error = error.__cause__ or (reason if isinstance(reason, BaseException) else None)


def _get_status(error: BaseException) -> int | None:
    """Return the status, of 400 or more, of the HTTP response that an error stands for, in the ways of the clients."""
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


def _classify_text(text: str) -> StorageProblem | None:
    return next((problem for pattern, problem in _TEXTS if re.search(pattern, text)), None)
