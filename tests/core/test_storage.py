"""Data sets at addresses: fsspec's memory, under the schemes of object stores."""

import asyncio
import errno
import json
import os
import pickle
import socket
import ssl
import subprocess
import sys
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from dit_video.apps.reports.ingest_report import write_ingest_report
from dit_video.core.errors import DecodeError, MissingError, TransientError, UserError
from dit_video.core.storage import (
    classify_read_error,
    classify_storage_error,
    convert_storage_errors,
    download,
    is_transient,
    list_files,
    open_file,
    read_document,
    read_files,
    read_range,
    retry_transient,
    to_storage_path,
    write_document,
    write_text,
)
from dit_video.data import tables
from dit_video.data.clips import ClipSource, is_ingested
from dit_video.data.ingest import completion, engine, parts
from dit_video.data.ingest.engine import ingest
from dit_video.data.latents.cache import LatentSource
from dit_video.data.records import get_file_name
from dit_video.video import Clip
from support.devices import PROGRAMS, make_environment
from support.marks import mark_slow_except


class Memory(MemoryFileSystem):
    """A file system in memory, in which `gs://bucket/x` and `s3://bucket/x` are `bucket/x`, as in gcsfs and s3fs."""

    protocol = ("gs", "gcs", "s3")
    root_marker = ""
    store = {}  # noqa: RUF012  # fsspec's
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).removeprefix("gs://").removeprefix("gcs://").removeprefix("s3://").strip("/")


@pytest.fixture(autouse=True)
def _retry_soon(monkeypatch):
    monkeypatch.setattr("dit_video.core.storage.RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr("dit_video.core.storage._accessible", set())


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    for name in Memory.protocol:  # as if gcsfs and s3fs were installed
        monkeypatch.setitem(_registry, name, Memory)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    Memory.store.clear()
    Memory.pseudo_dirs[:] = [""]
    return Memory.store


@pytest.fixture
def clips(tmp_path):
    for index in range(3):
        frames = np.random.default_rng(index).integers(0, 255, (2, 32, 32, 3), np.uint8)
        (tmp_path / "clips").mkdir(exist_ok=True)
        Clip(frames=frames, fps=10).save(tmp_path / "clips" / f"{index}.mp4")
    return tmp_path / "clips"


def read_bucket(bucket) -> dict[str, bytes]:
    return {name.removeprefix("bucket/data/"): file.getvalue() for name, file in bucket.items()}


def test_a_data_set_can_be_written_to_and_read_from_a_bucket(clips, tmp_path, bucket):
    report = ingest(clips, "gs://bucket/data")
    ingest(clips, tmp_path / "here")
    local = [path for path in (tmp_path / "here").rglob("*") if path.is_file()]
    assert read_bucket(bucket) == {str(path.relative_to(tmp_path / "here")): path.read_bytes() for path in local}
    assert list((tmp_path / "temporary").iterdir()) == []
    assert is_ingested("gs://bucket/data")
    assert ingest(clips, "gs://bucket/data").reused
    assert ingest(clips, "gs://bucket/data").usable == report.usable == 3
    source = ClipSource("gs://bucket/data")
    assert [source[index] for index in range(3)] == [path.read_bytes() for path in sorted(clips.iterdir())]
    write_ingest_report("gs://bucket/data")
    write_ingest_report(tmp_path / "here")
    assert bucket["bucket/data/REPORT.html"].getvalue() == (tmp_path / "here" / "REPORT.html").read_bytes()


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (PermissionError("Forbidden"), r"cannot be opened \(Forbidden\); check the", 2),
        (ConnectionError("timed out"), r"cannot be reached \(timed out\); run the same command again", 75),
    ],
)
def test_a_record_that_the_service_refuses_is_not_taken_for_damaged(clips, bucket, monkeypatch, error, message, code):
    ingest(clips, "gs://bucket/data")
    source = ClipSource("gs://bucket/data")

    def refuse(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Memory, "cat_file", refuse)
        with pytest.raises(UserError, match=rf"array_record {message}") as result:
            source[0]
    assert not isinstance(result.value, DecodeError)
    assert result.value.code == code
    assert "\n" not in str(result.value)
    del bucket["bucket/data/clips-train-00000.array_record"]
    with pytest.raises(MissingError, match="The data set is incomplete"):
        source[0]


