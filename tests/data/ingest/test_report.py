"""Counts of ingest reports, and their sums."""

import dataclasses

import pyarrow as pa
import pytest

from dit_video.data.ingest.parts import make_table
from dit_video.data.ingest.report import IngestReport, make_report

SKIPPED = {"format": "folder", "unlisted": ["notes.txt"], "rejected": [["i", "is a folder"]]}


def clip(name, height, width, frames, fps, **fields):
    return {
        "name": name,
        "source": name.partition("#")[0],
        "outcome": "kept",
        "height": height,
        "width": width,
        "frames": frames,
        "fps": fps,
        "duration_us": round(frames / fps * 1e6) if frames > 1 else 0,
        "codec": "h264",
        "transfer": "sdr",
        "payload_bytes": 250,
        "method": "whole",
        **fields,
    }


def unused(name, outcome, reason, **fields):
    source = name.partition("#")[0]
    return {"name": name, "source": source, "outcome": outcome, "reason": reason, "duration_us": 500_000, **fields}


USED = [
    clip("a", 480, 640, 30, 30.0, motion=1.0, audio_codec="aac"),
    clip("b", 480, 640, 300, 30.0, transfer="pq", motion=20.0, method="copy"),
    clip("c", 640, 480, 1, 1.0, codec="png"),
    clip("d", 512, 512, 20_000, 25.0, codec="vp9", motion=20.5, split="test"),
]
UNUSED = [
    unused("e", "unreadable", "video of 5 bytes is damaged at 0.12 s"),
    unused("f", "unreadable", "video of 77 bytes is damaged at 3 s", transient=True),
    clip("g", 480, 640, 30, 30.0, why="shows what 'a' shows"),
    unused("h#0", "dropped", "motion 3 levels/s is below 4"),
    unused("h#1", "cut", "shot of 0.3 s is below 0.5 s"),
    unused("h#2", "dropped", "motion 3.5 levels/s is below 4"),
]


def make(rows=(*USED, *UNUSED), skipped=SKIPPED):
    splits, why = ([row.get(name, default) for row in rows] for name, default in (("split", "train"), ("why", "")))
    choice = {"split": splits, "chosen": [not reason for reason in why], "why": pa.array(why, pa.string())}
    table = make_table(rows)
    for name, values in choice.items():
        table = table.append_column(name, [values] if not isinstance(values, pa.Array) else values)
    return make_report(table, uncaptioned=1, skipped=skipped, settings={"screening": {"min_motion": 4}})


def test_sums_are_of_all_clips():
    report = make()
    assert (report.usable, report.frames, report.uncaptioned, report.bytes) == (4, 20_331, 1, 1000)
    assert report.seconds == pytest.approx(1 + 10 + 0 + 800)
    assert report.splits == {"train": 3, "test": 1}
    assert report.methods == {"whole": 3, "copy": 1}
    assert report.reasons == {
        "quarantined": {"video of N bytes is damaged at N s": 2},
        "dropped": {"motion N levels/s is below N": 2, "shot of N s is below N s": 1, "shows what '…' shows": 1},
        "rejected": {"is a folder": 1},
    }


def test_every_file_and_every_microsecond_has_one_account():
    report = make()
    assert (report.files, report.usable_files, report.unlisted) == (9, 4, ("notes.txt",))
    assert [name for name, _ in report.quarantined] == ["e", "f"]
    assert report.passing == ("f",)
    assert [name for name, _ in report.dropped] == ["g", "h#0", "h#1", "h#2"]
    assert report.dropped_files == ("g", "h")
    assert report.rejected == (("i", "is a folder"),)
    assert report.accounts == {
        "cut": {"parts": 1, "microseconds": 500_000},
        "dropped": {"parts": 2, "microseconds": 1_000_000},
        "duplicate": {"parts": 1, "microseconds": 1_000_000},
        "kept": {"parts": 4, "microseconds": 811_000_000},
        "unreadable": {"parts": 2, "microseconds": 1_000_000},
    }


def test_reasons_that_differ_only_in_numbers_and_names_are_grouped():
    names = ["a.mp4", "it's.mp4", 'say "x".mp4', "both'\".mp4", "\udce9.mp4", "a b\n日本.mp4"]
    rejected = [["x", f"links to {name!r}, {1.5 * number:g}e-05 of 1,000 bytes"] for number, name in enumerate(names)]
    rejected += [["x", "ffmpeg doesn't read it and can't"], ["x", "convert it to H.264"]]
    assert make(skipped=SKIPPED | {"rejected": rejected}).reasons["rejected"] == {
        "links to '…', N of N bytes": 6,
        "convert it to H.264": 1,
        "ffmpeg doesn't read it and can't": 1,
    }


def test_counts_that_do_not_add_up_are_refused():
    with pytest.raises(AssertionError, match="10 files came in, and 9"):
        dataclasses.replace(make(), files=10).check()
    # A file is broken as a whole, or not at all.
    with pytest.raises(AssertionError, match="9 files came in, and 10"):
        make((*USED, *UNUSED, unused("a", "unreadable", "is damaged")))


def test_a_report_is_read_as_it_was_written(tmp_path):
    report = make()
    report.write(tmp_path)
    again = IngestReport.read(tmp_path)
    assert again == report
