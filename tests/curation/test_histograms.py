"""Histograms count every row once, whatever the type of the column."""

import numpy as np
import pyarrow as pa
import pytest

from dit_video.curation.histograms import format_histograms, make_histogram

COLUMNS = {
    "motion": pa.array([*map(float, range(100)), None, float("nan"), 1e9], pa.float32()),
    "frames": pa.array([1, 1, 5, None], pa.int32()),
    "same": pa.array([3, 3, 3], pa.uint64()),
    "chosen": pa.array([True, False, True, None]),
    "camera": pa.array(["static", "static", "pan left", None]),
    "why": pa.array([f"reason {number}" for number in range(50)]),
    "embedding": pa.array([[1.0, 2.0], None], pa.list_(pa.float16(), 2)),
    "captions": pa.array([["a"], ["a", "b"], [], None], pa.list_(pa.string())),
    "thumbnails": pa.array([bytes(4), bytes(2), None], pa.large_binary()),
    "empty": pa.array([None, None], pa.float32()),
    "nothing": pa.array([None], pa.string()),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_every_row_is_counted_once(name):
    column = COLUMNS[name]
    histogram = make_histogram(name, pa.chunked_array([column]))
    assert histogram.number + histogram.nulls == len(column)
    assert histogram == make_histogram(name, column)
    if histogram.kind != "text":
        assert sum(each.number for each in histogram.bins) == histogram.number
    assert len(histogram.bars) == len(histogram.bins)


def test_numbers_have_bins_and_quantiles():
    values = np.arange(1001.0)
    histogram = make_histogram("x", values, bins=10)
    assert histogram.kind == "number"
    assert dict(histogram.quantiles)[0.5] == 500
    assert (histogram.bins[0].low, histogram.bins[-1].high) == (0, 1000)
    assert [each.number for each in histogram.bins[1:-1]] == [98] * 8
    wide = make_histogram("motion", COLUMNS["motion"])
    assert wide.nulls == 2  # NaN counts as null
    assert wide.bins[-2].high < 200  # one value far away does not fill all others into one bin
    assert wide.bins[-1].high == 1e9


def test_categories_are_sorted_by_their_counts():
    histogram = make_histogram("camera", COLUMNS["camera"])
    assert [(each.label, each.number) for each in histogram.bins] == [("static", 2), ("pan left", 1)]
    assert make_histogram("why", COLUMNS["why"]).distinct == 50
    assert make_histogram("captions", COLUMNS["captions"]).kind == "list"


def test_lengths_of_bytes_are_counted():
    histogram = make_histogram("thumbnails", COLUMNS["thumbnails"])
    assert (histogram.kind, histogram.nulls) == ("list", 1)
    assert (histogram.bins[0].low, histogram.bins[-1].high) == (2, 4)


def test_the_table_has_a_line_for_each_column():
    lines = format_histograms([make_histogram(name, column) for name, column in COLUMNS.items()]).splitlines()
    assert len(lines) == len(COLUMNS) + 1
    assert lines[5].split()[:3] == ["camera", "3", "1"]
    assert "static 2, pan left 1" in lines[5]


def test_a_single_number_is_the_label_of_its_bin():
    histogram = make_histogram("letterbox", np.zeros(5))
    assert [(each.label, each.number) for each in histogram.bins] == [("0", 5)]
