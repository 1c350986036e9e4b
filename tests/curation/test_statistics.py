"""Statistics of a data set: histograms of columns and of clips, and captions."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_video.curation.statistics import (
    compute_caption_statistics,
    format_histograms,
    make_clip_histograms,
    make_histogram,
)
from dit_video.data.clips import KIND, ClipSource
from dit_video.data.ingest.parts import make_table
from dit_video.data.tables import write_manifest, write_part

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


def make_row(number, height, width, frames, fps, **fields):
    duration = round(frames / fps * 1e6) if frames > 1 else 0
    facts = {"height": height, "width": width, "frames": frames, "fps": fps, "duration_us": duration}
    return {"id": number, "name": str(number), "outcome": "kept", "codec": "h264", "transfer": "sdr", **facts, **fields}


def test_every_clip_is_counted(tmp_path):
    rows = [
        make_row(1, 480, 640, 30, 30.0, motion=1.0, audio_codec="aac"),
        make_row(2, 480, 640, 300, 30.0, transfer="pq", motion=20.0),
        make_row(3, 640, 480, 1, 1.0, codec="png"),
        make_row(4, 512, 512, 20_000, 25.0, codec="vp9", motion=20.5),
        make_row(5, 512, 512, 20_000, 25.0, motion=99.0) | {"outcome": "dropped"},
    ]
    write_part(tmp_path, "train-00000", make_table(rows))
    write_manifest(tmp_path, KIND, {}, ["train-00000"])
    histograms = make_clip_histograms(ClipSource(tmp_path))
    motion = histograms.pop("motion")
    assert histograms == {
        "sizes": {"480×640": 2, "512×512": 1, "640×480": 1},
        "shapes": {"upright": 1, "square": 1, "4:3 to 8:5": 2},
        "lengths": {
            **{"1–2 s": 1, "2–5 s": 0, "5–10 s": 0, "10–20 s": 1, "20–30 s": 0, "30–60 s": 0, "60–120 s": 0},
            **{"120–300 s": 0, "300–600 s": 0, "600–1800 s": 1},
        },
        "frames": {
            **{"1": 1, "2": 0, "3–4": 0, "5–8": 0, "9–16": 0, "17–32": 1, "33–64": 0, "65–128": 0, "129–256": 0},
            **{"257–512": 1, "513–1024": 0, "1025–2048": 0, "2049–4096": 0, "4097–8192": 0, "8193–16384": 0},
            "16385–32768": 1,
        },
        "rates": {"30 fps": 2, "25 fps": 1},
        "codecs": {"h264": 2, "png": 1, "vp9": 1},
        "transfers": {"sdr": 3, "pq": 1},
        "sound": {"none": 3, "aac": 1},
    }
    assert len(motion) == 12
    assert sum(motion.values()) == 3


def test_caption_statistics_count_words_and_lengths():
    result = compute_caption_statistics(
        [("A dog runs.", "The dog's run"), (), ("a DOG runs.",), ("A dog runs.",), ("  ",)]
    )
    assert result == {
        "clips": 5,
        "captions": 4,
        "uncaptioned": 2,
        "per_clip": ((0, 2), (1, 2), (2, 1)),
        "words": {"least": 3, "q10": 3, "median": 3, "q90": 3, "most": 3, "mean": 3.0},
        "characters": {"least": 11, "q10": 11, "median": 11, "q90": 13, "most": 13, "mean": 11.5},
        "vocabulary": 6,
        "frequent_words": (("a", 3), ("dog", 3), ("runs", 3), ("dog's", 1), ("run", 1), ("the", 1)),
        "distinct": 3,
        "repeated": (("A dog runs.", 2),),
    }


def test_long_and_missing_captions_are_counted():
    none = compute_caption_statistics([(), ()])
    assert (none["captions"], none["words"], none["characters"], none["frequent_words"]) == (0, None, None, ())
    long = compute_caption_statistics([("word " * 20_000,)] * 2)
    assert long["characters"]["most"] == 100_000
    assert long["words"]["most"] == 20_000
    assert long["repeated"] == (("word " * 40 + "…", 2),)


@given(st.lists(st.lists(st.text(max_size=20), max_size=4).map(tuple), max_size=12))
def test_caption_statistics_add_up_and_are_json(captions):
    result = compute_caption_statistics(captions)
    assert sum(count for _, count in result["per_clip"]) == result["clips"] == len(captions)
    assert sum(number * count for number, count in result["per_clip"]) == result["captions"]
    assert sum(count - 1 for _, count in result["repeated"]) <= result["captions"] - result["distinct"]
    text = json.dumps(result, ensure_ascii=True)
    # The order of clips doesn't matter.
    assert text == json.dumps(compute_caption_statistics(captions[::-1]), ensure_ascii=True)
