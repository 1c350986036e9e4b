"""Random access to ingested clips, and their selection by name, split and columns."""

import pickle
import shutil
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dit_video.core.errors import DecodeError, MissingError, UserError
from dit_video.data.clips import ClipSource, is_ingested
from dit_video.data.ingest.engine import ingest
from dit_video.data.tables import write_column
from dit_video.video import Clip, decode
from support.clip_tables import make_large_table, make_row, write_table


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    (root / "clips").mkdir()
    for index in range(4):
        frames = np.full((index + 1, 16, 16, 3), 60 * index, np.uint8)
        Clip(frames=frames, fps=8).save(root / "clips" / f"{index}.mp4")
        (root / "clips" / f"{index}.txt").write_text(f"clip {index}")
    ingest(root / "clips", root / "data")
    return root


def test_a_source_has_infos_and_bytes(dataset):
    assert [is_ingested(dataset / name) for name in ("data", "clips")] == [True, False]
    source = ClipSource(dataset / "data")
    assert len(source) == 4
    assert [(info.name, info.caption, info.frames) for info in source.infos] == [
        (f"{i}.mp4", f"clip {i}", i + 1) for i in range(4)
    ]
    clip = decode(source[2])
    assert clip.frames.shape == (3, 16, 16, 3)
    assert abs(int(clip.frames.mean()) - 120) <= 2


def test_select_and_without_are_complements(dataset):
    source = ClipSource(dataset / "data")
    held_out, rest = source.select(["2.mp4", "0.mp4"]), source.exclude({"2.mp4", "0.mp4"})
    assert [info.name for info in held_out.infos] == ["0.mp4", "2.mp4"]
    assert [info.name for info in rest.infos] == ["1.mp4", "3.mp4"]
    assert held_out[1] == source[2]
    assert rest.exclude(["1.mp4"])[0] == source[3]
    assert len(source) == 4


@pytest.mark.parametrize("method", ["select", "exclude"])
def test_unknown_names_are_refused(dataset, method):
    with pytest.raises(UserError, match=r"no clip named nine\.mp4 \(1 of 2 names\)"):
        getattr(ClipSource(dataset / "data"), method)(["0.mp4", "nine.mp4"])


def test_a_source_can_be_pickled_after_use(dataset):
    source = ClipSource(dataset / "data").exclude(["0.mp4"])
    first = source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.infos == source.infos
    assert copy[0] == first


def test_several_data_sets_can_be_one_source(dataset, tmp_path):
    (tmp_path / "clips").mkdir()
    Clip(frames=np.full((2, 16, 16, 3), 200, np.uint8), fps=8).save(tmp_path / "clips" / "0.mp4")
    ingest(tmp_path / "clips", tmp_path / "data")
    both = ClipSource({"dark": dataset / "data", "light": tmp_path / "data"})
    assert [info.name for info in both.infos] == [f"dark/{index}.mp4" for index in range(4)] + ["light/0.mp4"]
    assert both.dataset_sizes == (4, 1)
    alone = ClipSource(dataset / "data")
    assert [both[index] for index in range(4)] == [alone[index] for index in range(4)]
    assert both[4] == ClipSource(tmp_path / "data")[0]
    rest = pickle.loads(pickle.dumps(both.exclude(["dark/1.mp4", "dark/3.mp4"])))
    assert rest.dataset_sizes == (2, 1)
    assert rest[2] == both[4]
    light = pickle.loads(pickle.dumps(both.select_datasets([1])))
    assert light.dataset_sizes == (1,)
    assert [info.name for info in light.infos] == ["light/0.mp4"]
    assert light[0] == both[4]


def test_the_bytes_of_clips_are_those_of_their_files(dataset):
    source = ClipSource(dataset / "data")
    assert [source[index] for index in range(4)] == [(dataset / "clips" / f"{n}.mp4").read_bytes() for n in range(4)]
    for wrong in (4, -1):
        with pytest.raises(IndexError):
            source[wrong]


