"""Errors of disks, services and their clients, by what has to be done about them."""

import errno
import json
import os
import socket
import ssl
import subprocess
import sys
import urllib.error
from types import SimpleNamespace

import jax
import pytest
import requests

from dit_video.core.errors import MissingError, TransientError, UserError
from dit_video.core.storage import classify_read_error, classify_storage_error, is_transient, retry_transient
from dit_video.data import tables
from support.devices import PROGRAMS, make_environment


def system(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def of_class(path: str, *bases: type[Exception], **attributes: object) -> Exception:
    """Return an error of a class of a package that need not be installed: `aiohttp.client_exceptions.ClientError`."""
    module, _, name = path.rpartition(".")
    error = type(name, bases or (Exception,), {"__module__": module})("message")
    for attribute, value in attributes.items():
        setattr(error, attribute, value)
    return error


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def http(status: int) -> urllib.error.HTTPError:
    return urllib.error.HTTPError("https://host/x", status, "reason", {}, None)  # type: ignore[arg-type]


def boto(status: int) -> Exception:
    response = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": "X"}}
    return of_class("botocore.exceptions.ClientError", response=response)


TENSORSTORE = 'Error writing "x/0" in OCDBT database at local file "/run/1/"'

TRANSIENT = [
    *map(system, (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EBUSY, errno.EAGAIN)),
    *map(system, (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EBADF)),
    ValueError(f"UNKNOWN: {TENSORSTORE}: Too many open files [os_error_code='24']"),
    *map(system, (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EPIPE, errno.EREMOTEIO)),
    *(TimeoutError("slow"), ConnectionResetError("reset"), ConnectionAbortedError()),
    socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
    urllib.error.URLError(ConnectionRefusedError(errno.ECONNREFUSED, "refused")),
    ssl.SSLError(1, "handshake failure"),
    *map(http, (408, 425, 429, 500, 502, 503, 504)),
    *map(boto, (429, 500, 503)),
    of_class("aiohttp.client_exceptions.ClientResponseError", status=503),
    of_class("gcsfs.retry.HttpError", code=429),
    of_class("gcsfs.retry.HttpError", code="503"),
    of_class("gcsfs.retry.ChecksumError"),
    of_class("google.api_core.exceptions.ServiceUnavailable", code=503),
    of_class("azure.core.exceptions.HttpResponseError", status_code=503),
    of_class("aiohttp.client_exceptions.ServerDisconnectedError", type(of_class("aiohttp.x.ClientConnectionError"))),
    of_class("aiohttp.client_exceptions.ClientPayloadError"),
    of_class("botocore.exceptions.EndpointConnectionError", type(of_class("botocore.exceptions.ConnectionError"))),
    of_class("botocore.exceptions.ReadTimeoutError", type(of_class("botocore.exceptions.HTTPClientError"))),
    of_class("google.auth.exceptions.TransportError"),
    of_class("google.auth.exceptions.RefreshError", retryable=True),
    *(requests.ConnectionError("reset"), requests.ReadTimeout("slow"), requests.exceptions.ChunkedEncodingError()),
    requests.HTTPError(response=SimpleNamespace(status_code=503)),
    OSError("Forbidden: x\nThe rate limit was exceeded: rateLimitExceeded"),  # gcsfs
    caused(system(errno.EBUSY), boto(503)),  # s3fs
    ValueError(f"UNAVAILABLE: {TENSORSTORE}: CURL error"),
    ValueError(f"DEADLINE_EXCEEDED: {TENSORSTORE}"),
    ValueError("RESOURCE_EXHAUSTED: the object exceeded the rate limit [http_response_code='429']"),
    ValueError(f"UNKNOWN: {TENSORSTORE}: Input/output error [os_error_code='5']"),
    ValueError(f"UNKNOWN: {TENSORSTORE}: Stale file handle [source locations='x', os_error_code='116']"),
    TransientError("again"),
]
ACCESS = [
    *map(system, (errno.EACCES, errno.EPERM, errno.EROFS)),
    *(http(401), http(403), boto(403), PermissionError("Access Denied")),
    OSError("Forbidden: bucket/x\ndoes not have storage.objects.get access"),
    of_class("gcsfs.retry.HttpError", code=401),
    of_class("botocore.exceptions.NoCredentialsError"),
    of_class("google.auth.exceptions.DefaultCredentialsError"),
    of_class("google.auth.exceptions.RefreshError", retryable=False),
    ssl.SSLCertVerificationError(1, "certificate has expired"),
    requests.exceptions.SSLError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"),
    caused(requests.exceptions.SSLError("failed"), ssl.SSLCertVerificationError(1, "self-signed")),
    ValueError(f"PERMISSION_DENIED: {TENSORSTORE}: Permission denied [os_error_code='13']"),
    ValueError("UNAUTHENTICATED: Anonymous caller"),
]
SPACE = [
    *map(system, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
    http(507),
    ValueError(f"RESOURCE_EXHAUSTED: {TENSORSTORE}: No space left on device [os_error_code='28']"),
    ValueError(f"RESOURCE_EXHAUSTED: {TENSORSTORE}: Disk quota exceeded"),
    ValueError(f"OUT_OF_RANGE: {TENSORSTORE}: File too large [os_error_code='27']"),
]
MISSING = [
    *(system(errno.ENOENT), FileNotFoundError("gs://bucket/none"), http(404), boto(404)),
    socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
    of_class("aiohttp.x.ClientConnectorDNSError", os_error=socket.gaierror(socket.EAI_NONAME, "not known")),
    caused(system(errno.EIO), boto(404)),
    ValueError(f"NOT_FOUND: {TENSORSTORE}"),
]
NAMED_LIKE_PROBLEMS = (
    "Error reading /runs/credentials_test/denoiser/checkpoints/5/state: DATA_LOSS: bad zstd frame",
    "DATA_LOSS: bad zarr chunk in /data/rate_limit_ablation/checkpoints/5",
    'INVALID_ARGUMENT: Error opening "zarr" driver: credentials are no object',
    'Error opening local file "/data/my credentials/5": no such key',
    "gs://bucket/SlowDown/UNAVAILABLE is incomplete",
)
"""Messages about damage with words of other problems, most of them in the names of folders."""
OTHER = [
    *(ValueError("DATA_LOSS: checksum does not match"), KeyError("x"), UserError("wrong"), MissingError("none")),
    *map(ValueError, NAMED_LIKE_PROBLEMS),
    caused(UserError("wrong"), PermissionError(13, "Permission denied")),
    *(http(400), boto(400), http(501), system(errno.EINVAL), system(errno.EISDIR), system(errno.EEXIST)),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4 bytes"),
    jax.errors.JaxRuntimeError("UNAVAILABLE: another process is gone"),
]


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        *((error, "transient") for error in TRANSIENT),
        *((error, "access") for error in ACCESS),
        *((error, "space") for error in SPACE),
        *((error, "missing") for error in MISSING),
        *((error, None) for error in OTHER),
    ],
    ids=lambda value: f"{type(value).__name__}-{value}"[:60].replace("\n", " ") if isinstance(value, Exception) else "",
)
def test_each_error_is_of_its_kind(error, problem):
    assert classify_storage_error(error) == problem
    assert is_transient(error) == (problem == "transient")
    wrapped = caused(RuntimeError("while writing"), error)
    assert classify_storage_error(wrapped) == problem


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        *((error, "transient") for error in [*TRANSIENT, *SPACE]),
        *((error, "access") for error in ACCESS),
        *((system(number), "transient") for number in (errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)),
        *((ValueError(message), "damage") for message in NAMED_LIKE_PROBLEMS),
        (ValueError("DATA_LOSS: checksum does not match"), "damage"),
        (caused(RuntimeError("while reading"), ValueError("DATA_LOSS: checksum does not match")), "damage"),
        (caused(Exception("array of Orbax"), ValueError(f"OUT_OF_RANGE: {TENSORSTORE}")), "damage"),
        (ValueError(f"OUT_OF_RANGE: {TENSORSTORE}: Range Not Satisfiable [http_response_code='416']"), "damage"),
        *((error, "damage") for error in (http(416), boto(416))),
        (caused(ValueError("cannot be read"), TypeError("x")), "damage"),
        (caused(TypeError("x"), ValueError("x")), None),
        (FileNotFoundError(errno.ENOENT, "No such file", "/run/5/meta"), "damage"),
        (ValueError(f"NOT_FOUND: {TENSORSTORE}"), "damage"),
        (json.JSONDecodeError("Expecting value", "{", 1), "damage"),
        (KeyError("arrays"), "damage"),
        (EOFError(), "damage"),
        (ValueError(f"UNKNOWN: {TENSORSTORE}: odd [os_error_code='40']"), "transient"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "transient"),
        (ValueError(f"INTERNAL: {TENSORSTORE}"), None),
        (ValueError("INVALID_ARGUMENT: bad request [http_response_code='400']"), None),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes differ"), None),
        *((error, None) for error in (TypeError("x"), AttributeError("x"), ImportError("x"), MemoryError(), boto(400))),
        *((error, None) for error in (UserError("wrong"), MissingError("none"))),
    ],
    ids=lambda value: f"{type(value).__name__}-{value}"[:60].replace("\n", " ") if isinstance(value, Exception) else "",
)
def test_only_what_says_that_data_are_wrong_is_damage(error, problem):
    assert classify_read_error(error) == problem


