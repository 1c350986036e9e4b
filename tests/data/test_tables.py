"""Tables: columns in files of their own, by row, in any order; large ones are read from a cache of shared files."""

import json
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.core.storage import to_storage_path
from dit_video.data import tables
from dit_video.data.tables import (
    COLUMNS_FOLDER,
    Table,
    TableColumn,
    compute_row_id,
    get_note,
    read_schema,
    take_rows,
    write_column,
    write_manifest,
    write_part,
)
from support.huge_columns import make_huge_texts
from support.process_memory import read_memory

COUNT = 10


def write_rows(folder, *, parts=(4, 0, 6), settings=None):
    """Write rows `0.mp4`, `1.mp4`, … in parts of these numbers of rows; return the ids."""
    names = [f"{number}.mp4" for number in range(sum(parts))]
    ids = np.asarray(list(map(compute_row_id, names)), np.uint64)
    columns = {
        "id": ids,
        "name": names,
        "frames": pa.array(range(len(names)), pa.int32()),
        "motion": pa.array([None if number % 3 == 0 else float(number) for number in range(len(names))], pa.float32()),
        "tags": [["a", "b"][: number % 3] for number in range(len(names))],
    }
    rows, first = pa.table(columns), 0
    for number, count in enumerate(parts):
        write_part(to_storage_path(folder), f"train-{number:05d}", rows.slice(first, count))
        first += count
    part_names = [f"train-{number:05d}" for number in range(len(parts))]
    write_manifest(to_storage_path(folder), "clips", settings or {}, part_names)
    return ids


