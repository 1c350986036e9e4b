"""A source that has grown or changed is ingested into the same folder: files that are new are read, and no others."""

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dit_video.core.errors import UserError
from dit_video.curation.screening import ScreeningConfig
from dit_video.data.clips import ClipSource
from dit_video.data.ingest import workers
from dit_video.data.ingest.engine import IngestConfig, ingest
from dit_video.data.tables import Table, write_column
from dit_video.video import Clip
from support.devices import PROGRAMS


def write_clips(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        frames = np.random.default_rng([*name.encode()]).integers(0, 255, (6, 32, 32, 3), np.uint8)
        Clip(frames=frames, fps=10).save(folder / name)
    return folder


@pytest.fixture
def clips(tmp_path):
    return write_clips(tmp_path / "clips", "a.mp4", "b.mp4", "test/c.mp4")


@pytest.fixture
def list_inspected(tmp_path, monkeypatch):
    """Return a function that lists the files that were inspected since it was called last."""
    (tmp_path / "log").mkdir()
    monkeypatch.setenv("DIT_VIDEO_TEST_LOG", str(tmp_path / "log"))
    monkeypatch.syspath_prepend(PROGRAMS)
    monkeypatch.setattr(workers, "MODULE", "interrupted_worker")
    log = tmp_path / "log" / "inspected"
    log.touch()

    def list_names() -> list[str]:
        names = log.read_text().split()
        log.write_text("")
        return names

    return list_names


def read_records(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in [*folder.glob("*.array_record"), *folder.glob("index/*")]}


def list_captions(folder: Path) -> dict[str, tuple[str, ...]]:
    return {info.name: info.captions for info in ClipSource(folder).infos}


def test_new_and_changed_captions_are_read_without_the_clips(clips, tmp_path, list_inspected):
    (clips / "a.txt").write_text("a cat")
    out = tmp_path / "out"
    first = ingest(clips, out)
    before, versions, payloads = read_records(out), ClipSource(out).versions, ClipSource(out).column("payload")
    assert list_inspected() == ["a.mp4", "b.mp4", "test/c.mp4"]
    (clips / "a.txt").write_text("a black cat")
    (clips / "b.txt").write_text("a dog")
    report = ingest(clips, out)
    assert list_inspected() == []
    assert list_captions(out) == {"a.mp4": ("a black cat",), "b.mp4": ("a dog",), "test/c.mp4": ()}
    assert (first.uncaptioned, report.uncaptioned, report.reused) == (2, 1, False)
    assert read_records(out) == before
    assert ClipSource(out).versions != versions
    assert ClipSource(out).column("payload") == payloads
    assert ingest(clips, out).reused


def test_a_new_clip_alone_is_read(clips, tmp_path, list_inspected):
    out = tmp_path / "out"
    ingest(clips, out)
    write_column(out, "score", {"name": ["a.mp4", "b.mp4"], "score": [1.0, 2.0]})
    before, ids = read_records(out), dict(zip(list_captions(out), ClipSource(out).column("id"), strict=True))
    list_inspected()
    write_clips(clips, "aa.mp4", "test/d.mp4")
    (clips / "broken.mp4").write_bytes(b"broken")
    report = ingest(clips, out)
    assert list_inspected() == ["aa.mp4", "broken.mp4", "test/d.mp4"]
    assert (report.usable, report.files, report.splits) == (5, 6, {"train": 3, "test": 2})
    source = ClipSource(out)
    names = ["a.mp4", "b.mp4", "aa.mp4", "test/c.mp4", "test/d.mp4"]
    assert [info.name for info in source.infos] == names
    assert [source[index] for index in range(5)] == [(clips / name).read_bytes() for name in names]
    assert {path: content for path, content in read_records(out).items() if path in before} == before
    assert ids.items() <= dict(zip(names, source.column("id"), strict=True)).items()
    np.testing.assert_array_equal(source.column("score"), [1, 2, np.nan, np.nan, np.nan])
    builder = tfds.builder_from_directory(out)
    records = {
        split: [record["name"].decode() for record in builder.as_data_source(split)] for split in builder.info.splits
    }
    assert records == {"train": names[:3], "test": names[3:]}


def test_the_clip_of_a_removed_file_is_not_used_any_more(clips, tmp_path, list_inspected):
    (clips / "b.txt").write_text("a dog")
    out = tmp_path / "out"
    ingest(clips, out)
    before = read_records(out)
    list_inspected()
    (clips / "b.mp4").rename(tmp_path / "b.mp4")
    (clips / "b.txt").unlink()
    report = ingest(clips, out)
    assert [info.name for info in ClipSource(out).infos] == ["a.mp4", "test/c.mp4"]
    assert (report.files, report.usable, report.quarantined, report.dropped) == (2, 2, (), ())
    assert read_records(out) == before
    table = Table(out)
    assert table["why"].to_pylist() == ["", "is no longer in the source", ""]
    (tmp_path / "b.mp4").rename(clips / "b.mp4")
    assert ingest(clips, out).usable == 3
    assert list_inspected() == []
    assert list_captions(out) == {"a.mp4": (), "b.mp4": (), "test/c.mp4": ()}


@pytest.mark.nightly
def test_a_file_of_another_size_is_another_file(clips, tmp_path, list_inspected):
    out = tmp_path / "out"
    ingest(clips, out)
    list_inspected()
    write_clips(tmp_path / "others", "another.mp4")
    shutil.copy(tmp_path / "others" / "another.mp4", clips / "b.mp4")
    with (clips / "b.mp4").open("ab") as file:
        file.write(bytes(8))
    report = ingest(clips, out)
    assert list_inspected() == ["b.mp4"]
    assert (report.files, report.usable) == (3, 3)
    source = ClipSource(out)
    assert [info.name for info in source.infos] == ["a.mp4", "b.mp4", "test/c.mp4"]
    assert source[1] == (clips / "b.mp4").read_bytes()


@pytest.mark.nightly
def test_a_source_that_was_moved_is_the_same(clips, tmp_path, list_inspected):
    out = tmp_path / "out"

    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(clips, out, progress=stop, workers=1)
    list_inspected()
    clips.rename(tmp_path / "moved")
    report = ingest(tmp_path / "moved", out)
    assert (report.usable, report.quarantined) == (3, ())
    assert list_inspected() == ["a.mp4", "b.mp4", "test/c.mp4"]
    (tmp_path / "moved").rename(clips)
    assert ingest(clips, out).reused
    assert list_inspected() == []


def test_a_near_duplicate_of_an_older_clip_is_found(clips, tmp_path):
    out, config = tmp_path / "out", IngestConfig(screening=ScreeningConfig(duplicates=2))
    ingest(clips, out, config=config)
    shutil.copy(clips / "b.mp4", clips / "again.mp4")
    report = ingest(clips, out, config=config)
    assert report.dropped == (("again.mp4", "shows what 'b.mp4' shows"),)
    assert report.accounts["duplicate"] == {"parts": 1, "microseconds": 600_000}
    (clips / "b.mp4").unlink()
    assert ingest(clips, out, config=config).dropped == ()
    assert [info.name for info in ClipSource(out).infos] == ["a.mp4", "again.mp4", "test/c.mp4"]


def repaint(path: Path, value: int) -> bytes:
    """Change a picture, but neither its name nor its size, and return its bytes."""
    content = bytearray(path.read_bytes())
    content[-3000:] = bytes([value]) * 3000
    path.write_bytes(content)
    return bytes(content)


@pytest.fixture
def pictures(tmp_path):
    """Return a folder of pictures whose files have one size, whatever they show."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, name in enumerate(("a.bmp", "b.bmp")):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def test_an_edited_file_of_the_same_name_and_size_takes_the_place_of_the_old_one(pictures, tmp_path, list_inspected):
    """Also a second time, as it was at first, and with all others."""
    out = tmp_path / "out"
    ingest(pictures, out)
    original, ids = (pictures / "b.bmp").read_bytes(), []
    list_inspected()
    for content, inspected in ((100, ["b.bmp"]), (200, ["b.bmp"]), (original, []), (100, []), (50, ["b.bmp"])):
        expected = content if isinstance(content, bytes) else repaint(pictures / "b.bmp", content)
        (pictures / "b.bmp").write_bytes(expected)
        report = ingest(pictures, out)
        assert (list_inspected(), report.usable, report.reused) == (inspected, 2, False)
        source = ClipSource(out)
        assert [info.name for info in source.infos] == ["a.bmp", "b.bmp"]
        assert source[1] == expected
        ids.append(source.column("id")[1])
        assert ingest(pictures, out).reused
    assert len(set(ids)) == 4
    assert ids[0] == ids[3]
    for number, name in enumerate(("a.bmp", "b.bmp")):  # all of them
        repaint(pictures / name, number)
    assert (ingest(pictures, out).usable, list_inspected()) == (2, ["a.bmp", "b.bmp"])
    assert ClipSource(out)[0] == (pictures / "a.bmp").read_bytes()
    repaint(pictures / "a.bmp", 7)
    with pytest.raises(UserError, match=r"was made of other files than the source has now: 1 changed, such as a\.bmp"):
        ingest(pictures, out, is_fixed=True)


def test_a_file_whose_time_alone_has_changed_is_the_same(pictures, tmp_path, list_inspected):
    out = tmp_path / "out"
    ingest(pictures, out)
    list_inspected()
    before = read_records(out)
    os.utime(pictures / "a.bmp", (1, 1))
    report = ingest(pictures, out, is_fixed=True)
    assert (list_inspected(), report.reused, read_records(out)) == ([], True, before)
    moved = shutil.copytree(pictures, tmp_path / "moved", copy_function=shutil.copyfile)  # with other times
    assert (ingest(moved, out).reused, list_inspected()) == (True, [])


def test_a_data_set_of_an_older_version_is_completed_and_then_knows_its_files(pictures, tmp_path, list_inspected):
    """Without times of change and contents; files that changed before the update are not known to have."""
    out = tmp_path / "out"
    ingest(pictures, out)
    (out / "ingest" / "times.parquet").unlink()
    for path in (out / "ingest").glob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns("content"), path)
    list_inspected()
    report = ingest(pictures, out, is_fixed=True)
    assert (report.usable, list_inspected()) == (2, [])
    expected = repaint(pictures / "b.bmp", 9)
    ingest(pictures, out)
    assert (list_inspected(), ClipSource(out)[1]) == (["b.bmp"], expected)