def test_a_clip_is_read_by_one_request_for_its_bytes(clips, bucket, monkeypatch):
    ingest(clips, "gs://bucket/data")
    source, read, ranges = ClipSource("gs://bucket/data"), Memory.cat_file, []

    def count(self, path, start=None, end=None, **options):
        ranges.append((path.rpartition("/")[2], end - start))
        return read(self, path, start=start, end=end, **options)

    monkeypatch.setattr(Memory, "cat_file", count)
    for index in range(3):
        clip = source[index]
        ((name, length),) = ranges
        assert name == "clips-train-00000.array_record"
        assert len(clip) < length < len(clip) + 400  # the facts of the clip, and a block's header
        ranges.clear()


def test_an_interrupted_ingest_is_no_data_set_and_can_be_repeated(clips, tmp_path, bucket, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "_MIN_PART_BYTES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(completion, "write_metadata", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ingest(clips, "gs://bucket/data")
    assert not is_ingested("gs://bucket/data")
    with pytest.raises(UserError, match="it is not finished"):
        ClipSource("gs://bucket/data")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "Workers", lambda *_: pytest.fail("decoded again"))
        ingest(clips, "gs://bucket/data")
    assert len(ClipSource("gs://bucket/data")) == 3
    write_text(to_storage_path("gs://bucket/other/letter.txt"), "keep")
    with pytest.raises(UserError, match="not an ingested data set"):
        ingest(clips, "gs://bucket/other")


def test_a_source_without_usable_clips_leaves_nothing_in_a_bucket(clips, bucket):
    for path in clips.iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="none of the 3 clips can be used"):
        ingest(clips, "gs://bucket/data")
    assert list(bucket) == []


def test_tfds_reads_a_copy_of_a_data_set_in_a_bucket(clips, bucket, tmp_path):
    ingest(clips, "gs://bucket/data")
    for name in ("features.json", "dataset_info.json", get_file_name("clips", "train-00000")):
        download(to_storage_path(f"gs://bucket/data/{name}"), tmp_path / "copy" / name)
    records = tfds.builder_from_directory(tmp_path / "copy").as_data_source("train")
    assert [record["clip"] for record in records] == [path.read_bytes() for path in sorted(clips.iterdir())]


@pytest.mark.parametrize(
    "folder", mark_slow_except(("memory://bucket/data",), ("memory://bucket/data", "s3://bucket/data"))
)
def test_a_data_set_can_be_at_any_address(clips, memory, bucket, tmp_path, monkeypatch, folder):
    real = engine.list_clips

    def list_two_splits(*arguments, **keywords):
        listing = real(*arguments, **keywords)
        splits = ("train", "test", "train")
        parted = (clip._replace(split=split) for clip, split in zip(listing.clips, splits, strict=True))
        return listing._replace(clips=tuple(parted))

    with monkeypatch.context() as patch:
        patch.setattr(engine, "list_clips", list_two_splits)
        ingest(clips, folder)
    source = ClipSource(folder)
    assert [info.split for info in source.infos] == ["train", "train", "test"]

    assert source[2] == (clips / "1.mp4").read_bytes()
    assert [source[0], source[1]] == [(clips / name).read_bytes() for name in ("0.mp4", "2.mp4")]
    assert pickle.loads(pickle.dumps(source))[2] == source[2]
    assert not list((tmp_path / "cache").rglob("*array_record*"))  # clips are read in place
    assert ClipSource(to_storage_path(folder), cache=tmp_path / "other").infos == source.infos
    assert write_ingest_report(folder).is_file()
    # Of another data set at the same address nothing is taken from copies.
    to_storage_path(folder).rmdir(recursive=True)
    (clips / "0.mp4").unlink()
    (clips / "1.mp4").unlink()
    ingest(clips, folder)
    assert ClipSource(folder)[0] == (clips / "2.mp4").read_bytes()


