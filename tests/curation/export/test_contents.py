"""Columns are told apart by what they hold, and rows are read without joining the column."""

import pyarrow as pa
import pytest

from dit_video.curation.export.contents import find_caption_columns, is_bulky
from dit_video.data.tables import Table, write_column
from support.clip_tables import make_row, write_table


def test_columns_of_captions_are_those_of_texts_with_their_name():
    texts = pa.list_(pa.string())
    types = {
        "captions_long": texts,
        "name": pa.string(),
        "captions_short": pa.string(),
        "captions_large": pa.large_list(pa.large_string()),
        "captions_long_error": pa.string(),
        "captions_count": pa.int32(),
        "captioned": pa.string(),
        "captions": texts,
    }
    assert find_caption_columns(types) == ("captions", "captions_long", "captions_short", "captions_large")
    assert find_caption_columns({"name": pa.string()}) == ()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([bytes(4), None], pa.binary()), True),
        (pa.array([bytes(4), None], pa.large_binary()), True),
        (pa.array([bytes(4), None], pa.binary(4)), True),
        (pa.array([[0] * 4, None], pa.list_(pa.uint8())), True),
        (pa.array([[0.0] * 64, None], pa.list_(pa.float16(), 64)), True),
        (pa.array([[0.0] * 64, None], pa.list_(pa.float32())), True),
        (pa.array([[0.0] * 64, None], pa.large_list(pa.float64())), True),
        (pa.array([[0.0] * 3, None], pa.list_(pa.float32(), 3)), False),
        (pa.array([[1, 2, 3], None], pa.list_(pa.uint64())), False),
        (pa.array([["a"] * 64, None], pa.list_(pa.string())), False),
        (pa.array([1.0, None], pa.float32()), False),
        (pa.array([None, None], pa.list_(pa.float32())), False),
    ],
    ids=lambda value: str(getattr(value, "type", value)),
)
def test_bytes_and_long_lists_of_numbers_are_bulky(tmp_path, values, expected):
    write_table(tmp_path, [make_row("a.mp4"), make_row("b.mp4")])
    write_column(tmp_path, "more", pa.table({"name": ["a.mp4", "b.mp4"], "x": values}))
    assert is_bulky(Table(tmp_path), "x") == expected
