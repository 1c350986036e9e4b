"""A run is a list of stages, which are skipped when their outputs exist."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.experiment import CurriculumStage, DataConfig, StagedExperiment
from dit_video.experiment.run import Run, StagedRun
from dit_video.tokens import Grid
from support.devices import run_together


@pytest.fixture
def run(tiny_run, tmp_path):
    """Return a copy of the finished run that a test may change."""
    return Run.open(shutil.copytree(tiny_run, tmp_path / "run"))


def due_stages(run):
    return [stage.name for stage in run.stages if stage.is_due(run.runtime)]


def test_a_stage_is_due_until_its_outputs_exist(run):
    assert [stage.name for stage in run.stages] == ["autoencoder", "latents", "denoiser"]
    assert due_stages(run) == []
    shutil.rmtree(run.folder / "pipeline")
    assert due_stages(run) == ["denoiser"]
    shutil.rmtree(run.folder / "latents")
    (run.folder / "autoencoder" / "weights.safetensors").unlink()
    autoencoder, latents, denoiser = run.stages
    assert autoencoder.is_due(run.runtime)
    for stage, missing in ((latents, "autoencoder/weights.safetensors"), (denoiser, "latents/table.json")):
        with pytest.raises(MissingError, match=f"stage {stage.name} reads .*{missing}.* Run the stage before it"):
            stage.is_due(run.runtime)


def test_an_unknown_last_stage_is_refused(run):
    with pytest.raises(UserError, match=r"stage='x' is invalid: .* Use one of autoencoder, latents, denoiser"):
        run.run_stages("x")


def test_curriculum_stages_are_consecutive_and_each_has_its_data(tiny):
    images = CurriculumStage(name="images", steps=4, data=DataConfig(max_pixels=16 * 16, max_frames=1))
    small = dataclasses.replace(images, name="small", data=DataConfig(max_pixels=16 * 16, max_frames=5))
    experiment = dataclasses.replace(tiny.EXPERIMENT, curriculum=(images, small))
    stages = Run(folder=Path("none"), experiment=experiment, command="").stages
    names = ["autoencoder", "images/latents", "images", "small/latents", "small", "latents", "denoiser"]
    assert [stage.name for stage in stages] == names
    trainings = [stage for stage in stages if stage.name in ("images", "small", "denoiser")]
    assert [(stage.start_step, stage.end_step) for stage in trainings] == [(0, 4), (4, 8), (8, 18)]
    assert [stage.experiment.limits.max_frames for stage in trainings] == [1, 5, 9]
    assert [stage.latents for stage in trainings] == [stages[1], stages[3], stages[5]]
    online = dataclasses.replace(tiny.EXPERIMENT, data=dataclasses.replace(tiny.EXPERIMENT.data, cache_latents=False))
    stages_online = Run(folder=Path("none"), experiment=online, command="").stages
    assert [stage.name for stage in stages_online] == ["autoencoder", "denoiser"]
    assert stages[0].experiment.limits.multiple == Grid(4, 16, 16)


def test_a_run_without_stages_is_a_run(tiny, tiny_run, tmp_path):
    experiment = StagedExperiment(name="nothing", data=tiny.EXPERIMENT.data)
    run = StagedRun.create(tmp_path / "run", experiment)
    run.prepare((tiny_run / "data").resolve())
    run.run_stages()
    assert StagedRun.open(tmp_path / "run").experiment == experiment
    with pytest.raises(UserError, match="holds no experiment for Run"):
        Run.open(tmp_path / "run")
    with pytest.raises(UserError, match="the config caches no latents"):
        run.link_latents(tmp_path / "latents")
    with pytest.raises(UserError, match="log_every=0 is invalid"):
        dataclasses.replace(experiment, log_every=0)


@pytest.mark.slow
def test_two_processes_agree_on_the_stages_of_a_curriculum_that_are_due(run):
    shutil.rmtree(run.folder / "pipeline")
    for output in run_together("stages_in_two_processes.py", str(run.folder)):
        # The first six of the ten steps are those of the first stage, which needs no latents any more.
        assert "due: denoiser" in output
