"""Ingest: kept and quarantined clips, written files, and ends on bad input."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dit_video.core.errors import MissingError, UserError
from dit_video.curation.screening import ScreeningConfig
from dit_video.data.clips import ClipSource
from dit_video.data.ingest import engine, parts
from dit_video.data.ingest.engine import IngestConfig, ingest
from dit_video.data.ingest.report import IngestReport
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


def list_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_ingest_keeps_bytes_captions_and_video_infos(clips, tmp_path):
    seen = []
    report = ingest(clips, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert (report.files, report.usable_files, report.usable, report.frames, report.uncaptioned) == (3, 3, 3, 8, 1)
    assert (report.quarantined, report.dropped, report.rejected, report.unlisted) == ((), (), (), ())
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    records = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")
    names = ["a.mp4", "sub/b.webm", "c.png"]
    assert [record["name"].decode() for record in records] == names
    assert [record["clip"] for record in records] == [(clips / name).read_bytes() for name in names]
    assert [info.captions for info in ClipSource(tmp_path / "out").infos] == [('a, "quoted" clip',), (), ("été",)]
    assert [(r["frames"], r["height"], r["width"], r["fps"], r["codec"]) for r in records] == [
        (5, 16, 24, 10, b"h264"),
        (2, 20, 24, 10, b"vp9"),
        (1, 16, 24, 1, b"png"),
    ]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["usable"] == 3
    assert IngestReport.read(tmp_path / "out") == report
    assert list_files(tmp_path) == ["clips", "out"]
    assert list_files(tmp_path / "out") == [
        "clips-train-00000.array_record",
        "columns",
        "dataset_info.json",
        "features.json",
        "index",
        "ingest",
        "report.json",
        "table.json",
    ]


def test_no_temporary_files_remain(clips, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))  # for the workers
    assert ingest(clips, tmp_path / "out").usable == 3
    assert list_files(tmp_path / "temporary") == []


def test_the_index_has_the_sizes_of_the_records(clips, tmp_path):
    ingest(clips, tmp_path / "out")
    info = tfds.builder_from_directory(tmp_path / "out").info
    files = list((tmp_path / "out").glob("*.array_record*"))
    assert info.dataset_size == sum(path.stat().st_size for path in files) > 500


def test_splits_of_the_source_are_kept(tmp_path):
    clips = tmp_path / "clips"
    (clips / "ucfTrainTestlist").mkdir(parents=True)
    for group in (1, 8, 9):
        write_clip(clips / "UCF-101" / "Archery" / f"v_Archery_g{group:02}_c01.avi.mp4", frames=group)
        (clips / "UCF-101" / "Archery" / f"v_Archery_g{group:02}_c01.avi.mp4").rename(
            clips / "UCF-101" / "Archery" / f"v_Archery_g{group:02}_c01.avi"
        )
    lists = clips / "ucfTrainTestlist"
    (lists / "classInd.txt").write_text("1 Archery\n")
    (lists / "trainlist01.txt").write_text("Archery/v_Archery_g08_c01.avi 1\nArchery/v_Archery_g09_c01.avi 1\n")
    (lists / "testlist01.txt").write_text("Archery/v_Archery_g01_c01.avi\n")
    report = ingest(clips, tmp_path / "out")
    assert report.splits == {"train": 2, "test": 1}
    made = tfds.builder_from_directory(tmp_path / "out")
    assert {name: [r["frames"] for r in made.as_data_source(name)] for name in made.info.splits} == {
        "train": [8, 9],
        "test": [1],
    }
    source = ClipSource(tmp_path / "out")
    assert [(info.split, info.frames, info.caption) for info in source.infos] == [
        ("train", 8, "archery"),
        ("train", 9, "archery"),
        ("test", 1, "archery"),
    ]
    for index, info in enumerate(source.infos):
        assert source[index] == next(clips.rglob(Path(info.name).name)).read_bytes()


def test_clips_that_screening_drops_are_counted(clips, tmp_path):
    (clips / "sub" / "b.webm").write_bytes(b"broken")
    config = IngestConfig(screening=ScreeningConfig(min_seconds=0.3))
    write_clip(clips / "short.mp4", frames=2)
    with (clips / "metadata.csv").open("a") as file:
        file.write("short.mp4,brief,\n")
    report = ingest(clips, tmp_path / "out", config=config)
    assert (report.files, report.usable_files, report.usable) == (4, 2, 2)
    assert report.dropped_files == ("short.mp4",)
    assert [name for name, _ in report.dropped] == ["short.mp4"]
    assert [name for name, _ in report.quarantined] == ["sub/b.webm"]
    assert sum(report.reasons["dropped"].values()) == sum(report.reasons["quarantined"].values()) == 1
    assert report.settings["screening"]["min_seconds"] == 0.3
    with pytest.raises(UserError, match="its screening differ"):
        ingest(clips, tmp_path / "out")


def test_near_duplicates_are_found_among_all_files(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (1, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    for name, height in (("a.png", 64), ("b.png", 48), ("c.png", 64)):
        picture = frames[:, :height] if name != "c.png" else frames[:, ::-1]
        (tmp_path / "clips").mkdir(exist_ok=True)
        Clip(frames=np.ascontiguousarray(picture), fps=1).save(tmp_path / "clips" / name)
    (tmp_path / "clips" / "b.png").write_bytes((tmp_path / "clips" / "a.png").read_bytes())
    report = ingest(tmp_path / "clips", tmp_path / "out", config=IngestConfig(screening=ScreeningConfig(duplicates=2)))
    assert [info.name for info in ClipSource(tmp_path / "out").infos] == ["a.png", "c.png"]
    assert report.dropped == (("b.png", "shows what 'a.png' shows"),)
    assert report.dropped_files == ("b.png",)


def test_same_source_is_reused_and_another_refused(clips, tmp_path, monkeypatch):
    first = ingest(clips, tmp_path / "out")
    assert not first.reused
    with monkeypatch.context() as patch:
        patch.setattr(engine, "Workers", lambda *_: pytest.fail("decoded again"))
        again = ingest(clips, tmp_path / "out")
    assert again == dataclasses.replace(first, reused=True)
    write_clip(tmp_path / "others" / "z.mp4")
    before = read_files(tmp_path / "out")
    with pytest.raises(UserError, match="another data set, without any file of this source"):
        ingest(tmp_path / "others", tmp_path / "out")
    write_clip(clips / "new.mp4")
    (clips / "metadata.csv").unlink()
    with pytest.raises(UserError, match=r"made of other files than the source has now: 1 added, such as new\.mp4"):
        ingest(clips, tmp_path / "out", is_fixed=True)
    assert read_files(tmp_path / "out") == before
    (tmp_path / "other").mkdir()
    assert ingest(clips, tmp_path / "other").usable == 4  # an empty folder may be filled
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("keep")
    with pytest.raises(UserError, match="not an ingested data set"):
        ingest(clips, tmp_path / "home")
    assert list_files(tmp_path / "home") == ["letter.txt"]


def test_settings_may_change_until_a_part_is_written(clips, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(clips, tmp_path / "out", progress=stop)
    write_clip(tmp_path / "others" / "z.mp4")
    config = IngestConfig(screening=ScreeningConfig(min_size=9))
    assert ingest(tmp_path / "others", tmp_path / "out", config=config).usable_files == 1
    assert [info.name for info in ClipSource(tmp_path / "out").infos] == ["z.mp4"]


def test_an_interrupted_run_leaves_its_parts(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_MIN_PART_BYTES", 1)
    seen = []

    def interrupt(done, total):
        seen.append((done, total))
        if seen[-1] == (2, 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(clips, tmp_path / "out", progress=interrupt, workers=1)
    assert list_files(tmp_path / "out") == ["clips-train-00000.array_record", "index", "ingest"]
    with pytest.raises(UserError, match="it is not finished"):
        ClipSource(tmp_path / "out")
    ingest(clips, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (0, 2), (1, 2), (2, 2)]
    ingest(clips, tmp_path / "undisturbed")
    assert read_files(tmp_path / "out") == read_files(tmp_path / "undisturbed")


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_parts_keep_the_order(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_MIN_PART_BYTES", 1)
    (clips / "sub" / "b.webm").write_bytes(b"broken")
    ingest(clips, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.array_record"))) == 3
    source = ClipSource(tmp_path / "out")
    assert [source[i] for i in range(2)] == [(clips / name).read_bytes() for name in ("a.mp4", "c.png")]
    # TFDS reads them too, the part without a clip included.
    records = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")
    assert [record["name"].decode() for record in records] == ["a.mp4", "c.png"]


def test_many_clips_are_written_without_tensorflow(tmp_path, monkeypatch):
    """TFDS would hold all examples, or references to them, and beyond a limit write them with TensorFlow."""
    from tensorflow_datasets.core import shuffle

    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1000)
    for index in range(5):
        frames = np.random.default_rng(index).integers(0, 255, (1, 60, 60, 3), np.uint8)
        (tmp_path / "clips").mkdir(exist_ok=True)
        Clip(frames=frames, fps=1).save(tmp_path / "clips" / f"{index}.png")
    assert ingest(tmp_path / "clips", tmp_path / "out").usable == 5
    assert len(tfds.builder_from_directory(tmp_path / "out").as_data_source("train")) == 5


@pytest.mark.parametrize("how", ["changed", pytest.param("removed", marks=pytest.mark.nightly)])
def test_a_clip_that_changes_after_its_inspection_is_left_for_a_retry(clips, tmp_path, how):
    content = (clips / "c.png").read_bytes()

    def change(done, total):
        if done == total and how == "changed":
            (clips / "c.png").write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
        elif done == total:
            (clips / "c.png").unlink()

    report = ingest(clips, tmp_path / "out", progress=change)
    assert report.quarantined == (("c.png", "has changed since it was inspected; do not modify the source"),)
    assert report.passing == ("c.png",)
    assert [info.name for info in ClipSource(tmp_path / "out").infos] == ["a.mp4", "sub/b.webm"]
    (clips / "c.png").write_bytes(content)
    assert ingest(clips, tmp_path / "out", retry=True).usable == 3
    ingest(clips, tmp_path / "undisturbed")
    assert read_files(tmp_path / "out") == read_files(tmp_path / "undisturbed")


def test_numbers_below_one_are_refused(clips, tmp_path):
    with pytest.raises(UserError, match="workers=0"):
        ingest(clips, tmp_path / "out", workers=0)
    with pytest.raises(UserError, match="time_limit"):
        IngestConfig(time_limit=0)


def test_missing_sources_and_unusable_destinations_are_refused(clips, tmp_path):
    with pytest.raises(MissingError, match="no such folder"):
        ingest(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        ingest(clips, tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        ingest(clips, tmp_path / "file" / "out")


@pytest.mark.slow
def test_the_command_ingests_a_folder(clips, tmp_path, script):
    command = [sys.executable, str(REPOSITORY / "tools" / "ingest.py"), str(clips), str(tmp_path / "out")]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 clips, 8 frames" in done.stdout
    assert (tmp_path / "out" / "REPORT.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "reading clips 3/3 (100%)" in done.stderr
    again = script("tools/ingest.py", clips, tmp_path / "out")
    assert "was there already" in again.out
    done = script("tools/ingest.py", clips, tmp_path / "few", "--screening.min-seconds", "0.3", "--workers", "1")
    assert done.code == 0, done.err
    assert "skipped: sub/b.webm:" in done.out
    done = script("tools/ingest.py", tmp_path / "nowhere", tmp_path / "new")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("error: no such folder")
    assert "Traceback" not in done.err
    assert not (tmp_path / "new").exists()


def test_the_command_reads_a_list_with_columns_of_any_name(tmp_path, script):
    source = tmp_path / "source"
    write_clip(source / "clips" / "a.mp4")
    write_clip(source / "clips" / "b.mp4")
    (source / "mira.csv").write_text("clip,dense,part\nclips/a.mp4,A red ball.,train\nclips/b.mp4,A cat.,test\n")
    (source / "other.csv").write_text("clip,dense,part\nclips/a.mp4,Wrong.,train\n")
    columns = ("--columns.name", "clip", "--columns.captions", "dense", "--columns.split", "part")
    done = script("tools/ingest.py", source, tmp_path / "out", "--list-path", "mira.csv", *columns)
    assert done.code == 0, done.err
    infos = ClipSource(tmp_path / "out").infos
    assert [(info.split, info.captions) for info in infos] == [("train", ("A red ball.",)), ("test", ("A cat.",))]
    builder = tfds.builder_from_directory(tmp_path / "out")
    names = {
        split: [record["name"].decode() for record in builder.as_data_source(split)] for split in ("train", "test")
    }
    assert names == {"train": ["clips/a.mp4"], "test": ["clips/b.mp4"]}


def test_the_command_explains_that_beam_is_missing(clips, tmp_path, script, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    ended = script("tools/ingest.py", clips, tmp_path / "out", "--beam=--runner=DirectRunner")
    assert ended.code == 2
    assert "Apache Beam, which is not installed; use pip install -e '.[beam]' in a separate environment\n" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real clips beside the checkout")
def test_real_clips_are_ingested(tmp_path):
    report = ingest(SHARED, tmp_path / "out")
    assert report.usable == 21
    assert report.quarantined == ()
    info = {info.name: info for info in ClipSource(tmp_path / "out").infos}["rabbit320.mp4"]
    assert (info.frames, info.height, info.width, info.fps) == (234, 240, 320, 30)
