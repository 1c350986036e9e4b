"""Files of a source are grouped into parts, and each part is read by itself."""

from dataclasses import asdict

import pyarrow.parquet as pq
import pytest

from dit_video.core.errors import UserError
from dit_video.curation.screening import ScreeningConfig
from dit_video.data import tables
from dit_video.data.ingest import parts
from dit_video.data.ingest.formats import ListedClip, Listing
from dit_video.data.ingest.screening import Screening


def test_parts_are_neither_too_many_nor_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_MAX_PART_FILES", 100)

    def list_parts(*sizes: int) -> list[int]:
        clips = tuple(ListedClip(f"{n:04}", (), size, f"/{n}", None, "train") for n, size in enumerate(sizes))
        folder = parts.IngestFolder(tmp_path / str(len(list(tmp_path.iterdir()))), {})
        folder.update(Listing(clips))
        members = [folder.read_clips(part) for part in folder.parts]
        assert [clip.name for part in members for clip in part] == [clip.name for clip in clips]
        assert folder.count_clips(folder.parts[1:]) == len(clips) - len(members[0])
        return [len(part) for part in members]

    megabyte = 1 << 20
    assert list_parts(*[megabyte] * 40) == [16, 16, 8]  # at least 16 MiB each, if there are so many
    assert list_parts(*[100 * megabyte] * 128) == [2] * 64  # 64 parts
    assert list_parts(*[3 << 30] * 2, 1, 1, 3 << 30) == [1, 1, 2, 1]  # at most 1 GiB each, or one file
    assert list_parts(*[1] * 250) == [100, 100, 50]


def test_a_part_is_found_in_a_long_list(tmp_path, monkeypatch):
    """Only the rows around it are read."""
    monkeypatch.setattr(parts, "_MAX_PART_FILES", 3)
    monkeypatch.setattr(tables, "BATCH_ROWS", 4)
    clips = tuple(ListedClip(f"{n:04}", (), 1, f"/{n}", None, "train") for n in range(20))
    folder = parts.IngestFolder(tmp_path, {})
    folder.update(Listing(clips))
    assert pq.ParquetFile(tmp_path / "ingest" / "parts-000.parquet").num_row_groups == 5
    assert [clip for part in folder.parts for clip in folder.read_clips(part)] == list(clips)
    with pytest.raises(KeyError):
        folder.read_clips("train-00007")


def test_settings_are_those_of_the_first_part(tmp_path):
    assert parts.IngestFolder(tmp_path, {"a": 1, "b": 1}).settings == {"a": 1, "b": 1}
    parts.IngestFolder(tmp_path, {"a": 1, "b": 2})
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "train-00000.parquet").touch()
    with pytest.raises(UserError, match=r"another data set: its a, c differ\. Use another folder"):
        parts.IngestFolder(tmp_path, {"a": 2, "b": 2, "c": 0})


def test_a_screening_without_steps_is_equal_to_none(tmp_path):
    none, idle, active = (
        {"screening": asdict(screening)}
        for screening in (Screening(), ScreeningConfig(), ScreeningConfig(duplicates=0))
    )
    for number, written in enumerate((none, idle, active)):
        folder = tmp_path / str(number)
        parts.IngestFolder(folder, written)
        (folder / "index").mkdir()
        (folder / "index" / "train-00000.parquet").touch()
        for settings in (none, idle, active):
            if (settings is active) == (written is active):
                assert parts.IngestFolder(folder, settings).settings == written
                continue
            with pytest.raises(UserError, match="its screening differ"):
                parts.IngestFolder(folder, settings)


def test_processes_that_plan_at_the_same_moment_plan_the_same_parts(tmp_path, monkeypatch):
    clips = (ListedClip(f"{n}.mp4", (), 20 << 20, f"/source/{n}.mp4", None, "train") for n in range(4))
    listing = Listing(tuple(clips))
    first, second = (parts.IngestFolder(tmp_path, {}) for _ in range(2))
    plan = parts.IngestFolder._plan

    def plan_late(*arguments):
        monkeypatch.setattr(parts.IngestFolder, "_plan", staticmethod(plan))
        first.update(listing)
        return plan(*arguments)

    monkeypatch.setattr(parts.IngestFolder, "_plan", staticmethod(plan_late))
    second.update(listing)
    assert first.parts == second.parts == [f"train-{number:05d}" for number in range(4)]
    assert [len(first.read_clips(part)) for part in first.parts] == [1] * 4