def test_a_full_disk_for_local_copies_is_reported(clips, memory, monkeypatch, tmp_path):
    ingest(clips, f"{memory}/data")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MemoryFileSystem, "get_file", full)
    path = to_storage_path(f"{memory}/data/table.json")
    with pytest.raises(UserError, match=r"copy cannot be written \(No space left on device\)"):
        download(path, tmp_path / "copy")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gs://bucket/x", r"^gs://bucket/x needs a package that is not installed: pip install gcsfs$"),
        ("s3://bucket/x", r"^s3://bucket/x needs a package that is not installed: pip install s3fs$"),
        ("nonsense://x", r"^nonsense://x begins with nonsense://, which fsspec doesn't know; use gs://"),
        ("gs:/bucket/x", r"^gs:/bucket/x is an address that went through pathlib; give gs://… as a string$"),
    ],
)
def test_addresses_without_a_file_system_are_refused(monkeypatch, name, message):
    for scheme in ("gs", "gcs", "s3"):  # which other tests may have used
        monkeypatch.delitem(_registry, scheme, raising=False)
    for package in ("gcsfs", "s3fs"):
        monkeypatch.setitem(sys.modules, package, None)
    for use in (to_storage_path, ClipSource, is_ingested, LatentSource):
        with pytest.raises(UserError, match=message):
            use(name)


def test_a_bucket_without_permission_is_reported(clips, memory, monkeypatch):
    ingest(clips, f"{memory}/data")
    source = ClipSource(f"{memory}/data")

    def refuse(_self, path, *_, **__):
        raise PermissionError(f"Forbidden: {path}\nasks for storage.objects.get")

    refused = r"^memory://bucket/.* cannot be opened \(Forbidden: [^\n]*\); check the address, .* credentials"
    with monkeypatch.context() as patch:
        for name in ("_open", "cat_file"):
            patch.setattr(MemoryFileSystem, name, refuse)
        with pytest.raises(UserError, match=refused):
            source[0]  # no damaged record
        with pytest.raises(UserError, match=refused):
            ClipSource(f"{memory}/data")
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "info", refuse)
        patch.setattr("dit_video.core.storage._accessible", set())
        for use in (to_storage_path, ClipSource, is_ingested, LatentSource):
            with pytest.raises(UserError, match=refused):
                use(f"{memory}/data")
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "pipe_file", refuse)
        with pytest.raises(UserError, match=refused):
            write_text(to_storage_path(f"{memory}/page.html"), "text")