def read_note(folder):
    """Return the note of the column `scores`."""
    return get_note(read_schema(to_storage_path(folder) / COLUMNS_FOLDER / "scores.parquet"))


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch, tmp_path):
    """Let tables be small or large."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "large":
        monkeypatch.setattr(tables, "_SMALL_TABLE", 1)
    return request.param


def test_columns_are_those_of_all_parts(tmp_path, size):
    ids = write_rows(tmp_path / "data", settings={"limit": 3})
    table = Table(tmp_path / "data")
    assert len(table) == COUNT
    assert table.settings == {"limit": 3}
    assert table.names == ("id", "name", "frames", "motion", "tags")
    np.testing.assert_array_equal(table["id"], ids)
    np.testing.assert_array_equal(table["frames"], np.arange(COUNT, dtype=np.int32))
    assert table["frames"].dtype == np.int32
    np.testing.assert_array_equal(table["motion"], [np.nan, 1, 2, np.nan, 4, 5, np.nan, 7, 8, np.nan])
    assert table["name"].to_pylist() == [f"{number}.mp4" for number in range(COUNT)]
    assert table["tags"].to_pylist()[:4] == [[], ["a"], ["a", "b"], []]
    assert [table.get_part(row) for row in (0, 3, 4, 9)] == ["train-00000"] * 2 + ["train-00002"] * 2
    with pytest.raises(UserError, match=r"column='colour' is invalid: .* has frames, id, motion, name, tags"):
        table["colour"]
    assert (tmp_path / "cache").exists() == (size == "large")


@pytest.mark.parametrize("key", ["id", "name"])
def test_columns_may_be_added_by_id_or_by_name_in_any_order(tmp_path, size, key):
    ids = write_rows(tmp_path / "data")
    rows = np.random.default_rng(0).permutation(COUNT)[:7]
    keys = ids[rows] if key == "id" else [f"{row}.mp4" for row in rows.tolist()]
    unknown = np.asarray([5], np.uint64) if key == "id" else ["gone.mp4"]  # a row that is no longer there
    columns = {"score": [*(rows * 2.0).tolist(), 99.0], "label": [*map(str, rows.tolist()), "x"]}
    columns["good"] = [*(rows > 4).tolist(), True]
    write_column(tmp_path / "data", "scores", {key: [*keys, *unknown], **columns}, note="model 3")
    table = Table(tmp_path / "data")
    expected = np.full(COUNT, np.nan)
    expected[rows] = rows * 2
    np.testing.assert_array_equal(table["score"], expected)
    assert table["label"].to_pylist() == [str(row) if row in rows else None for row in range(COUNT)]
    assert table["good"].tolist() == [row in rows and row > 4 for row in range(COUNT)]
    assert table.arrow("good").null_count == COUNT - len(rows)
    assert read_note(tmp_path / "data") == "model 3"


def test_sorted_columns_are_read_in_batches(tmp_path, size, monkeypatch):
    ids = write_rows(tmp_path / "data", parts=(30,))
    kept = [3, 4, 8, 9, 20, 21, 28]
    write_column(tmp_path / "data", "scores", {"id": ids[kept], "score": np.asarray(kept, np.int64)})
    monkeypatch.setattr(tables, "BATCH_ROWS", 3)
    values = Table(tmp_path / "data").arrow("score").to_pylist()
    assert values == [row if row in kept else None for row in range(30)]
    # Whole numbers without a value make an array of numbers with NaN.
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(Table(tmp_path / "data")["score"])), kept)


def test_all_rows_of_a_name_have_its_values(tmp_path, size):
    """A file that has changed has an outdated row with the same name."""
    folder = to_storage_path(tmp_path / "data")
    for number, names in enumerate([["a", "b", "c"], ["b", "d"]]):
        ids = [compute_row_id(name, number) for name in names]
        write_part(folder, f"train-{number:05d}", pa.table({"id": pa.array(ids, pa.uint64()), "name": names}))
    write_manifest(folder, "clips", {}, ["train-00000", "train-00001"])
    write_column(folder, "scores", {"name": ["a", "b", "d"], "score": [1.0, 2.0, 4.0]})
    assert Table(folder).arrow("score").to_pylist() == [1, 2, None, 2, 4]


def test_select_returns_rows(tmp_path, size):
    ids = write_rows(tmp_path / "data")
    write_column(tmp_path / "data", "scores", {"id": ids[::2], "score": np.arange(5.0)})
    table = Table(tmp_path / "data")
    assert table.select("motion > 4").tolist() == [5, 7, 8]
    assert table.select("motion > 4 and score >= 3").tolist() == [8]
    assert table.select("score is None and name != '1.mp4'").tolist() == [3, 5, 7, 9]
    assert table.select("motion > 1000").tolist() == []
    with pytest.raises(UserError, match="colour"):
        table.select("colour > 3")


def test_values_of_rows_are_read_as_python_values(tmp_path, size, monkeypatch):
    write_rows(tmp_path / "data")
    table = Table(tmp_path / "data")
    for few in (64, 0):
        monkeypatch.setattr(tables, "_FEW_ROWS", few)
        assert table.read_values("motion", [0, 4]) == [None, 4.0]
        assert table.read_values("tags", np.asarray([2, 0])) == [["a", "b"], []]
    column = TableColumn(table, "name", np.asarray([7, 2]))
    assert column == ["7.mp4", "2.mp4"]
    assert (column[-1], column[:1], list(column), len(column)) == ("2.mp4", ["7.mp4"], ["7.mp4", "2.mp4"], 2)
    tags = TableColumn(table, "tags", np.asarray([2, 0, 4]))
    assert tags == [("a", "b"), (), ("a",)]
    counts, values = tags.flatten()
    assert (counts.tolist(), values.to_pylist()) == ([2, 0, 1], ["a", "b", "a"])
    with pytest.raises(IndexError):
        column[2]
    assert column != ["7.mp4"]


def test_the_version_changes_with_rows_and_columns(tmp_path):
    ids = write_rows(tmp_path / "data")
    versions = [Table(tmp_path / "data").version]
    for values in ([1.0], [2.0], [2.0, 3.0]):
        write_column(tmp_path / "data", "scores", {"id": ids[: len(values)], "score": values})
        versions.append(Table(tmp_path / "data").version)
    assert len(set(versions)) == 4
    write_column(tmp_path / "data", "scores", {"id": ids[:1], "score": [1.0]})
    assert Table(tmp_path / "data").version == versions[1]
    (tmp_path / "data" / "columns" / "scores.parquet").unlink()
    assert Table(tmp_path / "data").version == versions[0]
    # A column of another writer, without a hash of its own.
    pq.write_table(pa.table({"id": ids, "score": np.arange(10.0)}), tmp_path / "data" / "columns" / "scores.parquet")
    other = Table(tmp_path / "data")
    assert other.version not in versions
    np.testing.assert_array_equal(other["score"], np.arange(10))
    shutil.rmtree(tmp_path / "data")
    write_rows(tmp_path / "data", parts=(4, 5))
    assert Table(tmp_path / "data").version not in versions


def test_a_replaced_column_of_a_large_table_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_SMALL_TABLE", 1)
    ids = write_rows(tmp_path / "data")
    for value in (1.0, 2.0):
        write_column(tmp_path / "data", "scores", {"id": ids, "score": np.full(COUNT, value)})
        assert set(Table(tmp_path / "data", cache=tmp_path / "cache")["score"].tolist()) == {value}
        assert Table(tmp_path / "data", cache=tmp_path / "cache")["frames"].tolist() == list(range(COUNT))


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_column_that_changes_after_the_table_was_opened_is_refused(tmp_path, memory, size, place):
    folder = f"{memory}/data" if place == "bucket" else tmp_path / "data"
    ids = write_rows(folder)
    write_column(folder, "scores", {"id": ids, "score": np.zeros(COUNT)})
    table = Table(folder)
    write_column(folder, "scores", {"id": ids, "score": np.ones(COUNT)})
    for _ in range(2):
        with pytest.raises(UserError, match=r"scores\.parquet has changed since the data set was opened\. Open it"):
            table["score"]
    assert Table(folder)["score"].all()


def test_wrong_columns_are_refused(tmp_path):
    ids = write_rows(tmp_path / "data")
    with pytest.raises(UserError, match=r"add the key `id` or `name` of each row"):
        write_column(tmp_path / "data", "scores", {"score": [1.0]})
    with pytest.raises(UserError, match=rf"id={ids[0]} of the column scores is there more than once"):
        write_column(tmp_path / "data", "scores", {"id": ids[[0, 1, 0]], "score": [1.0, 2.0, 3.0]})
    with pytest.raises(UserError, match="Use as many values as keys"):
        write_column(tmp_path / "data", "scores", {"id": ids, "score": [1.0]})
    assert not (tmp_path / "data" / "columns").exists()
    write_column(tmp_path / "data", "one", {"id": ids, "score": np.zeros(COUNT)})
    write_column(tmp_path / "data", "two", {"id": ids, "score": np.ones(COUNT)})
    with pytest.raises(UserError, match=r"two\.parquet has the column score, as has one\. Rename it"):
        Table(tmp_path / "data")
    write_column(tmp_path / "data", "two", {"id": ids, "motion": np.ones(COUNT)})
    with pytest.raises(UserError, match=r"two\.parquet has the column motion, as has index\. Rename it"):
        Table(tmp_path / "data")
    pq.write_table(pa.table({"value": [1]}), tmp_path / "data" / "columns" / "two.parquet")
    with pytest.raises(UserError, match=r"two\.parquet has no column id or name"):
        Table(tmp_path / "data")
    (tmp_path / "data" / "columns" / "two.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match=r"two\.parquet is not a Parquet file .* Write it again"):
        Table(tmp_path / "data")


def test_folders_without_a_finished_table_are_refused_with_the_fix(tmp_path):
    with pytest.raises(MissingError, match=r"no such data set: .*nowhere"):
        Table(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"not a data set of clips, as it has no table\.json\. Use tools/ingest\.py"):
        Table(tmp_path / "empty")
    write_rows(tmp_path / "data")
    manifest = tmp_path / "data" / "table.json"
    content = json.loads(manifest.read_text())
    with pytest.raises(UserError, match=r"is a data set of clips, not of latents\. Encode them"):
        Table(tmp_path / "data", kind="latents", make_it="Encode them.")
    manifest.unlink()
    with pytest.raises(UserError, match=r"as it is not finished\. Use tools/ingest\.py"):
        Table(tmp_path / "data")
    for other in (content | {"version": 2}, [1]):
        manifest.write_text(json.dumps(other))
        with pytest.raises(UserError, match=r"table\.json is not of version 3\. Make the data set again"):
            Table(tmp_path / "data")
    manifest.write_text("{")
    with pytest.raises(UserError, match=r"table\.json is not valid JSON"):
        Table(tmp_path / "data")
    manifest.write_text(json.dumps(content))
    (tmp_path / "data" / "index" / "train-00002.parquet").unlink()
    with pytest.raises(MissingError, match=r"train-00002\.parquet\. The data set is incomplete, so write it again"):
        Table(tmp_path / "data")["frames"]


def test_a_table_of_no_rows_has_no_columns(tmp_path):
    write_manifest(tmp_path / "data", "clips", {}, [])
    table = Table(tmp_path / "data")
    assert (len(table), table.names) == (0, ())


def test_tables_in_buckets_are_read_and_columns_added(memory, size):
    ids = write_rows(f"{memory}/data")
    write_column(f"{memory}/data", "scores", {"id": ids[::-1], "score": np.arange(10.0)})
    table = Table(f"{memory}/data")
    np.testing.assert_array_equal(table["score"], np.arange(10.0)[::-1])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(table))["frames"], np.arange(COUNT))
    assert read_note(f"{memory}/data") == ""


def test_large_tables_are_pickled_without_their_columns(tmp_path, monkeypatch):
    write_rows(tmp_path / "data", parts=(5000,))
    expected = Table(tmp_path / "data")
    assert len(expected["name"]) == 5000
    assert len(pickle.dumps(expected)) > 50_000
    monkeypatch.setattr(tables, "_SMALL_TABLE", 1)
    table = Table(tmp_path / "data", cache=tmp_path / "cache")
    column = TableColumn(table, "name", np.arange(1, 5000))
    assert column[0] == "1.mp4"
    content = pickle.dumps((table, column))
    assert len(content) < 10_000
    copy, copied_column = pickle.loads(content)
    np.testing.assert_array_equal(copy["frames"], expected["frames"])
    assert copied_column[-1] == "4999.mp4"


def test_the_cache_holds_a_bounded_number_of_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_SMALL_TABLE", 1)
    for number in range(12):
        write_rows(tmp_path / str(number), parts=(number + 1,))
        assert len(Table(tmp_path / str(number), cache=tmp_path / "cache")["frames"]) == number + 1
    assert len(list((tmp_path / "cache" / "tables").iterdir())) <= 9


def test_the_cache_keeps_a_table_that_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_SMALL_TABLE", 1)
    for number in range(30):
        for used in (0, number):
            write_rows(tmp_path / str(used), parts=(used + 1,))
            assert len(Table(tmp_path / str(used), cache=tmp_path / "cache")["frames"]) == used + 1
        if number == 0:
            (first,) = (tmp_path / "cache" / "tables").iterdir()
            (column,) = first.iterdir()
            written = column.stat().st_mtime_ns
    assert column.stat().st_mtime_ns == written


def test_the_cache_holds_a_bounded_number_of_tables_of_buckets(memory, tmp_path):
    for number in range(12):
        write_rows(f"{memory}/{number}", parts=(number + 1,))
        assert len(Table(f"{memory}/{number}")["frames"]) == number + 1
    assert 1 <= len(list((tmp_path / "cache" / "dit_video" / "tables").iterdir())) <= 9


@pytest.mark.parametrize("count", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_large_tables_open_in_seconds_and_take_little_memory(tmp_path, count):
    numbers = np.arange(count)
    for part, rows in enumerate(np.array_split(numbers, 4)):
        names = pa.array([f"folder/{number:07d}.mp4" for number in rows.tolist()])
        sizes = {name: (rows % 977 + 16).astype(np.int32) for name in ("height", "width", "frames")}
        write_part(tmp_path, f"train-{part:05d}", pa.table({"id": rows.astype(np.uint64), "name": names, **sizes}))
    write_manifest(tmp_path, "clips", {}, [f"train-{part:05d}" for part in range(4)])
    captions = pa.array([f"a caption of clip {number} of some sixty characters, and more" for number in range(count)])
    write_column(tmp_path, "captions", {"id": numbers[::-1].astype(np.uint64), "caption": captions})
    del captions, names
    before, start = read_memory("RssAnon"), time.perf_counter()
    table = Table(tmp_path, cache=tmp_path / "cache")
    assert int(table["frames"].max()) == 992
    chosen = table.select("frames > 500 and height < 900")
    assert table.read_values("caption", chosen[:1])[0].startswith(f"a caption of clip {count - 1 - chosen[0]} ")
    seconds, after = time.perf_counter() - start, read_memory("RssAnon")
    assert seconds < 5 * max(0.3, count / 1_000_000)
    assert after - before < 300 * 2**20
    assert len(pickle.dumps(table)) < 10_000


def test_opening_a_table_of_a_bucket_reads_no_column(memory, monkeypatch):
    write_rows(f"{memory}/data")
    ids = np.asarray([compute_row_id(f"{number}.mp4") for number in range(COUNT)], np.uint64)
    content = np.random.default_rng(0).integers(0, 256, (COUNT, 1 << 18)).astype(np.uint8)
    write_column(f"{memory}/data", "large", {"id": ids, "embedding": list(content)})
    size = (to_storage_path(f"{memory}/data") / "columns" / "large.parquet").stat().st_size
    assert size > 2 << 20
    read = []
    monkeypatch.setattr(tables, "read_bytes", lambda path: read.append(path.name) or path.read_bytes())
    table = Table(f"{memory}/data")
    assert "embedding" in table.names
    assert table["frames"].tolist() == list(range(COUNT))
    assert "large.parquet" not in read


def test_threads_that_open_a_column_of_a_bucket_at_once_copy_it_once(memory, size, monkeypatch):
    ids = write_rows(f"{memory}/data")
    write_column(f"{memory}/data", "scores", {"id": ids, "score": np.arange(10.0)})
    table, real, copies = Table(f"{memory}/data"), tables.download, []

    def download(source, target):
        copies.append(source.name)
        time.sleep(0.1)
        real(source, target)

    monkeypatch.setattr(tables, "download", download)
    with ThreadPoolExecutor(8) as pool:
        columns = list(pool.map(lambda _: table["score"], range(8)))
    assert 0 < len(copies) == len(set(copies))
    assert all(np.array_equal(column, np.arange(10.0)) for column in columns)


def test_the_hash_of_a_column_does_not_depend_on_its_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BATCH_ROWS", 3)
    names = [f"{number}.mp4" for number in range(COUNT)]
    texts = [None if number % 4 == 0 else f"text {number}" for number in range(COUNT)]
    longer = pa.array([*texts, "more", None, "more"])
    columns = [pa.array(texts), longer.slice(0, COUNT), pa.chunked_array([texts[:4], texts[4:5], texts[5:]])]
    for number, column in enumerate(columns):
        write_column(tmp_path, str(number), {"name": names, "text": column})
    contents = {(tmp_path / "columns" / f"{number}.parquet").read_bytes() for number in range(len(columns))}
    assert len(contents) == 1
    write_column(tmp_path, "other", {"name": names, "text": [*texts[:-1], "other"]})
    assert (tmp_path / "columns" / "other.parquet").read_bytes() not in contents


@pytest.mark.nightly
def test_captions_of_more_than_two_gibibytes_are_stored_and_read(tmp_path):
    """A column in one array holds 2 GiB of text."""
    count = 20_000
    texts = pa.chunked_array([[["x" * 120_000]] * 1000 for _ in range(count // 1000)], pa.list_(pa.string()))
    folder = to_storage_path(tmp_path)
    ids = pa.array(range(count), pa.uint64())
    write_part(folder, "train-00000", pa.table({"id": ids, "name": list(map(str, range(count)))}))
    write_manifest(folder, "clips", {}, ["train-00000"])
    write_column(folder, "captions", {"id": ids, "captions": texts})
    rows = np.arange(0, count, 2)
    column = TableColumn(Table(folder, cache=tmp_path / "cache"), "captions", rows)
    assert column[5] == ("x" * 120_000,)
    assert len(column[:100]) == 100
    assert column.flatten()[0].sum() == len(rows)


@pytest.mark.parametrize("rows", [[], [0], [9], [0, 3, 4, 9], [*range(10)], [2, 2, 5], [5, 0, 2, 5]])
def test_rows_are_those_of_arrows_take(rows):
    values = [None if number == 4 else [number, number + 1] for number in range(10)]
    column = pa.chunked_array(
        [pa.array(values[a:b], pa.list_(pa.int32())) for a, b in ((0, 3), (3, 3), (3, 8), (8, 10))]
    )
    expected = column.take(pa.array(rows, pa.int64())).to_pylist()
    assert take_rows(column, np.array(rows, np.int64)).to_pylist() == expected


def test_rows_of_more_text_than_one_array_can_hold_are_read():
    column = make_huge_texts()
    with pytest.raises(pa.ArrowInvalid):
        column.take(pa.array([0, 2]))  # it joins the chunks
    assert take_rows(column, np.array([0, 2])).to_pylist() == ["\0" * 4, "\0" * 4]
