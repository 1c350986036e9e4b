"""Students that check themselves: good ones have no problem, and mistakes of their losses and times are named."""

import dataclasses
import json

import pytest

from dit_video.experiment.recipes.distill import DistillationOptions, make_distillation_experiment
from dit_video.experiment.run import Run
from dit_video.experiment.self_check.subject import FILE
from dit_video.tokens import expand_to_tokens
from dit_video.training.hooks.metric_logs import MonitoringConfig
from dit_video.training.losses.distillation import MatchingLoss, MatchingStep

OPTIONS = {"steps": 24, "sampling_steps": 2, "intervals": 4, "critic_steps": 1, "warmup": 1, "save_every": 24}


def train(tiny_run, folder, *, sampled=2, **options):
    """Train a student that checks itself, and return the problems."""
    experiment = make_distillation_experiment(tiny_run, DistillationOptions(**(OPTIONS | options)))
    sampling = dataclasses.replace(experiment.sampling, steps=sampled)
    monitoring = MonitoringConfig(self_check=True)
    run = Run.create(folder, dataclasses.replace(experiment, sampling=sampling, monitoring=monitoring))
    run.take(tiny_run / "data")
    run.run_stages("denoiser")
    return [json.loads(line) for line in (folder / "denoiser" / FILE).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"method": "dmd"},
        pytest.param({"method": "dmd", "train": "lora"}, marks=pytest.mark.nightly),
        pytest.param({"method": "consistency"}, marks=pytest.mark.nightly),
    ],
    ids=lambda options: " ".join(options.values()),
)
def test_a_good_student_has_no_problem(tiny_run, tmp_path, options):
    assert train(tiny_run, tmp_path / "run", **options) == []


def train_the_critic_by_the_students_loss(monkeypatch):
    monkeypatch.setattr(MatchingStep, "_compute_critic_loss", MatchingStep._compute_loss)


def train_a_copy_of_the_teacher(monkeypatch):
    """Let the critic's loss be that of the teacher's weights, so that the critic keeps its own."""

    def compute_loss(self, params, rows, step, teacher):
        return self.loss.critic_loss(teacher, params["student"], rows, step), {}

    monkeypatch.setattr(MatchingStep, "_compute_critic_loss", compute_loss)


def train_at_squared_times(monkeypatch):
    def expand(self, time, rows):
        return expand_to_tokens(time**2, rows.segments)[..., None]

    monkeypatch.setattr(MatchingLoss, "shift_times", expand)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("inject", "check", "message"),
    [
        (train_the_critic_by_the_students_loss, "gradient", "the loss of the critic has a gradient for the student"),
        (train_a_copy_of_the_teacher, "trained_parameters", "of the critic is trained, but its loss does not move it"),
        (train_at_squared_times, "times", "steps of sampling start at times 0.500"),
    ],
)
def test_a_mistake_in_a_students_loss_is_named(tiny_run, tmp_path, monkeypatch, inject, check, message):
    inject(monkeypatch)
    problems = train(tiny_run, tmp_path / "run", method="dmd", steps=1, save_every=1)
    assert any(problem["check"] == check and message in problem["message"] for problem in problems)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("method", "steps", "message"),
    [
        ("dmd", 1, "the student is trained at times 0.500; steps of sampling start at 1.000"),
        ("consistency", 3, "steps of sampling start at times 0.667"),
    ],
)
def test_a_student_is_sampled_at_times_of_its_training(tiny_run, tmp_path, method, steps, message):
    problems = train(tiny_run, tmp_path / "run", method=method, steps=1, sampled=steps)
    assert [(problem["check"], message in problem["message"]) for problem in problems] == [("times", True)]
