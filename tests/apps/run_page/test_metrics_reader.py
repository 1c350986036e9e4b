"""A log is read while another process appends to it, and after it was cut by one that resumes."""

import math

import pytest

from dit_video.apps.run_page.metrics_reader import MetricsReader
from dit_video.training.hooks.logging import MetricsLog


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def get_steps(reader):
    return [entry["step"] for entry in reader.read()]


def test_appended_entries_are_read_once_they_are_complete(path):
    reader, log = MetricsReader(path), MetricsLog(path)
    assert reader.read() == []
    log.write(10, {"loss": 0.5})
    assert reader.read() == [{"step": 10, "loss": 0.5}]
    line = b'{"step": 20, "loss": 0.25}\n'
    for end in range(len(line)):
        with path.open("ab") as file:
            file.write(line[end : end + 1])
        assert get_steps(reader) == ([10] if end < len(line) - 1 else [10, 20])
    log.write(30, {"loss": 1.0})
    assert get_steps(reader) == get_steps(MetricsReader(path)) == [10, 20, 30]


def test_a_log_that_was_cut_and_continued_is_read_again(path):
    reader, log = MetricsReader(path), MetricsLog(path)
    for step in (10, 20, 30):
        log.write(step, {"loss": float(step)})
    assert get_steps(reader) == [10, 20, 30]
    log.resume(15)
    for step in (16, 17, 18, 19):
        log.write(step, {"loss": -1.0})
    assert [(entry["step"], entry["loss"]) for entry in reader.read()] == [(10, 10)] + [(s, -1) for s in range(16, 20)]
    path.unlink()
    assert reader.read() == []


def test_lines_that_are_no_entries_are_skipped(path):
    lines = [
        *('{"step": 1, "loss": null}', "nonsense", '{"loss": 2}', "[1]", "3", "null", '{"step": 1e999}', "\udcff"),
        *('{"step": "x"}', "", '{"step": 5, "loss": 1, "flag": true, "text": "<script>", "list": [1], "NaN": NaN}'),
        "[" * 100_000,
    ]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape") + b"\n")
    first, last = MetricsReader(path).read()
    assert first["step"] == 1
    assert math.isnan(first["loss"])
    assert math.isnan(last.pop("NaN"))
    assert last == {"step": 5, "loss": 1}


def test_a_folder_in_the_place_of_the_log_is_no_log(path):
    path.mkdir()
    assert MetricsReader(path).read() == []