@pytest.fixture
def rows(tmp_path):
    """Return the folder of a table of five clips, of which one is dropped, in two splits."""
    rows = [
        make_row("a.mp4", motion=9.0, captions=["a"]),
        make_row("b.mp4", motion=1.0, captions=["b", "bb"], split="test"),
        make_row("c.mp4", motion=None, captions=[]),
        make_row("d.mp4", motion=7.0, outcome="dropped"),
        make_row("e.mp4", motion=5.0, captions=["e"], frames=3),
    ]
    write_table(tmp_path / "rows", rows)
    return tmp_path / "rows"


def list_names(source):
    return [info.name for info in source.infos]


def test_splits_are_sources_of_their_own(rows):
    source = ClipSource(rows)
    assert list_names(source) == ["a.mp4", "b.mp4", "c.mp4", "e.mp4"]
    assert list_names(source.select_split("train")) == ["a.mp4", "c.mp4", "e.mp4"]
    assert list_names(source.select_split("test")) == ["b.mp4"]
    assert len(source.select_split("validation")) == 0


def test_a_condition_selects_clips_by_columns_that_may_be_added_at_any_time(rows):
    assert list_names(ClipSource(rows, where="motion > 4")) == ["a.mp4", "e.mp4"]
    versions = ClipSource(rows).versions
    write_column(rows, "scores", {"name": ["e.mp4", "a.mp4", "gone.mp4"], "score": [0.9, 0.1, 1.0]})
    assert list_names(ClipSource(rows, where="motion > 4 and score > 0.5")) == ["e.mp4"]
    source = ClipSource(rows)
    assert source.versions != versions
    assert list_names(source.select_where("score is None")) == ["b.mp4", "c.mp4"]
    assert len(source.select_where(" ")) == 4
    assert len(source.select_where("score > 2")) == 0
    for use in (lambda where: ClipSource(rows, where=where), source.select_where):
        with pytest.raises(UserError, match="colour"):
            use("colour > 1")


def test_clips_that_are_not_chosen_are_left_out(rows):
    write_column(rows, "choice", {"name": ["a.mp4", "e.mp4"], "chosen": [False, True], "why": ["a duplicate", ""]})
    assert list_names(ClipSource(rows)) == ["b.mp4", "c.mp4", "e.mp4"]


def test_columns_are_arrays_or_lists(rows):
    both = ClipSource({"one": rows, "two": rows}).exclude(["one/a.mp4", "one/b.mp4"])
    assert both.column("name") == ["one/c.mp4", "one/e.mp4", "two/a.mp4", "two/b.mp4", "two/c.mp4", "two/e.mp4"]
    assert both.column("frames").tolist() == [9, 3, 9, 9, 9, 3]
    np.testing.assert_array_equal(both.column("motion"), [np.nan, 5, 9, 1, np.nan, 5])
    assert both.column("captions") == [(), ("e",), ("a",), ("b", "bb"), (), ("e",)]
    assert both.infos[3].captions == ("b", "bb")
    assert [info.name for info in both.infos[1:3]] == ["one/e.mp4", "two/a.mp4"]
    assert both.infos == list(both.infos)
    with pytest.raises(UserError, match="column='colour' is invalid"):
        both.column("colour")
    with pytest.raises(IndexError):
        both.infos[6]


def test_captions_may_come_from_several_columns_by_their_shares(rows):
    write_column(rows, "long", {"name": ["a.mp4", "b.mp4", "e.mp4"], "long": ["A long", "B long", None]})
    source = ClipSource(rows, captions={"long": 0.75, "captions": 0.25})
    assert source.column("captions") == [("A long", "a"), ("B long", "b", "bb"), (), ("e",)]
    assert [info.captions for info in source.infos] == source.column("captions")
    shares = source.compute_caption_shares()
    np.testing.assert_allclose(shares, [0.75, 0.25, 0.75, 0.125, 0.125, 1, 1])
    assert ClipSource(rows).compute_caption_shares() is None
    with pytest.raises(UserError, match="column='short' is invalid"):
        ClipSource(rows, captions={"short": 1.0}).column("captions")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
