"""The script that exports a data set: what it says, writes and refuses."""

import json

import pytest

from dit_video.curation.export import stored_clips
from dit_video.data.tables import write_column
from support.clip_tables import MemoryClips, make_clip_file, make_row, write_table


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Return a data set of three clips, which the script opens by the folder's name."""
    files = [make_clip_file(number) for number in range(3)]
    names = ("train/a.mp4", "train/b.mp4", "test/c.mp4")
    rows = [
        make_row(name, file, motion=float(number), split=name.split("/")[0], captions=[f"clip {number}"])
        for number, (name, file) in enumerate(zip(names, files, strict=True))
    ]
    write_table(tmp_path / "my clips", rows)
    monkeypatch.setattr(stored_clips, "open_clips", lambda folder: MemoryClips(folder, files.__getitem__))
    return tmp_path / "my clips"


def test_it_exports_what_is_selected_and_says_how_much(script, data, tmp_path):
    options = ("--where", "motion >= 1", "--license", "cc0-1.0", "--to", "videofolder")
    ended = script("tools/export_data.py", data, tmp_path / "out", *options)
    assert ended.code == 0, ended.err
    assert "2 clips" in ended.out
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.mp4")) == ["b.mp4", "c.mp4"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'pretty_name: "my clips"' in card
    assert 'license: "cc0-1.0"' in card


def test_splits_and_formats_are_options(script, data, tmp_path):
    ended = script("tools/export_data.py", data, tmp_path / "out", "--to", "webdataset", "--splits", "test")
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in (tmp_path / "out" / "index.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == ["test/00000.tar/test/c.mp4"]


def test_columns_of_captions_and_vectors_are_options(script, data, tmp_path):
    names = ["train/a.mp4", "train/b.mp4", "test/c.mp4"]
    values = {"captions_long": ["a long one", None, None], "embedding": [[0.5] * 64] * 3}
    write_column(data, "models", {"name": names, **values})
    options = ("--to", "webdataset", "--captions", "captions_long", "--vectors", "embedding")
    ended = script("tools/export_data.py", data, tmp_path / "out", *options)
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in (tmp_path / "out" / "index.jsonl").read_text().splitlines()]
    assert [row["captions"] for row in rows] == [["a long one"], [], []]
    assert rows[0]["embedding"] == [0.5] * 64


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--captions", "nothing"), "captions=nothing"),
        (("--vectors", "nothing"), "vectors=nothing"),
        (("--to", "parquet"), "('videofolder', 'webdataset', 'csv')"),
        (("--where", "motion >"), "not an expression"),
        (("--where", "motion > 9"), "selects no clip"),
        (("--splits", "dev"), "splits=dev"),
    ],
)
def test_wrong_options_are_refused_and_nothing_is_written(script, data, tmp_path, options, text):
    ended = script("tools/export_data.py", data, tmp_path / "out", *options)
    assert ended.code != 0
    assert text in ended.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_data_set_is_refused(script, tmp_path):
    ended = script("tools/export_data.py", tmp_path, tmp_path / "out")
    assert ended.code != 0
    assert "table.json" in ended.err
