"""Log, cost and learning rates of the self-check."""

import dataclasses
import shutil
import time

import numpy as np
import pytest

from dit_video.experiment.run import Run
from dit_video.experiment.self_check import hook
from dit_video.experiment.self_check.hook import SelfCheck
from dit_video.experiment.self_check.step_checks import compute_learning_rate
from dit_video.experiment.self_check.subject import FILE, MAX_MESSAGES, Problem, ProblemLog
from dit_video.training.hooks import logging
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant, Cosine, WarmupStableDecay
from support.devices import check_on_eight_devices

STEPS, FIRST, INTERVAL = 250, 60, 120


@pytest.mark.parametrize("kind", [Constant, Cosine, WarmupStableDecay])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_learning_rates_are_those_of_the_optimizer(kind, warmup):
    config = AdamW(learning_rate=3e-4, schedule=kind(warmup=warmup))
    rates = config.make_schedule(steps=50)
    for update in range(50):
        assert compute_learning_rate(config, 50, update) == pytest.approx(float(rates(update)), rel=1e-4, abs=1e-10)


def test_all_problems_are_logged_and_the_first_of_each_check_printed(tmp_path, capsys):
    log = ProblemLog(tmp_path / FILE)
    log.add(1, [])
    assert (tmp_path / FILE).read_text() == ""
    log.add(2, [Problem("latents", f"clip {number}") for number in range(5)] + [Problem("ema", "moved")])
    assert len((tmp_path / FILE).read_text().splitlines()) == 6
    printed = "".join(capsys.readouterr())
    assert printed.count("latents: clip") == MAX_MESSAGES
    assert "self-check, step 2: ema: moved" in printed


def test_other_processes_print_what_is_theirs_alone(tmp_path, capsys):
    log = ProblemLog(tmp_path / FILE, process=3)
    log.add(2, [Problem("rows", "twice")], is_local=True)
    log.add(2, [Problem("ema", "moved")])
    assert capsys.readouterr().err == "self-check, step 2, process 3: rows: twice\n"
    assert not (tmp_path / FILE).exists()


@pytest.mark.nightly
def test_context_parallelism_is_compared_with_one_device(tiny_clips):
    check_on_eight_devices("context_parallel_self_check.py", str(tiny_clips))


@pytest.mark.slow
def test_a_long_run_spends_less_than_a_hundredth_of_its_time_on_checks(tiny, tiny_run, tmp_path, monkeypatch):
    copy = shutil.copytree(tiny_run, tmp_path / "run")
    seconds, real = {}, SelfCheck.on_step

    def on_step(self, step, state, metrics):
        start = time.perf_counter()
        real(self, step, state, metrics)
        seconds[step] = time.perf_counter() - start, start

    monkeypatch.setattr(SelfCheck, "on_step", on_step)
    interval = hook._INTERVAL
    monkeypatch.setattr(hook, "_INTERVAL", INTERVAL)
    monitoring = dataclasses.replace(tiny.EXPERIMENT.monitoring, self_check=True)
    experiment = dataclasses.replace(tiny.EXPERIMENT, monitoring=monitoring, save_every=250)
    experiment = experiment.replace_stage("denoiser", steps=STEPS)
    for folder in ("denoiser", "pipeline"):
        (copy / folder).rename(copy / f"old-{folder}")
    run = dataclasses.replace(Run.open(copy), experiment=experiment)
    run.run_stages()
    assert (copy / "denoiser" / FILE).read_text() == ""
    assert len(logging.read_metrics(copy / "denoiser" / "metrics.jsonl")) > 1
    later = {step: each for step, each in seconds.items() if step >= FIRST}
    period = np.median(np.diff([start for _, start in later.values()]))
    checks = [later[step][0] + later[step + 1][0] for step in range(INTERVAL, STEPS, INTERVAL)]
    others = np.median([duration for duration, _ in later.values()])
    share = (np.mean(checks) / interval + others) / period
    print(f"{share:.2%} of {period * 1e3:.1f} ms a step; {np.mean(checks) * 1e3:.0f} ms every {interval} steps")
    assert share < 0.01
