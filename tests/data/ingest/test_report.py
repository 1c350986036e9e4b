"""Counts of ingest reports, and their sums."""

import dataclasses

import pytest

from dit_video.data.clips import ClipInfo
from dit_video.data.ingest.report import IngestReport, make_report


def info(name, height, width, frames, fps, captions=("x",), split="train"):
    return ClipInfo(name, captions, height, width, frames, fps, (frames - 1) / fps, split=split)


INFOS = (
    info("a", 480, 640, 30, 30.0),
    info("b", 480, 640, 300, 30.0, ("x", "a longer one")),
    info("c", 640, 480, 1, 1.0, ()),
    info("d", 512, 512, 20_000, 25.0, split="test"),
)
GIVEN = {
    "files": 8,
    "usable_files": 4,
    "bytes": 1000,
    "quarantined": (("e", "video of 5 bytes is damaged at 0.12 s"), ("f", "video of 77 bytes is damaged at 3 s")),
    "dropped": (("g", "shows what 'a' shows"), ("h#0", "shows what 'b' shows")),
    "dropped_files": ("g",),
    "rejected": (("i", "is a folder"),),
}


def test_histograms_count_all_values():
    report = make_report(INFOS, ["h264", "h264", "png", "vp9"], ["sdr", "pq", "sdr", "sdr"], **GIVEN)
    assert (report.usable, report.frames, report.uncaptioned) == (4, 20_331, 1)
    assert report.seconds == pytest.approx(1 + 10 + 0 + 800)
    assert report.splits == {"train": 3, "test": 1}
    assert report.histograms == {
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
    }
    assert report.reasons == {
        "quarantined": {"video of N bytes is damaged at N s": 2},
        "dropped": {"shows what '…' shows": 2},
        "rejected": {"is a folder": 1},
    }
    assert (report.captions["captions"], report.captions["uncaptioned"]) == (4, 1)


def test_reasons_that_differ_only_in_numbers_and_names_are_grouped():
    names = ["a.mp4", "it's.mp4", 'say "x".mp4', "both'\".mp4", "\udce9.mp4", "a b\n日本.mp4"]
    rejected = [("x", f"links to {name!r}, {1.5 * number:g}e-05 of 1,000 bytes") for number, name in enumerate(names)]
    rejected += [("x", "ffmpeg doesn't read it and can't"), ("x", "convert it to H.264")]
    report = make_report(INFOS, [], [], **{**GIVEN, "rejected": tuple(rejected), "files": 15})
    assert report.reasons["rejected"] == {
        "links to '…', N of N bytes": 6,
        "convert it to H.264": 1,
        "ffmpeg doesn't read it and can't": 1,
    }


def test_counts_that_do_not_add_up_are_refused():
    with pytest.raises(AssertionError, match="9 files came in, and 8"):
        make_report(INFOS, [], [], **{**GIVEN, "files": 9})


def test_a_report_is_read_as_it_was_written(tmp_path):
    report = make_report(INFOS, ["h264"], ["sdr"], **GIVEN)
    report.write(tmp_path)
    again = IngestReport.read(tmp_path)
    assert dataclasses.replace(again, captions={}) == dataclasses.replace(report, captions={})
    again.write(tmp_path)
    assert IngestReport.read(tmp_path) == again
