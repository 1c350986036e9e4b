"""Data sets at addresses: fsspec's memory, under the schemes of object stores."""

import asyncio
import errno
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from dit_video.apps.reports.ingest_report import write_ingest_report
from dit_video.core.errors import DecodeError, MissingError, TransientError, UserError
from dit_video.core.storage import (
    convert_storage_errors,
    download,
    list_files,
    open_file,
    read_document,
    read_files,
    read_range,
    to_storage_path,
    write_text,
)
from dit_video.data.clips import ClipSource, is_ingested
from dit_video.data.ingest import completion, engine, parts
from dit_video.data.ingest.engine import ingest
from dit_video.data.latents.cache import LatentSource
from dit_video.data.records import get_file_name
from dit_video.video import Clip


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


@pytest.mark.parametrize("folder", ["memory://bucket/data", "s3://bucket/data"])
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
