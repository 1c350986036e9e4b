"""Checkpoints of a run are listed while they are written and removed, and each can be loaded by its step."""

import shutil

import numpy as np
import pytest

import dit_video
from dit_video.core.errors import MissingError, UserError
from dit_video.core.trees import flatten
from dit_video.experiment.checkpoints import list_checkpoints
from dit_video.experiment.run import Run


@pytest.fixture
def copy(tiny_run, tmp_path):
    """Return a copy of the finished run that a test may change."""
    return shutil.copytree(tiny_run, tmp_path / "run")


def test_the_complete_checkpoints_of_each_model_are_listed(tiny_run):
    for name, steps in (("denoiser", [8, 10]), ("autoencoder", [4, 8])):
        checkpoints = list_checkpoints(tiny_run, name)
        assert [each.step for each in checkpoints] == steps
        folder = tiny_run / name / "checkpoints"
        for each in checkpoints:
            files = [path for path in (folder / str(each.step)).rglob("*") if path.is_file()]
            assert each.size == sum(path.stat().st_size for path in files) > 1000
            assert each.unix_seconds == (folder / str(each.step)).stat().st_mtime


def test_what_is_not_complete_is_not_listed(copy):
    folder = copy / "denoiser" / "checkpoints"
    (folder / "12.orbax-checkpoint-tmp-3").mkdir()
    (folder / "notes").mkdir()
    shutil.rmtree(folder / "8")
    assert [each.step for each in list_checkpoints(copy)] == [10]
    shutil.rmtree(copy / "denoiser")
    assert list_checkpoints(copy) == ()
    assert list_checkpoints(copy / "nowhere") == ()


def test_checkpoints_elsewhere_are_listed(copy, tiny, tmp_path, memory):
    shutil.move(copy / "denoiser" / "checkpoints", tmp_path / "bucket" / "denoiser")
    (copy / "checkpoints").symlink_to(tmp_path / "bucket")
    assert [each.step for each in list_checkpoints(copy)] == [8, 10]
    run = Run.create(tmp_path / "remote", tiny.EXPERIMENT)
    run.link_checkpoints(memory)
    assert list_checkpoints(run.folder) == ()
    from upath import UPath

    (UPath(memory) / "denoiser" / "20" / "meta").write_text("x")
    (checkpoint,) = list_checkpoints(run.folder)
    assert checkpoint == (20, None, None)


def test_a_checkpoint_is_loaded_by_its_step(tiny_run):
    finished, last, previous = (flatten(dit_video.load(tiny_run, step=step).denoiser_params) for step in (None, 10, 8))
    assert finished.keys() == last.keys() == previous.keys()
    for path, array in finished.items():
        np.testing.assert_array_equal(array, last[path])
    assert any(not np.array_equal(last[path], previous[path]) for path in last)
    raw = flatten(dit_video.load(tiny_run, step=8, ema=0).denoiser_params)
    assert any(not np.array_equal(raw[path], previous[path]) for path in raw)


def test_a_step_without_a_checkpoint_names_those_there_are(tiny_run, copy):
    with pytest.raises(MissingError, match=r"no checkpoint of step 7 in .*Available steps: 8, 10"):
        dit_video.load(tiny_run, step=7)
    with pytest.raises(UserError, match=r"is not a run and .*; leave out step"):
        dit_video.load(tiny_run / "pipeline", step=8)


@pytest.mark.slow
def test_sample_loads_a_checkpoint_by_its_step(tiny_run, tmp_path, script):
    clips = []
    for step in (8, 10):
        out = tmp_path / f"{step}.apng"
        options = ("--prompt", "a red circle", "--out", out, "--step", step, "--no-cache")
        done = script("experiments/sample.py", tiny_run, *options)
        assert done.code == 0, done.err
        clips.append(out.read_bytes())
    assert clips[0] != clips[1]
    done = script("experiments/sample.py", tiny_run, "--prompt", "x", "--out", tmp_path / "x.apng", "--step", "3")
    assert done.code == 2
    assert "no checkpoint of step 3" in done.err
    assert "Available steps: 8, 10" in done.err
