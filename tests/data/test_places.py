"""Data sets in buckets: fsspec's memory for the files, and a server here for what ArrayRecord itself reads."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import fsspec
import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from dit_video.data.builder import Beam
from dit_video.data.ingest import ingest
from dit_video.data.places import place, read_document
from dit_video.data.source import ClipSource, is_ingested
from dit_video.errors import MissingError, UserError
from dit_video.reports.ingest_report import write_ingest_report
from dit_video.video import Clip


class Memory(MemoryFileSystem):
    """Of its own: `gs://bucket/x` is `/bucket/x`."""

    protocol = ("gs", "gcs")
    store = {}  # noqa: RUF012  # fsspec's
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").removeprefix("gcs://").strip("/") if str(path).strip("/") else ""


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    monkeypatch.setattr(
        type(backend.fsspec_backend),
        "_get_filesystem",
        lambda self, name: Memory() if name == "gcs" else fsspec.filesystem(name),
    )
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    Memory.store.clear()
    Memory.pseudo_dirs[:] = [""]
    return Memory.store


@pytest.fixture
def server(bucket, monkeypatch):
    """Google Cloud Storage's way to read a part of an object."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = unquote(self.path.split("?")[0])  # /…/b/bucket/o/data/…
            key = next((key for key in bucket if name.endswith(key.replace("/bucket/", "/b/bucket/o/"))), None)
            if key is None:
                self.send_error(404)
                return
            data = bucket[key].getvalue()
            first, last = 0, len(data) - 1
            if wanted := self.headers.get("Range"):
                low, _, high = wanted.removeprefix("bytes=").partition("-")
                first = int(low) if low else max(0, len(data) - int(high))
                last = min(last, int(high)) if low and high else last
            self.send_response(206 if wanted else 200)
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


def test_a_data_set_in_a_bucket(clips, tmp_path, bucket, server):
    report = ingest(clips, "gs://bucket/data")
    ingest(clips, tmp_path / "here")
    assert {name.removeprefix("/bucket/data/"): file.getvalue() for name, file in bucket.items()} == {
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
    assert bucket["/bucket/data/REPORT.html"].getvalue() == (tmp_path / "here" / "REPORT.html").read_bytes()


def test_a_copy_that_is_interrupted(clips, tmp_path, bucket, monkeypatch):
    def interrupted(folder, destination, last):
        (destination / "clips-train.array_record-00000-of-00007").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dit_video.data.ingest.engine.publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ingest(clips, "gs://bucket/data")
    assert not is_ingested("gs://bucket/data")
    with pytest.raises(UserError, match="not an ingested data set"):
        ClipSource("gs://bucket/data")
    ingest(clips, "gs://bucket/data")
    assert "/bucket/data/clips-train.array_record-00000-of-00007" not in bucket
    assert len(ClipSource("gs://bucket/data")) == 3
    (place("gs://bucket/other") / "letter.txt").write_text("keep")
    with pytest.raises(UserError, match="not an ingested data set"):
        ingest(clips, "gs://bucket/other")


def test_beam_does_not_write_to_buckets(clips, bucket):
    with pytest.raises(UserError, match="all its machines share"):
        ingest(clips, "gs://bucket/data", beam=Beam())


def test_places_that_cannot_be_opened(tmp_path, bucket):
    with pytest.raises(UserError, match=r"^ftp://x/y cannot be opened \(.*\); install"):
        place("ftp://x/y")
    assert place(tmp_path) == tmp_path
    with pytest.raises(MissingError, match="no such file: gs://bucket/none"):
        read_document(place("gs://bucket/none"))
    (place("gs://bucket") / "broken").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_document(place("gs://bucket/broken"))
    with pytest.raises(MissingError, match="no such data set"):
        ClipSource("gs://bucket/nowhere")
