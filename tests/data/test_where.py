"""Conditions on columns: values, missing values, and conditions that are refused."""

import pyarrow as pa
import pytest

from dit_video.core.errors import UserError
from dit_video.data.where import evaluate, list_columns

COLUMNS = {
    "motion": pa.chunked_array([[1.0, 6.0], [None, 9.0]]),
    "frames": pa.chunked_array([[1, 2, 3, 4]]),
    "height": pa.chunked_array([pa.array([1080, 480, None, 720], pa.int32())]),
    "width": pa.chunked_array([pa.array([1920, 640, 640, 1280], pa.int32())]),
    "channels": pa.chunked_array([pa.array([3, 1, 3, 4], pa.uint8())]),
    "score": pa.chunked_array([[float("nan"), 1.0, None, 3.0]]),
    "camera": pa.chunked_array([["pan", None, "tilt", "zoom"]]),
    "long": pa.chunked_array([pa.array([["a dog", "it"], ["a cat"], [], None], pa.large_list(pa.large_string()))]),
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
        ("camera not in ['pan']", [2, 3]),
        ("not (camera in ['pan'])", [2, 3]),
        ("not camera in ['pan'] or frames == 2", [1, 2, 3]),
        ("height not in [480, -1]", [0, 3]),
        ("score not in [1]", [3]),  # NaN is a missing value
        ("not score > 2", [1]),
        ("score != 3", [1]),
        ("score is None", [0, 2]),
        ("'dog' in long", [0]),
        ("'dog' not in long", [1, 2]),
        ("height * width * width > 3e9", [0]),  # more than 32 bits hold
        ("height * 1e300 * width > 3e9", [0, 1, 3]),
        ("channels * 100 > 255", [0, 2, 3]),
        ("-channels < -2", [0, 2, 3]),
        ("channels - 2 < 0", [1]),
        ("height / 0 > 1", [0, 1, 3]),
    ],
)
def test_selects_the_rows_for_which_a_condition_holds(where: str, rows: list[int]):
    assert select(where) == rows


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("motion >", "not an expression"),
        ("blur > 3", "there is no column blur. Use camera, captions, channels, chosen, frames, height"),
        ("motion", "not a condition"),
        ("1 < 2", "not a condition"),
        ("name > 5", "Compare values of one type"),
        ("name.__class__ == 3", "not supported"),
        ("[x for x in name]", "there is no column x"),
        ("motion ** 2 > 3", "not supported"),
        ("motion is 3", "not supported"),
        ("name in captions", "'name' is not a text. Use a text in quotes"),
        ("5 in captions", "'5' is not a text. Use a text in quotes"),
        ("name in 'abc'", "Use frames in [10, 20] or 'dog' in captions."),
        ("frames in (10)", "Use frames in [10, 20] or 'dog' in captions."),
        ("'dog' in frames", "Compare values of one type"),
        ("height in [width, 3]", "'[width, 3]' has an element that is a column. Use "),
        ("height in [480, 'a']", "Compare values of one type"),
        (
            "frames > 10000000000000000000000",
            "'10000000000000000000000' is not a value that a column can have. Use an integer below 2**63",
        ),
        (r"name == '\ud800'", "is not a value that a column can have. Use an integer below 2**63"),
        ("frames * 4000000000000000000 > 1", "overflow. Use a decimal number"),
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
