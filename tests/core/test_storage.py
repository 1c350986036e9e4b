"""Data sets at addresses: fsspec's memory for the files, and a server here for what ArrayRecord itself reads."""

import errno
import fcntl
import os
import pickle
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from dit_video.core.errors import DecodeError, MissingError, UserError
from dit_video.core.storage import publish, read_document, to_storage_path, write_text
from dit_video.data.clips import INDEX, ClipSource, is_ingested
from dit_video.data.ingest import engine
from dit_video.data.ingest.engine import ingest
from dit_video.data.ingest.journal import Journal
from dit_video.data.latents.cache import LatentSource
from dit_video.data.records.cluster import BeamOptions
from dit_video.reports.ingest_report import write_ingest_report
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
def server(bucket, monkeypatch):
    """Start a server that returns parts of objects as Google Cloud Storage does."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = unquote(self.path.split("?")[0])  # /…/b/bucket/o/data/…
            key = next((key for key in bucket if name.endswith(f"/b/{key.replace('/', '/o/', 1)}")), None)
            if key is None:
                self.send_error(404)
                return
            data = bucket[key].getvalue()
            first, last = 0, len(data) - 1
            if byte_range := self.headers.get("Range"):
                low, _, high = byte_range.removeprefix("bytes=").partition("-")
                first = int(low) if low else max(0, len(data) - int(high))
                last = min(last, int(high)) if low and high else last
            self.send_response(206 if byte_range else 200)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.send_header("Content-Length", str(last + 1 - first))
            self.send_header("x-goog-generation", "1")
            self.end_headers()
            self.wfile.write(data[first : last + 1])

        def log_message(self, *_):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{served.server_port}")
    yield served
    served.shutdown()
    served.server_close()


@pytest.fixture
def clips(tmp_path):
    for index in range(3):
        frames = np.random.default_rng(index).integers(0, 255, (2, 32, 32, 3), np.uint8)
        (tmp_path / "clips").mkdir(exist_ok=True)
        Clip(frames=frames, fps=10).save(tmp_path / "clips" / f"{index}.mp4")
    return tmp_path / "clips"


def test_a_data_set_can_be_written_to_and_read_from_a_bucket(clips, tmp_path, bucket, server):
    report = ingest(clips, "gs://bucket/data")
    ingest(clips, tmp_path / "here")
    assert {name.removeprefix("bucket/data/"): file.getvalue() for name, file in bucket.items()} == {
        path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()
    }
    assert list((tmp_path / "temporary").glob("dit_video*")) == []
    assert is_ingested("gs://bucket/data")
    assert ingest(clips, "gs://bucket/data").reused
    assert ingest(clips, "gs://bucket/data").usable == report.usable == 3
    source = ClipSource("gs://bucket/data")
    assert [source[index] for index in range(3)] == [path.read_bytes() for path in sorted(clips.iterdir())]
    write_ingest_report("gs://bucket/data")
    write_ingest_report(tmp_path / "here")
    assert bucket["bucket/data/REPORT.html"].getvalue() == (tmp_path / "here" / "REPORT.html").read_bytes()


@pytest.mark.parametrize("code", [403, 404])
def test_a_record_that_the_service_refuses_is_not_taken_for_damaged(clips, bucket, server, monkeypatch, code):
    ingest(clips, "gs://bucket/data")
    source = ClipSource("gs://bucket/data")
    with monkeypatch.context() as patch:
        patch.setattr(server.RequestHandlerClass, "do_GET", lambda request: request.send_error(code))
        with pytest.raises(
            UserError, match=r"^gs://bucket/data cannot be opened \(Permanent error.*check the"
        ) as result:
            source[0]
    assert not isinstance(result.value, DecodeError)
    assert "\n" not in str(result.value)


def test_an_interrupted_copy_is_no_data_set_and_can_be_repeated(clips, tmp_path, bucket, monkeypatch):
    def interrupted(folder, destination, last):
        write_text(destination / "clips-train.array_record-00000-of-00007", "half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dit_video.data.ingest.engine.publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ingest(clips, "gs://bucket/data")
    assert not is_ingested("gs://bucket/data")
    with pytest.raises(UserError, match="not an ingested data set"):
        ClipSource("gs://bucket/data")
    ingest(clips, "gs://bucket/data")
    assert "bucket/data/clips-train.array_record-00000-of-00007" not in bucket
    assert len(ClipSource("gs://bucket/data")) == 3
    write_text(to_storage_path("gs://bucket/other/letter.txt"), "keep")
    with pytest.raises(UserError, match="not an ingested data set"):
        ingest(clips, "gs://bucket/other")


def test_beam_does_not_write_to_buckets(clips, bucket):
    with pytest.raises(UserError, match="all its machines share"):
        ingest(clips, "gs://bucket/data", beam=BeamOptions())


def test_beam_refuses_names_that_it_would_take_for_patterns(clips, tmp_path):
    with pytest.raises(UserError, match=r"data\[1\] contains one of"):
        ingest(clips, tmp_path / "data[1]", beam=BeamOptions())


def test_the_index_of_an_older_copy_is_removed_first(tmp_path, bucket, monkeypatch):
    (tmp_path / "made").mkdir()
    for name in ("a", INDEX, "z"):
        (tmp_path / "made" / name).write_text("new")
        write_text(to_storage_path("gs://bucket/data") / name, "old")
    destination, gone = to_storage_path("gs://bucket/data"), []
    unlink = type(destination).unlink
    monkeypatch.setattr(type(destination), "unlink", lambda path: (gone.append(path.name), unlink(path)))
    publish(tmp_path / "made", destination, INDEX)
    assert gone[0] == INDEX
    assert sorted(gone) == ["a", INDEX, "z"]
    assert {file.getvalue() for file in bucket.values()} == {b"new"}


def test_files_that_appeared_at_the_destination_meanwhile_are_kept(clips, bucket, monkeypatch):
    """Hours may pass between the first check of a bucket and the copy."""
    real = engine._write

    def slowly(*arguments):
        real(*arguments)
        write_text(to_storage_path("gs://bucket/data/letter.txt"), "keep")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_write", slowly)
        with pytest.raises(UserError, match="not an ingested data set"):
            ingest(clips, "gs://bucket/data")
    assert list(bucket) == ["bucket/data/letter.txt"]

    def overtaken(*arguments):
        real(*arguments)
        publish(arguments[0], to_storage_path("gs://bucket/other"), INDEX)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_write", overtaken)
        patch.setattr(engine, "publish", lambda *_: pytest.fail("the same is there already"))
        assert ingest(clips, "gs://bucket/other").usable == 3
    assert len(ClipSource("gs://bucket/other")) == 3


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

    def copied():
        return sorted(path.name for path in (tmp_path / "cache").rglob("*array_record*"))

    assert source[2] == (clips / "1.mp4").read_bytes()
    assert copied() == ["clips-test.array_record-00000-of-00001"]  # only what was read
    assert [source[0], source[1]] == [(clips / name).read_bytes() for name in ("0.mp4", "2.mp4")]
    assert pickle.loads(pickle.dumps(source))[2] == source[2]
    assert ClipSource(to_storage_path(folder), cache=tmp_path / "other").infos == source.infos
    assert write_ingest_report(folder).is_file()
    # Of another data set at the same address nothing is taken from the copies.
    to_storage_path(folder).rmdir(recursive=True)
    (clips / "0.mp4").unlink()
    (clips / "1.mp4").unlink()
    ingest(clips, folder)
    assert ClipSource(folder)[0] == (clips / "2.mp4").read_bytes()


def test_a_full_disk_for_the_local_copies_is_reported(clips, memory, monkeypatch):
    ingest(clips, f"{memory}/data")
    source = ClipSource(f"{memory}/data")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MemoryFileSystem, "get_file", full)
    with pytest.raises(UserError, match=r"cache/dit_video/memory/.* cannot be written \(No space left on device\)"):
        source[0]


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
        patch.setattr(MemoryFileSystem, "_open", refuse)
        with pytest.raises(UserError, match=refused):
            source[0]  # no damaged record
        with pytest.raises(UserError, match=refused):
            ClipSource(f"{memory}/data")
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "info", refuse)
        for use in (to_storage_path, ClipSource, is_ingested, LatentSource):
            with pytest.raises(UserError, match=refused):
                use(f"{memory}/data")
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "pipe_file", refuse)
        with pytest.raises(UserError, match=refused):
            write_text(to_storage_path(f"{memory}/page.html"), "text")


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with Journal(tmp_path / "work", ()), pytest.raises(UserError, match="another process is writing"):
        Journal(tmp_path / "work", ())
    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(UserError, match=r"work cannot be locked \(No locks available\); use a destination on"):
        Journal(tmp_path / "work", ())


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