def test_errors_of_installed_clients_are_of_their_kinds():
    """The classes of the table above, where the clients are installed."""
    aiohttp = pytest.importorskip("aiohttp.client_exceptions")
    botocore = pytest.importorskip("botocore.exceptions")
    gcsfs, s3fs = pytest.importorskip("gcsfs.retry"), pytest.importorskip("s3fs.errors")
    for error in (aiohttp.ServerDisconnectedError(), aiohttp.ClientPayloadError(), gcsfs.HttpError({"code": 503})):
        assert is_transient(error)
    assert is_transient(botocore.EndpointConnectionError(endpoint_url="https://host"))
    assert is_transient(botocore.ReadTimeoutError(endpoint_url="https://host"))
    for code, status, problem in (("SlowDown", 503, "transient"), ("AccessDenied", 403, "access"), ("Odd", 400, None)):
        response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
        error = s3fs.translate_boto_error(botocore.ClientError(response, "GetObject"))
        assert classify_storage_error(error) == problem
    assert classify_storage_error(botocore.NoCredentialsError()) == "access"
    assert classify_storage_error(aiohttp.InvalidURL("x")) is None


def test_a_function_is_called_again_after_transient_errors_only(monkeypatch):
    monkeypatch.setattr("dit_video.core.storage.RETRY_SECONDS", (1.0, 2.0))
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    results = [TimeoutError("slow"), ConnectionResetError("reset"), 3]

    def read() -> int:
        if isinstance(result := results.pop(0), Exception):
            raise result
        return result

    assert retry_transient(read) == 3
    assert 1 <= waits[0] <= 1.5
    assert 2 <= waits[1] <= 3
    results[:] = [TimeoutError("slow"), PermissionError("denied"), 3]
    with pytest.raises(PermissionError):
        retry_transient(read)
    results[:] = [*[TimeoutError("slow")] * 3, 3]
    with pytest.raises(TimeoutError):
        retry_transient(read)
    assert results == [3]


@pytest.mark.parametrize(("number", "code"), [(errno.ETIMEDOUT, 75), (errno.EACCES, 2)])
def test_a_script_ends_with_the_code_of_its_storage_error(number, code):
    command = [sys.executable, "-P", str(PROGRAMS / "faulty_storage.py"), str(number)]
    done = subprocess.run(command, env=make_environment(1), capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: memory://bucket/x cannot be ")
    assert len(done.stderr.splitlines()) == 1


def test_a_file_on_a_disk_that_is_away_for_a_moment_asks_for_another_try(monkeypatch, tmp_path):
    def fail(path):
        raise system(errno.ESTALE)

    monkeypatch.setattr(tables, "read_range", fail)
    with pytest.raises(TransientError, match="cannot be reached"):
        tables.read_bytes(tmp_path / "part.parquet")
