"""Runs of distillation, from the pipeline of the tiny model to that of a student."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import dit_video
from dit_video.core import trees
from dit_video.core.errors import MissingError, UserError
from dit_video.diffusion import Lcm
from dit_video.experiment import Student
from dit_video.experiment.recipes.distill import DistillationOptions, make_distillation_experiment
from dit_video.experiment.run import Run
from dit_video.models.conditioning import FrameConditioning
from dit_video.training.losses.distillation import ConsistencyDistillation, DistributionMatching
from dit_video.weights import load as load_weights
from support.interruptions import end_after

OPTIONS = {
    "consistency": DistillationOptions(method="consistency", steps=6, intervals=4, warmup=1, log_every=2, save_every=2),
    "dmd": DistillationOptions(
        method="dmd", steps=4, sampling_steps=2, critic_steps=2, warmup=1, log_every=2, save_every=2
    ),
}


def weights(folder):
    return trees.flatten(load_weights(folder / "pipeline" / "denoiser.safetensors"))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("consistency", marks=[pytest.mark.slow, pytest.mark.nightly]),
        pytest.param("dmd", marks=pytest.mark.slow),
    ],
)
def distilled(request, tiny_run, tmp_path_factory):
    """Return the folder of a finished distillation, to be read only."""
    run = Run.create(
        tmp_path_factory.mktemp("distilled") / "run", make_distillation_experiment(tiny_run, OPTIONS[request.param])
    )
    run.train(tiny_run / "data")
    return run.folder


def test_the_experiment_of_a_student_follows_from_a_run(tiny_run):
    experiment = make_distillation_experiment(tiny_run, OPTIONS["dmd"])
    teacher = dit_video.load(tiny_run).config
    assert (experiment.autoencoder, experiment.autoencoder_from) == (None, str(tiny_run / "pipeline"))
    assert experiment.denoiser.train.distillation == DistributionMatching(guidance=2.0, steps=2, critic_steps=2)
    assert experiment.denoiser.optimizer.learning_rate == 3e-4
    assert experiment.model == Run.open(tiny_run).experiment.model
    assert experiment.data == Run.open(tiny_run).experiment.data
    assert (experiment.sampling.steps, experiment.sampling.guidance.get_scale("text")) == (2, 1.0)
    assert isinstance(experiment.sampling.solver, Lcm)
    assert experiment.evaluation == teacher.evaluation


def test_the_experiment_of_a_student_follows_from_a_pipeline(tiny_run):
    experiment = make_distillation_experiment(
        tiny_run / "pipeline", dataclasses.replace(OPTIONS["consistency"], guidance=1.5)
    )
    teacher = dit_video.load(tiny_run).config
    assert experiment.denoiser.train.distillation == ConsistencyDistillation(guidance=1.5, intervals=4)
    assert experiment.denoiser.optimizer.learning_rate == 1e-3
    assert experiment.data.max_frames == teacher.size.t
    assert experiment.data.max_pixels == teacher.size.h * teacher.size.w
    assert experiment.model == dataclasses.replace(teacher.model, fps=None)  # the run's, which is its clips'


def test_the_student_differs_from_the_teacher_and_shares_its_autoencoder(tiny_run, distilled):
    before, after = weights(tiny_run), weights(distilled)
    assert before.keys() == after.keys()
    assert {path.split("/")[0] for path in before if (before[path] != after[path]).any()} == {"backbone", "text"}
    files = [folder / "pipeline" / "autoencoder.safetensors" for folder in (tiny_run, distilled)]
    for left, right in zip(*(trees.flatten(load_weights(file)).values() for file in files), strict=True):
        np.testing.assert_array_equal(left, right)
    entries = [json.loads(line) for line in (distilled / "denoiser" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(entry["loss"]) for entry in entries)


@pytest.mark.slow
def test_an_interrupted_distillation_ends_with_the_same_student(distilled, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(distilled, folder, ignore=shutil.ignore_patterns("denoiser", "pipeline"), symlinks=True)
    with monkeypatch.context() as patch:
        end_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            Run.open(folder).run_stages()
    newest = Run.open(folder).newest_pipeline()
    assert trees.flatten(newest.denoiser_params).keys() == weights(distilled).keys()
    Run.open(folder).run_stages()
    for path, leaf in weights(folder).items():
        np.testing.assert_array_equal(leaf, weights(distilled)[path])


def test_continuing_with_another_teacher_is_refused(distilled, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(distilled, folder, ignore=shutil.ignore_patterns("pipeline"), symlinks=True)
    (folder / "denoiser" / "start.json").write_text('{"start": "another", "identity": "0"}')
    with pytest.raises(UserError, match="other weights"):
        Run.open(folder).run_stages()


def test_invalid_distillations_are_refused(tiny, tiny_run, tmp_path):
    with pytest.raises(MissingError, match="nowhere"):
        make_distillation_experiment(tmp_path / "nowhere")
    student = Student(init_from=str(tiny_run), distillation=ConsistencyDistillation())
    experiment = tiny.EXPERIMENT.replace_stage("denoiser", train=student)
    first = dataclasses.replace(experiment.denoiser, name="first")
    last = dataclasses.replace(experiment.denoiser, continues="first")
    with pytest.raises(UserError, match=r"train=Student takes a single stage. Leave out the others"):
        dataclasses.replace(experiment, stages=(experiment.autoencoder, first, last))
    with pytest.raises(UserError, match=r"train=Student has no frame conditioning. Leave out frame_conditioning"):
        experiment.replace_model(frame_conditioning=FrameConditioning())
    with pytest.raises(UserError, match="needs packed rows and no distillation"):
        experiment.replace_stage("denoiser", accumulation_steps=2)
