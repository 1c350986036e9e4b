"""A bad clip of many is excluded from a run and listed, instead of ending the run."""

import dataclasses
import json
import shutil

import pytest

from dit_video.core.errors import UserError
from dit_video.experiment import Experiment
from dit_video.experiment.latents import open_latents
from dit_video.experiment.run import EXCLUDED_FILE, Run
from dit_video.scenes import shapes
from dit_video.tokens import Grid

COUNT = 100
SMALL = Grid(1, 8, 16)
REASON = "8x16 pixels, less than one multiple of 16x16"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder of 100 images, of which one is smaller than a multiple of the tiny model."""
    folder = shapes.write_folder(tmp_path_factory.mktemp("images"), count=COUNT, seed=0, sizes=(Grid(1, 16, 16),))
    shapes.render_example(0, seed=1, sizes=(SMALL,)).save(folder / "clips" / "000007.png")
    return folder


def experiment(tiny, **data) -> Experiment:
    """Return the tiny experiment on these clips, with three steps of the denoiser."""
    config = dataclasses.replace(tiny.EXPERIMENT.data, **{"held_out": (), **data})
    return dataclasses.replace(tiny.EXPERIMENT.replace_stage("denoiser", steps=3), data=config)


def begun(folder, config, tiny_run, images):
    """Return a run that is prepared, and whose autoencoder is trained."""
    run = Run.create(folder, config)
    (folder / "autoencoder").mkdir()
    shutil.copy(tiny_run / "autoencoder" / "weights.safetensors", folder / "autoencoder")
    run.prepare(images)
    return run


@pytest.mark.slow
def test_one_of_100_clips_that_is_too_small_is_excluded_and_99_are_trained_on(tiny, tiny_run, images, tmp_path, capsys):
    run = begun(tmp_path / "run", experiment(tiny), tiny_run, images)
    assert f"1 of 100 clips cannot be used: clips/000007.png has {REASON}" in capsys.readouterr().err
    listed = json.loads((run.folder / EXCLUDED_FILE).read_text())
    assert listed == {"training": {"clips": COUNT, "excluded": {"clips/000007.png": REASON}}}
    run.run_stages()
    latents = open_latents(run, run.folder / "latents")
    assert len(latents) == COUNT - 1
    assert "clips/000007.png" not in latents.clips
    rows = json.loads((run.folder / "denoiser" / "rows.json").read_text())
    assert rows["examples"] == COUNT - 1
    assert run.pipeline_config().size == Grid(1, 16, 16)
    # A run that is continued plans the same rows.
    again = Run.open(run.folder)
    batches = again.experiment.denoiser.open_inputs(again)[1](1)
    assert batches.hash == rows["plan"]
    batches.close()


def test_the_share_of_excluded_clips_can_be_limited_further(tiny, tiny_run, images, tmp_path):
    with pytest.raises(UserError, match=rf"1 of 100 clips cannot be used: clips/000007\.png has {REASON}.* At most 0 "):
        begun(tmp_path / "run", experiment(tiny, max_excluded_share=0.0), tiny_run, images)
    with pytest.raises(UserError, match=r"max_excluded_share=2\.0 is invalid"):
        experiment(tiny, max_excluded_share=2.0)


def test_a_held_out_clip_that_cannot_be_used_is_listed_and_does_not_count_as_a_training_clip(
    tiny, tiny_run, images, tmp_path
):
    held_out = ("clips/000006.png", "clips/000007.png")
    run = begun(tmp_path / "run", experiment(tiny, held_out=held_out, max_excluded_share=0.0), tiny_run, images)
    assert len(run.training_clips) == COUNT - 2
    assert [info.name for info in run.held_out_clips.infos] == ["clips/000006.png"]
    listed = json.loads((run.folder / EXCLUDED_FILE).read_text())
    assert listed == {"held_out": {"clips": 2, "excluded": {"clips/000007.png": REASON}}}


def test_clips_that_are_encoded_as_they_are_read_are_the_usable_ones(tiny, tiny_run, images, tmp_path):
    run = begun(tmp_path / "run", experiment(tiny, cache_latents=False), tiny_run, images)
    batches = run.experiment.denoiser.open_inputs(run)[1](0)
    assert batches.summarize(devices=1)["examples"] == COUNT - 1
    batches.close()
