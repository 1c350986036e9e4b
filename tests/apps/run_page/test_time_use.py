"""The parts of a run's time add up to the time that passed, with restarts and entries of older versions."""

import math
import time

import pytest

from dit_video.apps.run_page.metrics_reader import MetricsReader
from dit_video.apps.run_page.time_use import TimeUseCounter
from dit_video.training import loop
from dit_video.training.hooks.hook import PeriodicCall
from dit_video.training.hooks.logging import MetricsLog
from dit_video.training.loop import LoopConfig
from support.loop_training import init_state, make_batches, step, train


def compute_time_use(entries):
    return TimeUseCounter().update(entries)


FIRST = {
    "step": 10.0,
    "first_step_seconds": 50.0,
    "first_batch_seconds": 8.0,
    "compile_seconds": 40.0,
    "step_seconds": 1.0,
    "data_wait": 0.25,
    "interval_seconds": 62.0,
    "validate_seconds": 3.0,
    "unix_seconds": 1000.0,
}
NEXT = {
    "step": 20.0,
    "step_seconds": 2.0,
    "data_wait": 0.5,
    "interval_seconds": 30.0,
    "save_seconds": 6.0,
    "validate_seconds": 3.0,
    "hook_seconds": 1.0,
    "unix_seconds": 1030.0,
}


def test_the_parts_of_an_interval_add_up_to_it():
    use = compute_time_use([FIRST])
    assert (use.compilation, use.checkpoints, use.hooks, use.restarts) == (40, 0, {"validate": 3}, 0)
    assert use.data == 8 + 0.25 * 9
    assert use.steps == 62 - 40 - 3 - use.data
    assert use.total == 62
    use = compute_time_use([FIRST, NEXT])
    assert use.hooks == {"validate": 6, "hook": 1}
    assert use.checkpoints == 6
    assert use.data == 8 + 0.25 * 9 + 0.5 * 20
    assert use.total == 62 + 30
    assert use.lost_share == pytest.approx(1 - use.steps / 92)
    assert use.is_complete


def test_time_between_processes_is_that_of_restarts():
    again = {**FIRST, "step": 30.0, "unix_seconds": 1030.0 + 200 + 62}
    use = compute_time_use([FIRST, NEXT, again])
    assert use.restarts == 200
    assert use.total == 62 + 30 + 62 + 200


def test_entries_are_added_as_they_come_and_anew_after_a_log_was_cut():
    again = {**FIRST, "step": 30.0, "unix_seconds": 1030.0 + 200 + 62}
    counter = TimeUseCounter()
    for entries in ([], [FIRST], [FIRST], [FIRST, NEXT], [FIRST, NEXT, again], [FIRST, again], [dict(FIRST), NEXT], []):
        assert counter.update(entries) == compute_time_use(entries)
    before = counter.update([FIRST])
    counter.update([FIRST, NEXT])
    assert before == compute_time_use([FIRST])  # a result stays as it is


def test_a_log_of_an_older_version_has_steps_and_waits_alone():
    entries = [{"step": float(step), "step_seconds": 2.0, "data_wait": 0.25, "loss": 1.0} for step in (10, 20)]
    use = compute_time_use(entries)
    assert (use.steps, use.data, use.total) == (30, 10, 40)
    assert not use.is_complete
    assert compute_time_use([]).lost_share is None


def test_invalid_times_count_as_none():
    bad = {**NEXT, "save_seconds": math.nan, "compile_seconds": -5.0, "data_wait": 7.0, "unix_seconds": math.nan}
    use = compute_time_use([FIRST, bad])
    assert (use.checkpoints, use.compilation, use.restarts) == (0, 40, 0)
    assert min(use.steps, use.data, use.total) >= 0


def test_the_log_of_a_training_gives_where_its_time_went(tmp_path):
    def batches(done):
        for batch in make_batches(done):
            time.sleep(0.01)
            yield batch

    def validate(_done, _state):
        time.sleep(0.2)
        return {}

    start = time.time()
    hooks = [MetricsLog(tmp_path / "m.jsonl"), PeriodicCall(every=10, function=validate, name="validate")]
    loop.run(step, init_state(), batches, config=LoopConfig(steps=30, log_every=5), hooks=hooks)
    seconds = time.time() - start
    use = compute_time_use(MetricsReader(tmp_path / "m.jsonl").read())
    assert use.hooks["validate"] == pytest.approx(0.6, rel=0.3)
    assert 0.1 < use.data < 0.3 + 0.5 * seconds
    assert use.compilation > 0
    assert 0.5 * seconds < use.total < seconds
    train(tmp_path / "other", LoopConfig(steps=4, log_every=2, save_every=1))
    assert compute_time_use(MetricsReader(tmp_path / "other" / "metrics.jsonl").read()).checkpoints > 0
