"""Ingest: what it keeps, what it sets aside, and how it ends on bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dit_video.data.ingest import IngestReport, engine, ingest, list_clips
from dit_video.data.ingest.engine import shard_of
from dit_video.data.source import ClipSource
from dit_video.errors import MissingError, UserError
from dit_video.video import Clip

REPOSITORY = Path(__file__).parents[3]
SHARED = REPOSITORY.parent / "shared" / "clips"


def write_clip(path: Path, frames: int = 3, height: int = 16, width: int = 24, value: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Clip(frames=np.full((frames, height, width, 3), value, np.uint8), fps=10).save(path)


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    write_clip(folder / "a.mp4", frames=5)
    write_clip(folder / "sub" / "b.webm", frames=2, height=20)
    write_clip(folder / "c.png", frames=1)
    (folder / "metadata.csv").write_text(
        'file_name,text,licence\na.mp4,"a, ""quoted"" clip",x\nsub/b.webm,,\nc.png,été,y\n'
    )
    return folder


def test_keeps_bytes_captions_and_facts(clips, tmp_path):
    seen = []
    report = ingest(clips, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert report == IngestReport(usable=3, quarantined=(), uncaptioned=1, unlisted=(), frames=8)
    assert seen[0] == (0, 3)
    assert seen[-1] == (3, 3)
    records = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")
    names = ["a.mp4", "sub/b.webm", "c.png"]
    assert [record["name"].decode() for record in records] == names
    assert [record["clip"] for record in records] == [(clips / name).read_bytes() for name in names]
    assert [[text.decode() for text in record["captions"]] for record in records] == [['a, "quoted" clip'], [], ["été"]]
    assert [(r["frames"], r["height"], r["width"], r["fps"]) for r in records] == [
        (5, 16, 24, 10),
        (2, 20, 24, 10),
        (1, 16, 24, 1),
    ]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["usable"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "out"]


def test_damaged_clips_are_set_aside(clips, tmp_path):
    (clips / "a.mp4").write_bytes((clips / "a.mp4").read_bytes()[:200])
    (clips / "c.png").write_bytes(b"")
    report = ingest(clips, tmp_path / "out")
    assert report.usable == 1
    assert [name for name, _ in report.quarantined] == ["a.mp4", "c.png"]
    assert all(reason for _, reason in report.quarantined)
    assert len(ClipSource(tmp_path / "out")) == 1
    assert ingest(clips, tmp_path / "out").quarantined == report.quarantined


def test_no_usable_clip(clips, tmp_path):
    for name in ("a.mp4", "sub/b.webm", "c.png"):
        (clips / name).write_bytes(b"broken")
    with pytest.raises(UserError, match=r"none of the 3 clips .* a\.mp4"):
        ingest(clips, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]


def test_same_source_is_reused_and_another_refused(clips, tmp_path, monkeypatch):
    first = ingest(clips, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "probe", lambda encoded: pytest.fail("decoded again"))
        again = ingest(clips, tmp_path / "out")
    assert again.reused
    assert again.frames == first.frames
    metadata = clips / "metadata.csv"
    metadata.write_text(metadata.read_text().replace("été", "winter"))
    with pytest.raises(UserError, match="another data set"):
        ingest(clips, tmp_path / "out")
    (tmp_path / "other").mkdir()
    assert ingest(clips, tmp_path / "other").usable == 3  # an empty folder may be filled
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("keep")
    with pytest.raises(UserError, match="not an ingested data set"):
        ingest(clips, tmp_path / "home")
    assert (tmp_path / "home" / "letter.txt").read_text() == "keep"


def test_interrupted_leaves_nothing(clips, tmp_path):
    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(clips, tmp_path / "out", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]


def test_shards_keep_the_order(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "SHARD_BYTES", 1)
    (clips / "sub" / "b.webm").write_bytes(b"broken")  # a shard that stays empty
    assert shard_of(list_clips(clips)[0]) == [0, 1, 2]
    ingest(clips, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.array_record*"))) == 3
    source = ClipSource(tmp_path / "out")
    assert [source[i] for i in range(2)] == [(clips / name).read_bytes() for name in ("a.mp4", "c.png")]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("file_name,title\na.mp4,x\n", "no column text"),
        ("", "no column file_name and text"),
        ("file_name,text\na.mp4,x\nm1.mp4,x\nm2.mp4,x\nm3.mp4,x\nm4.mp4,x\n", r"4 of them do not exist \(m1\.mp4.*…\)"),
        ("file_name,text\n../a.mp4,x\n", "outside the folder"),
        ("file_name,text\n,x\n", "line 2: file_name is empty"),
        ("file_name,text\n", "holds no clips"),
    ],
)
def test_metadata_mistakes(clips, tmp_path, metadata, message):
    (clips / "metadata.csv").write_text(metadata)
    with pytest.raises(UserError, match=message):
        ingest(clips, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_not_utf8(clips, tmp_path):
    (clips / "metadata.csv").write_bytes("file_name,text\na.mp4,été\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        ingest(clips, tmp_path / "out")


def test_utf8_with_byte_order_mark(clips, tmp_path):
    (clips / "metadata.csv").write_text("file_name,text\na.mp4,x\n", encoding="utf-8-sig")
    report = ingest(clips, tmp_path / "out")
    assert report.usable == 1
    assert report.unlisted == ("c.png", "sub/b.webm")


def test_no_folder_or_an_empty_one(tmp_path):
    with pytest.raises(MissingError, match="no such folder"):
        ingest(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no clips"):
        ingest(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        ingest(tmp_path / "file", tmp_path / "out")


def test_command(clips, tmp_path):
    command = [sys.executable, str(REPOSITORY / "tools" / "ingest.py")]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "", "JAX_PLATFORMS": "cpu"}
    arguments = [str(clips), str(tmp_path / "out")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 clips, 8 frames" in done.stdout
    arguments = [str(tmp_path / "nowhere"), str(tmp_path / "new")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: no such folder")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real clips beside the checkout")
def test_real_clips(tmp_path):
    report = ingest(SHARED, tmp_path / "out")
    assert report.usable == 21
    assert report.quarantined == ()
    info = {info.name: info for info in ClipSource(tmp_path / "out").infos}["rabbit320.mp4"]
    assert (info.frames, info.height, info.width, info.fps) == (234, 240, 320, 30)
