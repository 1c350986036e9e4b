"""A run through train.py that is killed, stopped and resumed accounts for all of its time."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dit_video.training.goodput import read_attempts, read_run_times
from dit_video.training.hooks.logging import read_metrics
from support.devices import HANG, make_environment, wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE_EVERY = 400, 40


def start(run, clips, output):
    options = ("--denoiser.steps", STEPS, "--save-every", SAVE_EVERY, "--log-every", 5)
    script = (sys.executable, "experiments/train.py", "tests/support/tiny.py", "--data", clips, "--workdir", run)
    command = [str(part) for part in (*script, *options)]
    return subprocess.Popen(command, cwd=ROOT, env=make_environment(1), stdout=output, stderr=output)


def get_recorded_step(run, attempt):
    """Return the newest step of the denoiser in the records of an attempt; 0 before there is one."""
    attempts = read_attempts(run / "goodput")
    records = attempts[attempt - 1].records if len(attempts) >= attempt else ()
    return max((record.step for record in records if record.training == "denoiser"), default=0)


def get_resumed_step(run, attempt):
    """Return the step of the denoiser that an attempt resumed from; infinity before it did."""
    attempts = read_attempts(run / "goodput")
    records = attempts[attempt - 1].records if len(attempts) >= attempt else ()
    return next((record.start_step for record in records if record.training == "denoiser"), math.inf)


def test_a_run_that_is_killed_stopped_and_resumed_has_all_of_its_time(tiny_clips, tmp_path, script):
    run, begin = tmp_path / "run", time.time()
    with (tmp_path / "output").open("w") as output:
        killed = start(run, tiny_clips, output)
        try:
            wait_until((run / "denoiser" / "checkpoints" / str(SAVE_EVERY)).is_dir)
            # Between two saves, with some steps that will be lost.
            wait_until(lambda: get_recorded_step(run, 1) > SAVE_EVERY and get_recorded_step(run, 1) % SAVE_EVERY > 4)
        finally:
            killed.kill()
        killed.wait(HANG)
        recorded = get_recorded_step(run, 1)
        time.sleep(1.5)
        stopped = start(run, tiny_clips, output)
        try:
            wait_until(lambda: get_recorded_step(run, 2) > get_resumed_step(run, 2))
            stopped.send_signal(signal.SIGTERM)
            assert stopped.wait(HANG) == 0
        finally:
            stopped.kill()
        assert start(run, tiny_clips, output).wait(HANG) == 0
    end = time.time()
    times = read_run_times(run)
    first, _, third = times.attempts
    resumed, continued = (get_resumed_step(run, number) for number in (2, 3))

    # Lost steps are those behind the checkpoint that the second attempt resumed from.
    assert 0 < resumed <= recorded
    assert resumed % SAVE_EVERY == 0
    assert [each.lost_steps for each in times.attempts] == [recorded - resumed, 0, 0]
    assert times.kept_steps == 8 + STEPS  # of the autoencoder and the denoiser
    assert first.microseconds["lost"] > 0
    assert continued > resumed
    assert [each.attempt.ending for each in times.attempts] == ["", "stopped", "finished"]

    # All of the time of day is there, from the start of the first process on, and every attempt starts and restores.
    assert times.total == third.attempt.end - first.attempt.begin
    assert first.attempt.begin / 1e6 == pytest.approx(begin, abs=1)
    assert end - 20 < third.attempt.end / 1e6 < end  # the process has the end of Python's interpreter behind it
    assert times.microseconds["idle"] / 1e6 > 1.5
    assert {"startup", "compile", "step", "data", "save", "stage/latents", "evaluation"} <= times.microseconds.keys()
    for each in times.attempts:
        assert each.microseconds["startup"] > 0.5e6  # Python imports JAX
        assert ("restore" in each.microseconds) == (each is not first)
        assert min(each.microseconds.values()) >= 0

    # The log, the report and the command have the same.
    entries = read_metrics(run / "denoiser" / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == [*range(5, STEPS, 5), STEPS]
    last = entries[-1]
    shares = [value for name, value in last.items() if name == "goodput" or name.startswith("badput_")]
    assert len(shares) == 8
    assert sum(shares) == pytest.approx(1)
    evaluated = sum(times.microseconds[name] for name in ("evaluation", "report")) / 1e6
    assert last["run_seconds"] == pytest.approx(times.total / 1e6 - evaluated, abs=5)
    assert last["goodput"] * last["run_seconds"] == pytest.approx(times.microseconds["step"] / 1e6, rel=0.05)
    page = (run / "report.html").read_text()
    assert "Where the time went" in page
    assert "steps that were taken again" in page
    assert "not running for" in page
    printed = script("tools/goodput.py", run)
    assert printed.code == 0
    assert f"{8 + STEPS} steps kept, {recorded - resumed} taken again; attempts: 3" in printed.out
    document = json.loads(script("tools/goodput.py", run, "--json").out)
    assert document["goodput"] == times.goodput
    assert sum(document["seconds"].values()) == pytest.approx(times.total / 1e6)