@pytest.mark.parametrize("make", [lambda kind: kind, pa.list_, pa.large_list], ids=["text", "list", "large_list"])
def test_captions_may_be_of_any_type_of_text(rows, kind, make):
    texts = [["A long", "A second"], ["B long"], None]
    texts = texts if make(kind) != kind else [each and each[0] for each in texts]
    table = pa.table({"name": ["a.mp4", "b.mp4", "e.mp4"], "long": pa.array(texts, make(kind))})
    (rows / "columns").mkdir(exist_ok=True)
    pq.write_table(table, rows / "columns" / "long.parquet")  # as pandas or Polars write it
    source = ClipSource(rows, captions={"long": 0.75, "captions": 0.25})
    shares = source.compute_caption_shares()
    first = [0.75] if make(kind) == kind else [0.375, 0.375]
    np.testing.assert_allclose(shares, [*first, 0.25, 0.75, 0.125, 0.125, 1, 1])
    assert len(shares) == sum(len(texts) or 1 for texts in source.column("captions"))


def test_a_column_that_has_no_texts_is_refused_as_captions(rows):
    source = ClipSource(rows, captions={"captions": 0.5, "motion": 0.5})
    with pytest.raises(UserError, match=r"^captions=motion is invalid: the column has values of type float\. Use "):
        source.compute_caption_shares()


def test_a_damaged_record_is_named_with_the_fix(dataset, tmp_path):
    shutil.copytree(dataset / "data", tmp_path / "data")
    source = ClipSource(tmp_path / "data")
    whole = [source[index] for index in range(4)]
    (file,) = (tmp_path / "data").glob("*.array_record")
    content = file.read_bytes()
    place = content.index(whole[2][-100:])
    file.write_bytes(content[:place] + b"x" * 50 + content[place + 50 :])
    expected = r"the record of 2\.mp4: .*array_record is damaged at byte \d+\. Remove .*data/index/train-00000\.parquet"
    with pytest.raises(DecodeError, match=expected):
        source[2]
    assert [source[index] for index in (0, 1, 3)] == [whole[index] for index in (0, 1, 3)]
    (tmp_path / "data" / "index" / "train-00000.parquet").unlink()
    ingest(dataset / "clips", tmp_path / "data", workers=1)
    assert [source[index] for index in range(4)] == whole
    file.unlink()
    with pytest.raises(MissingError, match=r"no such file: .*array_record\. The data set is incomplete"):
        source[0]


def test_a_hundred_thousand_clips_are_opened_and_pickled_as_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_table(tmp_path / "data", make_large_table(100_000))
    start = time.perf_counter()
    source = ClipSource(tmp_path / "data", where="height > 0")
    assert len(source.column("frames")) == len(source) > 50_000
    assert source.infos[len(source) - 1].name == source.column("name")[-1]
    assert time.perf_counter() - start < 3
    start = time.perf_counter()
    for number in range(0, len(source), len(source) // 100):
        assert source.infos[number].frames > 0
    assert time.perf_counter() - start < 1  # a clip does not read whole columns
    content = pickle.dumps(source)
    assert len(content) < 20_000
    assert pickle.loads(content).infos[7] == source.infos[7]


def test_values_of_columns_are_read_by_clip_and_a_missing_column_is_named(dataset, tmp_path):
    folder = shutil.copytree(dataset / "data", tmp_path / "data")
    names = ClipSource(folder).column("name")
    write_column(folder, "vector", {"name": names[:2], "vector": [[1.0, 2.0], [3.0]]})
    source = ClipSource({"a": folder, "b": folder}).exclude([f"a/{names[0]}"])
    values = [source.read_columns(index, ("vector", "captions")) for index in range(7)]
    assert [each["vector"] for each in values] == [[3.0], None, None, [1.0, 2.0], [3.0], None, None]
    assert [each["captions"] for each in values] == [info.captions for info in source.infos]
    source.check_columns(("vector", "fps"))
    with pytest.raises(UserError, match=r"columns=\('blur',\) is invalid: .* has no column blur\. Use one of .*vector"):
        source.check_columns(("blur",))
