"""A run has a list of stages, which are skipped when their outputs exist."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.experiment import DataConfig, Experiment, Run, Stage
from dit_video.tokens import Grid
from support.devices import run_together


@pytest.fixture
def run(tiny_run, tmp_path):
    """Return a copy of the finished run that a test may change."""
    return Run.open(shutil.copytree(tiny_run, tmp_path / "run"))


def list_due_stages(run):
    return [stage.name for stage in run.stages if not stage.is_done(run)]


def test_a_stage_is_due_until_its_outputs_exist(run):
    assert list_due_stages(run) == []
    shutil.rmtree(run.folder / "latents")  # which the denoiser's training alone needs
    assert list_due_stages(run) == []
    shutil.rmtree(run.folder / "pipeline")
    assert list_due_stages(run) == ["denoiser"]
    (run.folder / "autoencoder" / "weights.safetensors").unlink()
    assert list_due_stages(run) == ["autoencoder", "denoiser"]
    with pytest.raises(MissingError, match="no trained autoencoder yet; continue its training with"):
        run.experiment.denoiser.run(run)


def test_an_unknown_last_stage_is_refused(run):
    with pytest.raises(UserError, match=r"stage='latents' is invalid: .* Use one of autoencoder, denoiser"):
        run.run_stages("latents")


def test_stages_of_the_denoiser_are_consecutive_and_each_has_its_data(tiny):
    autoencoder, denoiser = tiny.EXPERIMENT.stages
    images = dataclasses.replace(denoiser, name="images", steps=4, data=DataConfig(max_pixels=16 * 16, max_frames=1))
    small = dataclasses.replace(
        images, name="small", continues="images", data=dataclasses.replace(images.data, max_frames=5)
    )
    stages = (autoencoder, images, small, dataclasses.replace(denoiser, continues="small"))
    run = Run(folder=Path("none"), experiment=dataclasses.replace(tiny.EXPERIMENT, stages=stages))
    trainings = run.experiment.denoiser_stages
    assert [stage.name for stage in trainings] == ["images", "small", "denoiser"]
    assert [stage.get_start_step(run) for stage in trainings] == [0, 4, 8]
    assert [stage.adapt_run(run).limits.max_frames for stage in trainings] == [1, 5, 9]
    folders = [Path("none/stages/images"), Path("none/stages/small"), Path("none")]
    assert [stage.get_folder(run) for stage in trainings] == folders
    assert run.limits.multiple == Grid(4, 16, 16)


@pytest.mark.parametrize("name", ["a/b", "data", "stages", "model", "seed", "autoencoder", "denoiser"])
def test_a_stage_needs_a_folder_of_its_own(tiny, name):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Anything(Stage):
        name: str

        def is_done(self, run):
            return True

        def run(self, run):
            pass

    with pytest.raises(UserError, match=f"stage name='{name}' is invalid: .* Use another name"):
        Experiment(name="anything", data=tiny.EXPERIMENT.data, stages=(Anything(name=name),))


def test_a_run_without_stages_is_a_run(tiny, tiny_run, tmp_path):
    experiment = Experiment(name="nothing", data=tiny.EXPERIMENT.data)
    run = Run.create(tmp_path / "run", experiment)
    run.train((tiny_run / "data").resolve())
    assert Run.open(tmp_path / "run").experiment == experiment
    with pytest.raises(UserError, match=r"model=None is invalid: .* Use model=ModelConfig"):
        run.codec()
    with pytest.raises(UserError, match="the config caches no latents"):
        run.link_latents(tmp_path / "latents")
    with pytest.raises(UserError, match="log_every=0 is invalid"):
        dataclasses.replace(experiment, log_every=0)


@pytest.mark.slow
def test_two_processes_agree_on_the_stages_of_a_curriculum_that_are_due(run):
    shutil.rmtree(run.folder / "pipeline")
    for output in run_together("stages_in_two_processes.py", str(run.folder)):
        # The first six of the ten steps are those of the first stage.
        assert "due: denoiser" in output