def test_paths_and_addresses_become_storage_paths(tmp_path, bucket):
    assert (
        to_storage_path(tmp_path) == to_storage_path(str(tmp_path)) == to_storage_path(f"file://{tmp_path}") == tmp_path
    )
    assert str(to_storage_path("gs://bucket/data/")) == "gs://bucket/data"
    with pytest.raises(MissingError, match="no such file: gs://bucket/none"):
        read_document(to_storage_path("gs://bucket/none"))
    write_text(to_storage_path("gs://bucket/broken"), "{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_document(to_storage_path("gs://bucket/broken"))
    with pytest.raises(MissingError, match="no such data set"):
        ClipSource("gs://bucket/nowhere")
    for source, message in (("gs://bucket/clips", "no such folder or file"), ("gs:/bucket/clips", "through pathlib")):
        with pytest.raises(UserError, match=message):
            ingest(source, tmp_path / "data")


@pytest.mark.parametrize("names", [["Title [ID].txt"], ["what?.txt", "sub/*.txt", "Title [ID].txt"], []])
def test_several_files_are_read_by_names_that_are_no_patterns(bucket, names):
    folder = to_storage_path("gs://bucket/data [x]")
    for name in [*names, "what1.txt", "sub/a.txt"]:
        write_text(folder / name, f"text of {name}")
    assert read_files(folder, names) == {name: f"text of {name}".encode() for name in names}
    with pytest.raises(MissingError, match=r"^no such file: gs://bucket/data \[x\]/none\.txt\."):
        read_files(folder, [*names, "none.txt"])


def test_files_are_read_at_once_where_the_service_can(bucket, monkeypatch):
    """Requests of a service that is asynchronous wait for each other only if they are made together."""
    arrived = []

    class Service(AsyncFileSystem):
        protocol = ("gs",)
        cachable = False

        async def _info(self, path, **_):
            return {"name": path, "size": 0, "type": "directory"}

        async def _cat_file(self, path, start=None, end=None, **_):
            arrived.append(path)
            while len(arrived) < 3:
                await asyncio.sleep(0.001)
            return path.rpartition("/")[2].encode()

    monkeypatch.setitem(_registry, "gs", Service)
    folder = to_storage_path("gs://bucket/data")
    assert read_files(folder, ["a", "b?", "c[1]"]) == {"a": b"a", "b?": b"b?", "c[1]": b"c[1]"}


def fail_at_first(monkeypatch, name: str, errors: list[Exception]) -> None:
    """Let a method of the bucket raise these errors before it works."""
    method = getattr(Memory, name)

    def fail(*arguments, **keywords):
        if errors:
            raise errors.pop(0)
        return method(*arguments, **keywords)

    monkeypatch.setattr(Memory, name, fail)


READS = {
    "info": lambda: open_file("gs://bucket/a/b.json"),
    "find": lambda: list_files(to_storage_path("gs://bucket/a")),
    "cat_file": lambda: read_document(to_storage_path("gs://bucket/a/b.json")),
    "cat_ranges": lambda: read_files(to_storage_path("gs://bucket/a"), ["b.json"]),
    "get_file": lambda: download(to_storage_path("gs://bucket/a/b.json"), Path("copy")),
}


@pytest.mark.parametrize("name", READS)
def test_reads_are_repeated_until_the_service_answers(bucket, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_text(to_storage_path("gs://bucket/a/b.json"), "{}")
    with monkeypatch.context() as patch:
        fail_at_first(patch, name, [ConnectionResetError("reset"), TimeoutError("slow")])
        READS[name]()
    with monkeypatch.context() as patch:
        fail_at_first(patch, name, left := [OSError(errno.ESTALE, "stale"), *[TimeoutError("slow")] * 3])
        with pytest.raises(TransientError, match=r"cannot be reached \(slow\)"):
            READS[name]()
    assert len(left) == 1  # three attempts
    with monkeypatch.context() as patch:
        fail_at_first(patch, name, left := [PermissionError("denied"), PermissionError("denied")])
        with pytest.raises(UserError, match=r"cannot be opened \(denied\)") as result:
            READS[name]()
    assert len(left) == 1  # one attempt
    assert result.value.code == 2


def test_reads_of_a_filesystem_that_repeats_them_are_not_repeated_again(bucket, monkeypatch):
    write_text(to_storage_path("gs://bucket/a"), "{}")
    monkeypatch.setattr(Memory, "retries", 6, raising=False)  # as gcsfs and s3fs have it
    fail_at_first(monkeypatch, "cat_file", left := [TimeoutError("slow")] * 2)
    with pytest.raises(TransientError):
        read_range("gs://bucket/a")
    assert len(left) == 1


def test_one_of_several_files_is_read_again(bucket, monkeypatch):
    folder = to_storage_path("gs://bucket/a")
    for name in "xyz":
        write_text(folder / name, name)
    fail_at_first(monkeypatch, "cat_file", [TimeoutError("slow"), TimeoutError("slow")])
    assert read_files(folder, ["x", "y", "z"]) == {"x": b"x", "y": b"y", "z": b"z"}


def test_trouble_of_a_network_disk_is_transient_and_other_errors_of_a_path_stay(tmp_path):
    with pytest.raises(TransientError, match="stale"), convert_storage_errors(tmp_path):
        raise OSError(errno.ESTALE, "stale")
    for error in (FileNotFoundError("none"), BrokenPipeError("the reader is gone"), ValueError("UNAVAILABLE")):
        with pytest.raises(type(error)), convert_storage_errors(tmp_path):
            raise error


# Requests that reading an address takes, and what they return while another process writes


@pytest.mark.slow
def test_access_to_an_address_is_asked_for_once(gcs):
    to_storage_path("gs://bucket/a")
    count = len(gcs.requests)
    assert count > 0
    to_storage_path("gs://bucket/a")
    assert len(gcs.requests) == count
    to_storage_path("gs://bucket/b")
    assert len(gcs.requests) > count


@pytest.mark.slow
def test_a_document_is_read_by_one_request(gcs):
    path = to_storage_path("gs://bucket/manifest.json")
    write_document(path, {"a": 1})
    count = len(gcs.requests)
    assert read_document(path) == {"a": 1}
    assert len(gcs.requests) == count + 1


@pytest.mark.slow
@pytest.mark.parametrize("request_number", [1, 2, 3])
def test_a_document_that_is_replaced_while_it_is_read_is_the_one_or_the_other(gcs, request_number):
    short, long = [1], list(range(100))
    path = to_storage_path("gs://bucket/manifest.json")
    write_document(path, short)
    stored, requests = gcs.objects["manifest.json"], []

    def replace(method, _path):
        requests.append(method)
        if len(requests) == request_number:
            stored.content = json.dumps(long).encode()
        return 0

    gcs.fail = replace
    assert read_document(path) in (short, long)
    assert read_document(path) in (short, long)


# Errors of disks, services and their clients, by what has to be done about them


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
