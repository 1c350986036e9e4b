"""Rows are read without joining the columns, in any order, and without vectors and bytes."""

import numpy as np
import pyarrow as pa
import pytest

from dit_video.data.tables import Table, write_column
from support.clip_tables import make_row, write_table
from support.huge_columns import make_huge_texts

pytest.importorskip("starlette")
NAMES = [f"{number}.mp4" for number in range(6)]


@pytest.fixture
def table(tmp_path):
    """Return a table of six rows with captions of a model, vectors and bytes."""
    write_table(tmp_path, [make_row(name, motion=float(number)) for number, name in enumerate(NAMES)])
    columns = {
        "captions_long": pa.array([f"caption {number}" for number in range(6)]),
        "embedding": pa.array([[0.5] * 64] * 6, pa.list_(pa.float16(), 64)),
        "thumbnails": pa.array([bytes(64)] * 6, pa.large_binary()),
        "palette": pa.array([[1, 2]] * 6, pa.list_(pa.int32())),
    }
    write_column(tmp_path, "more", pa.table({"name": NAMES, **columns}))
    return Table(tmp_path)


def test_rows_keep_their_order(table):
    from dit_video.apps.browse.table_view import read_rows

    rows = read_rows(table, np.array([4, 0, 5, 0]), ["captions_long"])
    assert [(row["row"], row["name"], row["captions_long"]) for row in rows] == [
        (number, f"{number}.mp4", f"caption {number}") for number in (4, 0, 5, 0)
    ]
    assert read_rows(table, np.array([], np.int64), []) == []


def test_vectors_and_bytes_are_left_out(table):
    from dit_video.apps.browse.table_view import make_column_views, read_row, read_rows

    row = read_row(table, 2)
    assert (row["palette"], row["captions_long"]) == ([1, 2], "caption 2")
    names = {view.name for view in make_column_views(table)}
    assert {"palette", "captions_long"} <= names
    for listed in (row, read_rows(table, np.array([2]), ["embedding", "thumbnails"])[0], names):
        assert not {"embedding", "thumbnails"} & set(listed)


def test_rows_of_columns_that_are_too_large_for_one_array_are_read(table, monkeypatch):
    from dit_video.apps.browse.table_view import read_row, read_rows

    read, huge = table.arrow, make_huge_texts()
    monkeypatch.setattr(table, "arrow", lambda name: huge if name == "captions_long" else read(name))
    assert read_row(table, 4)["captions_long"] == "\0" * 4
    rows = read_rows(table, np.array([4, 0, 2]), ["captions_long"])
    assert [row["captions_long"] for row in rows] == ["\0" * 4] * 3
