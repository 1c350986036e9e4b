import io
import json
import math
import re
import time
from types import SimpleNamespace

import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.training.hooks import logging
from dit_video.training.hooks.logging import MetricsLog, Progress, read_metrics


def test_entries_come_back_exactly(tmp_path):
    log = MetricsLog(tmp_path / "deep" / "metrics.jsonl")
    log.write(20, {"loss": 0.1, "norm": 1 / 3})
    log.write(40, {"loss": 1e-30, "norm": math.inf})
    first, second = read_metrics(log.path)
    assert first == {"step": 20, "loss": 0.1, "norm": 1 / 3}
    assert second["loss"] == 1e-30
    assert math.isnan(second["norm"])
    assert json.loads(log.path.read_text().splitlines()[1])["norm"] is None


def test_resuming_cuts_the_entries_that_will_be_written_again(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    for step in (10, 20, 30, 40):
        log.write(step, {"loss": step})
    again = MetricsLog(log.path)
    again.resume(25)
    again.write(30, {"loss": -1})
    assert [(entry["step"], entry["loss"]) for entry in read_metrics(log.path)] == [(10, 10), (20, 20), (30, -1)]
    MetricsLog(log.path).resume(0)
    assert read_metrics(log.path) == []


def test_a_half_written_last_line_is_dropped(tmp_path):
    path = tmp_path / "m.jsonl"
    MetricsLog(path).write(1, {"loss": 2.0})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert [entry["step"] for entry in read_metrics(path)] == [1]
    log = MetricsLog(path)
    log.resume(5)
    log.write(3, {"loss": 1.0})
    assert [entry["step"] for entry in read_metrics(path)] == [1, 3]


def test_damaged_lines_and_missing_files_are_reported(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 is not a metrics entry"):
        read_metrics(path)
    path.write_text('{"loss": 1.0}\n')
    with pytest.raises(UserError, match="line 1"):
        read_metrics(path)
    with pytest.raises(MissingError):
        read_metrics(tmp_path / "none.jsonl")
    MetricsLog(tmp_path / "none.jsonl").resume(3)
    assert not (tmp_path / "none.jsonl").exists()


def test_progress_without_a_terminal_prints_lines():
    stream = io.StringIO()
    with Progress("autoencoder", 4, line_seconds=0, stream=stream) as progress:
        progress.update(1)
        progress.update(2, 0.25)
        progress.update(4)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "autoencoder 1/4 (25%)"
    assert lines[1].startswith("autoencoder 2/4 (50%) · loss 0.2500 · ")
    assert lines[1].endswith("left")
    assert "4/4 (100%) · loss 0.2500" in lines[2]
    assert lines[2].endswith("0:00 left")


def test_progress_names_what_it_counts():
    stream = io.StringIO()
    with Progress("sampling", 40, unit="clip", line_seconds=0, stream=stream) as progress:
        progress.update(1)
        time.sleep(0.01)
        progress.update(40)
    assert re.search(r"sampling 40/40 \(100%\) · [0-9.]+ clips/s · 0:00 left", stream.getvalue())


def test_progress_lines_are_rare_but_always_state_the_end():
    stream = io.StringIO()
    with Progress("t", 1000, start=500, line_seconds=60, stream=stream) as progress:
        for step in range(501, 801):
            progress.update(step, 1.0)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["501/1000", "800/1000"]
    with Progress("t", 10, stream=stream, visible=False) as progress:
        progress.update(10)
    assert "10/10" not in stream.getvalue()


def test_progress_in_a_terminal_draws_a_bar():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress("backbone", 3, stream=stream) as progress:
        for step in (1, 2, 3):
            progress.update(step, 0.5)
    assert "3/3" in stream.getvalue()
    assert "loss 0.5000" in stream.getvalue()
    assert "left" in stream.getvalue()


@pytest.fixture
def notebook(monkeypatch):
    """Return the outputs of a notebook's cell, of which an update replaces the last one."""
    outputs = []

    class Handle:
        def update(self, data, *, raw):
            assert raw
            outputs[-1] = data

    def display(data, *, raw, display_id):
        assert raw
        assert display_id
        outputs.append(data)
        return Handle()

    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setattr("IPython.display.display", display)
    return outputs


def test_progress_in_a_notebook_is_one_output_that_is_replaced(notebook, capsys):
    with Progress("training <a>", 4) as progress:
        assert "width:0.0%" in notebook[0]["text/html"]
        for step in (1, 2, 4):
            progress.update(step, 0.5)
    (output,) = notebook
    assert output["text/plain"].startswith("training <a> 4/4 (100%) · loss 0.5000 · ")
    assert "training &lt;a&gt; 4/4 (100%) · loss 0.5000" in output["text/html"]
    assert "width:100.0%" in output["text/html"]
    assert capsys.readouterr() == ("", "")


def test_progress_of_nothing_and_invisible_progress_do_not_fail_in_a_notebook(notebook):
    with Progress("nothing", 0):
        pass
    with Progress("hidden", 3, visible=False) as progress:
        progress.update(3)
    assert [output["text/plain"] for output in notebook] == ["nothing 0/0 (0%)"]


def test_a_stream_of_the_caller_is_written_in_a_notebook_too(notebook):
    stream = io.StringIO()
    with Progress("t", 2, stream=stream) as progress:
        progress.update(2)
    assert stream.getvalue() == "t 2/2 (100%)\n"
    assert notebook == []


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that only `clock.append(seconds)` advances."""
    times = [0.0]
    monkeypatch.setattr(logging.time, "perf_counter", lambda: sum(times))
    return times


@pytest.mark.parametrize("start", [0, 500])
def test_the_time_left_does_not_count_compilation(clock, start):
    """The first step of this process takes 100 s, of which 98 are compilation, and the others 2 s."""
    stream = io.StringIO()
    with Progress("t", start + 11, start=start, line_seconds=0, stream=stream) as progress:
        for seconds in (100, 2, 2):
            clock.append(seconds)
            progress.update(progress.step + 1)
    first, second, third = stream.getvalue().splitlines()
    assert "left" not in first
    assert second.endswith("2.0 s/step · 0:18 left")
    assert third.endswith("2.0 s/step · 0:16 left")


def test_steps_that_compile_again_do_not_count_either(clock):
    stream = io.StringIO()
    with Progress("t", 10, line_seconds=0, stream=stream) as progress:
        for seconds, is_timed in ((100, False), (70, False), (2, True), (70, False), (4, True)):
            clock.append(seconds)
            progress.update(progress.step + 1, is_timed=is_timed)
    lines = stream.getvalue().splitlines()
    assert ["left" in line for line in lines] == [False, False, True, True, True]
    assert lines[2].endswith("2.0 s/step · 0:14 left")
    assert lines[3].endswith("2.0 s/step · 0:12 left")
    assert lines[4].endswith("3.0 s/step · 0:15 left")
