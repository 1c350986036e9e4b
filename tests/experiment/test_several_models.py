"""Runs of several models: each is a run in a folder of the outer one's, on the same clips."""

import dataclasses
import shutil

import numpy as np
import pytest

import dit_video
from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.experiment import Experiment, JoinPipelines, Run, TrainModel
from dit_video.sampling.pipeline_config import PreviousStep
from support.latents import generate_latents


def shorten(experiment, steps=4):
    """Return an experiment with a few steps."""
    experiment = dataclasses.replace(experiment, save_every=2, log_every=1)
    for stage in experiment.stages:
        experiment = experiment.replace_stage(stage.name, steps=steps)
    return experiment


@pytest.fixture(scope="module")
def two_models(tiny):
    model = TrainModel(name="prior", experiment=shorten(tiny.EXPERIMENT))
    return Experiment(name="two", data=tiny.EXPERIMENT.data, stages=(model, dataclasses.replace(model, name="other")))


@pytest.fixture(scope="module")
def finished(two_models, tiny_run, tmp_path_factory):
    run = Run.create(tmp_path_factory.mktemp("several") / "run", two_models)
    run.train((tiny_run / "data").resolve())
    return run


@pytest.mark.slow
def test_each_model_is_a_run_of_its_own_on_the_same_clips(finished, tiny_run):
    for name in ("prior", "other"):
        nested = Run.open(finished.folder / name)
        assert nested.experiment == finished.experiment.get_stage(name).experiment
        assert (nested.folder / "data").resolve() == (tiny_run / "data").resolve()
        assert dit_video.load(nested.folder).config.provenance["seed"] == "0"
        assert dit_video.load(nested.folder, step=2).config.model == nested.pipeline_config().model
    assert all(stage.is_done(finished) for stage in finished.stages)
    files = {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*.safetensors")}
    finished.run_stages()  # nothing is trained again
    assert {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*.safetensors")} == files


@pytest.mark.slow
def test_a_model_has_the_bits_of_a_run_of_its_own(finished, two_models, tiny_run, tmp_path):
    alone = Run.create(tmp_path / "alone", two_models.stages[0].experiment)
    alone.train((tiny_run / "data").resolve())
    sizes = {"size": (5, 16, 16), "seed": 3, "steps": 2}
    expected = generate_latents(alone.load_pipeline(), "a red circle", **sizes)
    nested = dit_video.load(finished.folder / "prior")
    np.testing.assert_array_equal(generate_latents(nested, "a red circle", **sizes), expected)


@pytest.mark.slow
def test_the_time_of_each_training_is_recorded_under_its_path(finished):
    lines = (finished.folder / "goodput" / "0001.jsonl").read_text()
    assert '"prior/denoiser"' in lines
    assert '"other/autoencoder"' in lines


@pytest.mark.slow
def test_fields_of_a_nested_model_are_amended_by_its_name(finished, two_models, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "run", symlinks=True)
    longer = two_models.replace_stage("prior", experiment=shorten(two_models.stages[0].experiment, steps=6))
    longer = dataclasses.replace(longer, stages=(longer.stages[0], longer.stages[1]))
    shutil.rmtree(folder / "prior" / "autoencoder")  # whose steps may not change any more
    run = Run.create(folder, longer)
    assert {change.path for change in run.amendments[0].changes} == {"prior.autoencoder.steps", "prior.denoiser.steps"}
    other = two_models.stages[1].experiment
    changed = two_models.replace_stage("other", experiment=dataclasses.replace(other, seed=7))
    with pytest.raises(UserError, match=r"another config \(other\.seed is 0 there and 7 here\)"):
        Run.create(finished.folder, changed)
    assert read_json(finished.folder / "experiment.json").get("amendments") is None


def test_a_join_of_models_that_do_not_exist_is_refused(two_models):
    join = JoinPipelines(last="prior", previous={"decoder": PreviousStep(name="color")})
    with pytest.raises(UserError, match=r"'decoder' is invalid: no earlier stage .* Use one of prior, other"):
        dataclasses.replace(two_models, stages=(*two_models.stages, join))
    join = dataclasses.replace(join, previous={"other": PreviousStep(name="color")})
    with pytest.raises(UserError, match=r"name='color' of a step is invalid: this model has no such conditioning"):
        dataclasses.replace(two_models, stages=(*two_models.stages, join))
