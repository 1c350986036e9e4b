import io
import json
import math
import re
import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.tokens import PackedShape, make_empty_row
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks import logging
from dit_video.training.hooks.logging import MetricsLog, Progress, SkippedLog, read_metrics
from dit_video.training.loop import LoopConfig, run
from dit_video.training.state import init_state
from support.training_state import make_step


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
    with pytest.raises(UserError, match="line 2 is not an entry"):
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


OPTIMIZER = optax.adam(1e-2)
GOOD = {"x": np.linspace(-1, 1, 12, dtype=np.float32).reshape(6, 2), "scale": np.ones(6, np.float32)}
NAN = GOOD | {"x": np.full((6, 2), math.nan, np.float32)}
STEEP = GOOD | {"scale": np.zeros(6, np.float32)}
"""A batch whose loss is finite and whose gradient is not."""


def loss(params, batch, step):
    del step
    error = batch["x"] @ params["w"] + params["b"] - 1
    return jnp.mean(jnp.square(error)) + jnp.sqrt(jnp.abs(params["b"] * batch["scale"])).mean(), {}


STEP = make_step(loss, OPTIMIZER, ema_decay=0.9)


def start():
    return init_state({"w": jnp.asarray([0.5, -0.25], jnp.float32), "b": jnp.float32(0.1)}, OPTIMIZER)


def data(*bad: int, batch: Any = NAN):
    """Return batches of which those of the given steps, counted from 1, are bad."""
    return lambda done: (batch if number in bad else GOOD for number in range(done + 1, 1000))


class FirstValues(SkippedLog):
    """A log of skipped steps with the first values of their batches."""

    def identify(self, batch):
        return {"x": jnp.asarray(batch["x"][0])}


def folder_run(folder, config, batches):
    checkpoints = Checkpoints(folder / "checkpoints")
    state = start()
    if checkpoints.latest() is not None:
        state, _ = checkpoints.restore(jax.eval_shape(lambda: state))
    hooks = [MetricsLog(folder / "metrics.jsonl"), FirstValues(folder / "skipped.jsonl")]
    return run(STEP, state, batches, config=config, checkpoints=checkpoints, hooks=hooks)


def skipped(folder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def assert_same(left: Any, right: Any) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("batch", [NAN, STEEP], ids=["loss", "gradient"])
def test_a_broken_step_leaves_every_bit_and_counts(batch):
    state, figures = STEP(start(), GOOD)
    assert figures["skipped"] == 0
    before = jax.device_get(state)
    state, figures = STEP(state, batch)
    assert figures["skipped"] == 1
    assert np.isfinite(figures["loss"]) == (batch is STEEP)
    assert not np.isfinite(figures["gradient_norm"])
    assert state.step == 2
    for part in ("params", "ema", "opt_state"):
        assert_same(getattr(state, part), getattr(before, part))
    after, figures = STEP(state, GOOD)
    assert figures["skipped"] == 0
    assert (after.params["w"] != before.params["w"]).all()


def test_a_run_goes_on_and_logs_the_skipped_batch(tmp_path):
    config = LoopConfig(steps=9, log_every=3, save_every=4)
    state = folder_run(tmp_path, config, data(4, 8))
    plain = start()
    for _ in range(7):
        plain, _ = STEP(plain, GOOD)
    assert_same(state.params, plain.params)
    assert state.step == 9
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [entry["skipped"] for entry in entries] == [0, 1, 1]
    assert all(math.isfinite(entry["loss"]) for entry in entries)
    assert [entry["step"] for entry in skipped(tmp_path)] == [4, 8]
    assert skipped(tmp_path)[0]["loss"] == "nan"
    assert np.isnan(skipped(tmp_path)[0]["x"]).all()


def test_after_too_many_in_a_row_the_good_state_is_saved(tmp_path):
    config = LoopConfig(steps=20, log_every=50, save_every=50, max_consecutive_skips=3)
    with pytest.raises(
        UserError, match="not finite at 3 consecutive steps, 6 to 8; the state is that from before them"
    ):
        folder_run(tmp_path, config, data(2, 6, 7, 8, 9, 10, 11, 12))
    saved = Checkpoints(tmp_path / "checkpoints").latest()
    assert saved is not None
    assert 8 <= saved <= 10  # it is noticed two steps late
    restored, _ = Checkpoints(tmp_path / "checkpoints").restore(jax.eval_shape(start))
    plain = start()
    for _ in range(4):
        plain, _ = STEP(plain, GOOD)
    assert_same(restored.params, plain.params)
    state = folder_run(tmp_path, config, data())  # the data are fixed
    assert state.step == 20
    assert [entry["step"] for entry in skipped(tmp_path)] == [2, 6, 7, 8]


def test_resuming_cuts_the_skips_that_will_be_logged_again(tmp_path):
    log = SkippedLog(tmp_path / "skipped.jsonl")
    for step in (3, 5, 8):
        log.on_skip(step, {"loss": np.float32(math.inf), "gradient_norm": np.float32(1)}, {})
    with log.path.open("a") as file:
        file.write('{"step": 9, "lo')
    log.resume(5)
    assert skipped(tmp_path) == [{"step": step, "loss": "inf", "gradient_norm": 1.0} for step in (3, 5)]


@pytest.mark.parametrize("log", [MetricsLog, SkippedLog])
@pytest.mark.parametrize("line", ["nonsense", '{"loss": 1.0}', "3", '{"step": null}'])
def test_resuming_reports_a_damaged_line(tmp_path, log, line):
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 1, "loss": 1.0}}\n{line}\n')
    with pytest.raises(UserError, match=r"log\.jsonl line 2 is not an entry of a step\. Remove that line"):
        log(path).resume(5)


def test_skipped_packed_rows_are_logged_by_their_examples():
    rows = jax.tree.map(lambda leaf: leaf[None], make_empty_row(PackedShape(tokens=4, text=2, segments=3), width=2))
    rows.examples[0, :2], rows.valid[0, :2] = (7, 9), True
    result = SkippedLog("").identify(rows)
    assert {name: np.asarray(array).tolist() for name, array in result.items()} == {
        "examples": [[7, 9, 0]],
        "valid": [[True, True, False]],
    }
    assert SkippedLog("").identify(np.zeros((2, 3))) == {}
