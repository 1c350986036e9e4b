"""Each entry of a training's log has the goodput and badput of the whole run so far."""

import time
from typing import Any

import pytest

from dit_video.training.checkpoint import Checkpoints
from dit_video.training.goodput import GROUPS, read_attempts, summarize
from dit_video.training.hooks.hook import Hook, PeriodicCall
from dit_video.training.hooks.logging import MetricsLog, read_metrics
from dit_video.training.hooks.metric_logs import TensorBoard
from dit_video.training.hooks.throughput import GoodputLog
from dit_video.training.loop import LoopConfig, run
from dit_video.training.time_recorder import TimeRecorder
from support.loop_training import init_state, make_batches, plain_step

NAMES = {"goodput", *(f"badput_{group}" for group in GROUPS if group != "goodput"), "run_seconds"}


def slow_batches(done):
    for batch in make_batches(done):
        time.sleep(0.01)
        yield batch


def validate(_done: int, _state: Any) -> dict[str, float]:
    time.sleep(0.2)
    return {}


def test_entries_have_the_shares_of_the_time_so_far(tmp_path):
    recorder = TimeRecorder(tmp_path / "goodput")
    log, monitoring = MetricsLog(tmp_path / "metrics.jsonl"), PeriodicCall(every=10, function=validate, name="validate")
    with recorder.attempt():
        time.sleep(0.3)
        recorder.resume("denoiser", 0)
        config, hooks = LoopConfig(steps=30, log_every=5), [GoodputLog(recorder), monitoring, log]
        run(plain_step, init_state(), slow_batches, config=config, hooks=hooks, recorder=recorder)
    entries = read_metrics(log.path)
    for entry in entries:
        shares = {name: entry[name] for name in NAMES - {"run_seconds"}}
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares.values()) >= 0
    last = entries[-1]
    for name, seconds in (("startup", 0.3), ("monitoring", 0.6), ("data", 0.3)):
        assert seconds <= last[f"badput_{name}"] * last["run_seconds"] < seconds + 1
    assert last["badput_compile"] * last["run_seconds"] == pytest.approx(entries[0]["compile_seconds"], abs=0.01)
    seconds = [entry["run_seconds"] for entry in entries]
    assert seconds == sorted(seconds)
    # The records say the same as the last entry.
    times = summarize(read_attempts(tmp_path / "goodput"))
    assert times.total / 1e6 == pytest.approx(last["run_seconds"], abs=1)  # the attempt ends after the last entry
    assert times.microseconds["hook/validate"] >= 0.6e6
    assert times.kept_steps == 30


def test_a_training_that_failed_and_was_continued_is_accounted_for(tmp_path):
    def train(*hooks: Hook) -> None:
        recorder = TimeRecorder(tmp_path / "goodput")
        state = init_state() if checkpoints.latest() is None else checkpoints.restore(init_state())[0]
        config, options = LoopConfig(steps=12, log_every=2, save_every=5), {"checkpoints": checkpoints, "hooks": hooks}
        with recorder.attempt():
            recorder.resume("denoiser", int(state.step))
            run(plain_step, state, make_batches, config=config, recorder=recorder, **options)

    def fail(done: int, _state: Any) -> dict[str, float]:
        if done == 9:
            checkpoints.wait()
            raise RuntimeError("power")
        return {}

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(RuntimeError, match="power"):
        train(PeriodicCall(every=1, function=fail))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    train()
    times = summarize(read_attempts(tmp_path / "goodput"))
    assert [each.attempt.ending for each in times.attempts] == ["failed", "finished"]
    assert [each.lost_steps for each in times.attempts] == [4, 0]
    assert [each.kept_steps for each in times.attempts] == [5, 7]
    assert times.microseconds["save"] > 0
    assert times.microseconds["lost"] > 0


def test_event_files_have_them_too(tmp_path):
    pytest.importorskip("tensorboardX")
    recorder = TimeRecorder()
    with recorder.attempt():
        hooks = [GoodputLog(recorder), TensorBoard(tmp_path)]
        config = LoopConfig(steps=4, log_every=2)
        run(plain_step, init_state(), make_batches, config=config, hooks=hooks, recorder=recorder)
    (path,) = tmp_path.iterdir()
    assert not [name for name in NAMES if name.encode() not in path.read_bytes()]


def test_without_an_attempt_there_are_none():
    assert GoodputLog(TimeRecorder()).derive({"loss": 1.0}) == {}
