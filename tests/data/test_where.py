"""Conditions on columns: values, missing values, and conditions that are refused."""

import pyarrow as pa
import pytest

from dit_video.core.errors import UserError
from dit_video.data.where import evaluate, list_columns

COLUMNS = {
    "motion": pa.chunked_array([[1.0, 6.0], [None, 9.0]]),
    "frames": pa.chunked_array([[1, 2, 3, 4]]),
    "name": pa.chunked_array([["a.mp4", "b.mp4", "dog.mp4", None]]),
    "captions": pa.chunked_array([[["a dog", "it"], ["a cat"], [], None]]),
    "chosen": pa.chunked_array([[True, False, None, True]]),
}


def select(where: str) -> list[int]:
    result = evaluate(where, COLUMNS.__getitem__, COLUMNS)
    return [row for row, holds in enumerate(result.to_pylist()) if holds]


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("motion > 5", [1, 3]),
        ("not motion > 5", [0]),  # a missing value is neither above nor below
        ("motion > 5 and frames < 4", [1]),
        ("motion > 5 or frames == 3", [1, 2, 3]),
        ("1 < frames <= 3", [1, 2]),
        ("motion is None", [2]),
        ("motion is not None", [0, 1, 3]),
        ("name in ['a.mp4', 'b.mp4']", [0, 1]),
        ("'dog' in name", [2]),
        ("'dog' in captions", [0]),
        ("'dog' not in captions", [1, 2]),
        ("frames / 2 >= 1.5", [2, 3]),
        ("frames - 1 == -frames + 3", [1]),
        ("chosen", [0, 3]),
        ("not chosen", [1]),
        ("chosen == True and motion * 2 > 10", [3]),
    ],
)
def test_selects_the_rows_for_which_a_condition_holds(where: str, rows: list[int]):
    assert select(where) == rows


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("motion >", "not an expression"),
        ("blur > 3", "there is no column blur. Use captions, chosen, frames, motion, name"),
        ("motion", "not a condition"),
        ("1 < 2", "not a condition"),
        ("name > 5", "Compare values of one type"),
        ("name.__class__ == 3", "not supported"),
        ("[x for x in name]", "there is no column x"),
        ("motion ** 2 > 3", "not supported"),
        ("motion is 3", "not supported"),
    ],
)
def test_a_condition_that_cannot_hold_names_itself_and_the_fix(where: str, message: str):
    with pytest.raises(UserError) as caught:
        select(where)
    assert str(caught.value).startswith(f"where={where!r} is invalid")
    assert message in str(caught.value)


def test_the_columns_of_a_condition_are_known():
    assert list_columns("motion > 5 and 'dog' in captions") == {"motion", "captions"}


def test_a_condition_that_is_nested_too_deeply_is_refused():
    with pytest.raises(UserError, match="nested too deeply"):
        select("not " * 900 + "motion > 5")
