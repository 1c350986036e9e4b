"""Runs of several models: each is a run in a folder of the outer one's, on the same clips."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

import dit_video
from dit_video.core import config_json
from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import read_json
from dit_video.core.storage import read_document, to_storage_path
from dit_video.data.ingest.engine import ingest
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.experiment import Experiment, JoinPipelines, Run, TrainModel, datasets
from dit_video.experiment.checkpoints import list_checkpoints
from dit_video.experiment.launch import open_run
from dit_video.loading import read_config
from dit_video.models.conditioning import LowResolutionClip
from dit_video.sampling.pipeline_config import STEPS, PreviousStep, read_pipeline_config
from support.extending import replace_backbone
from support.latents import generate_latents


def shorten(experiment, steps=4):
    """Return an experiment with a few steps."""
    experiment = dataclasses.replace(experiment, save_every=2, log_every=1)
    for stage in experiment.stages:
        experiment = experiment.replace_stage(stage.name, steps=steps)
    return experiment


@pytest.fixture(scope="module")
def two_models(tiny):
    small = shorten(dataclasses.replace(tiny.EXPERIMENT, evaluation=CaptionEvaluation(trained=1, held_out=1)))
    large = replace_backbone(small, conditioning=(LowResolutionClip(),))
    stages = (TrainModel(name="prior", experiment=small), TrainModel(name="other", experiment=large))
    return Experiment(name="two", data=tiny.EXPERIMENT.data, stages=stages)


@pytest.fixture(scope="module")
def joined_models(two_models):
    join = JoinPipelines(last="other", previous={"prior": PreviousStep(name="low_resolution")})
    return dataclasses.replace(two_models, name="joined", stages=(*two_models.stages, join))


@pytest.fixture(scope="module")
def joined(joined_models, tiny_clips, tmp_path_factory):
    """Return a finished run of joined models, of a folder of clips that is ingested once."""
    run = Run.create(tmp_path_factory.mktemp("joined") / "run", joined_models)
    ingested = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "ingest", lambda *args, **options: ingested.append(args) or ingest(*args, **options))
        run.train(tiny_clips)
    assert len(ingested) == 1
    return run


@pytest.fixture
def joined_copy(joined, tmp_path):
    """Return a copy of the joined run, to be changed."""
    return Path(shutil.copytree(joined.folder, tmp_path / "copy", symlinks=True))


@pytest.fixture(scope="module")
def finished(two_models, joined, tmp_path_factory):
    """Return a finished run of the same models, which nothing joins."""
    run = Run.create(tmp_path_factory.mktemp("several") / "run", two_models)
    for name in ("prior", "other", "data", "goodput"):
        shutil.copytree(joined.folder / name, run.folder / name, symlinks=True)
    return run


def sample(pipeline, **options):
    return generate_latents(pipeline, "a red circle", **{"size": (5, 16, 16), "seed": 3, "steps": 2, **options})


@pytest.mark.slow
def test_each_model_is_a_run_of_its_own_on_the_same_clips(joined):
    for name in ("prior", "other"):
        nested = Run.open(joined.folder / name)
        assert nested.experiment == joined.experiment.get_stage(name).experiment
        assert (nested.folder / "data").resolve() == joined.folder / "data"
        assert dit_video.load(nested.folder).config.provenance["seed"] == "0"
        assert dit_video.load(nested.folder, step=2).config.model == nested.pipeline_config().model
    assert len(list(joined.folder.rglob("*.array_record"))) == 3  # of the clips, and of the latents of each model
    assert all(stage.is_done(joined) for stage in joined.stages)
    files = {path: path.stat().st_mtime_ns for path in joined.folder.rglob("*.safetensors")}
    joined.run_stages()  # nothing is trained again
    assert {path: path.stat().st_mtime_ns for path in joined.folder.rglob("*.safetensors")} == files


@pytest.mark.slow
def test_a_joined_run_is_loaded_at_steps_of_its_last_model_and_while_it_is_unfinished(joined, joined_copy):
    prior, other = (dit_video.load(joined.folder / name) for name in ("prior", "other"))

    def sample_both(last):
        low_resolution = prior.generate("a red circle", size=prior.config.size, seed=3)
        return sample(last, conditioning={"low_resolution": low_resolution})

    expected = sample_both(other)
    np.testing.assert_array_equal(sample(dit_video.load(joined.folder)), expected)
    assert [each.step for each in list_checkpoints(joined.folder)] == [2, 4]
    early = sample_both(dit_video.load(joined.folder / "other", step=2))
    assert np.abs(early - expected).max() > 0
    np.testing.assert_array_equal(sample(dit_video.load(joined.folder, step=2)), early)
    config = read_config(joined_copy)
    shutil.rmtree(joined_copy / "pipeline")
    shutil.rmtree(joined_copy / "other" / "pipeline")
    np.testing.assert_array_equal(sample(dit_video.load(joined_copy)), expected)
    unfinished = read_config(joined_copy)
    assert (unfinished.previous, unfinished.model) == (config.previous, config.model)
    with pytest.raises(MissingError, match=r"no checkpoint of step 3 in .*other"):
        dit_video.load(joined_copy, step=3)


@pytest.mark.slow
def test_a_run_that_joins_nothing_names_its_models(finished, script, tmp_path):
    for options in ({}, {"step": 2}):
        with pytest.raises(UserError, match=r"a run of several models\. Use one of .*run/prior, .*run/other\."):
            dit_video.load(finished.folder, **options)
    for refuse in (
        lambda: script("tools/verify.py", finished.folder).err,
        lambda: script("experiments/distill.py", finished.folder, "--workdir", tmp_path / "student").err,
    ):
        assert f"Use one of {finished.folder}/prior, {finished.folder}/other." in refuse()
    assert read_config(finished.folder) is None


@pytest.mark.slow
def test_models_are_joined_again_after_an_amendment(joined_copy, joined_models):
    small = joined_models.stages[0].experiment
    faster = dataclasses.replace(small, sampling=dataclasses.replace(small.sampling, steps=1))
    before = dit_video.load(joined_copy)
    digests = [before.compute_digest().split("-")]
    for experiment in (faster, faster.replace_stage("denoiser", steps=6)):
        run = Run.create(joined_copy, joined_models.replace_stage("prior", experiment=experiment))
        run.check()
        assert not all(stage.is_done(run) for stage in run.stages)
        run.run_stages()
        assert all(stage.is_done(run) for stage in run.stages)
        changed = dit_video.load(joined_copy)
        assert read_pipeline_config(joined_copy / "pipeline" / STEPS / "low_resolution").sampling.steps == 1
        digests.append(changed.compute_digest().split("-"))
    (last, *others), (prior, same, other) = zip(*digests, strict=True)
    assert others == [last, last]
    assert prior == same != other


@pytest.mark.slow
def test_checkpoints_elsewhere_are_those_of_all_models(two_models, joined, tmp_path):
    run = Run.create(tmp_path / "run", two_models)
    for _ in range(2):
        run.prepare(joined.folder / "data", checkpoints=tmp_path / "checkpoints")
        for stage in run.stages:
            nested = stage.open_run(run)
            assert nested.get_checkpoint_folder("denoiser") == tmp_path / "checkpoints" / stage.name / "denoiser"
            assert run.get_checkpoint_folder(f"{stage.name}/denoiser") == nested.get_checkpoint_folder("denoiser")


@pytest.mark.slow
def test_models_of_a_run_at_an_address_are_nested_there(two_models, tiny_clips, gcs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    address = "gs://bucket/run"
    for _ in range(2):
        with open_run(address, two_models) as run:
            run.prepare(tiny_clips)
            nested = run.stages[0].open_run(run)
            assert str(nested.get_checkpoint_folder("denoiser")) == f"{address}/prior/checkpoints/denoiser"
    own = [f"{name}/{part}" for name in ("other", "prior") for part in ("checkpoints", "latents")]
    assert read_document(to_storage_path(f"{address}/manifest.json"))["linked"] == ["checkpoints", "data", *own]
    with pytest.raises(UserError, match=r"prior has no checkpoint of its denoiser yet"):
        dit_video.load(f"{address}/prior")
    with pytest.raises(MissingError, match=r"no such run: .*/run/decoder"):
        dit_video.load(f"{address}/decoder")
    with pytest.raises(UserError, match="a run of several models"):
        dit_video.load(address)


@pytest.mark.slow
def test_reports_have_the_trainings_of_all_models(joined_copy, finished, script, tmp_path):
    done = script("experiments/evaluate.py", joined_copy)
    assert done.code == 0, done.err
    config = tmp_path / "config.py"
    document = config_json.to_json(finished.experiment)
    config.write_text(f"from dit_video.core import config_json\nEXPERIMENT = config_json.from_json({document})")
    folder = shutil.copytree(finished.folder, tmp_path / "run", symlinks=True)
    done = script("experiments/train.py", config, "--data", folder / "data", "--workdir", folder, "--no-cache")
    assert done.code == 0, done.err
    assert done.out.endswith(f"report: {folder}/report.html\n")
    for path in (joined_copy, folder):
        text = (path / "report.html").read_text()
        for expected in ("Autoencoder of prior", "Denoiser of prior", "Denoiser of other"):
            assert expected in text
    assert "prior: PSNR" in text
    assert "prior/report.html" in text
    assert (folder / "other" / "report.html").is_file()
    assert read_json(joined_copy / "metrics.json")["model"]["parameters"]["low_resolution/backbone"] > 0


@pytest.mark.slow
def test_a_model_has_the_bits_of_a_run_of_its_own(joined, two_models, tmp_path):
    alone = Run.create(tmp_path / "alone", two_models.stages[0].experiment)
    alone.train(joined.folder / "data")
    nested = dit_video.load(joined.folder / "prior")
    np.testing.assert_array_equal(sample(nested), sample(alone.load_pipeline()))


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
