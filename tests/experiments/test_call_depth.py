"""From a script to the model's call are few functions of this repository."""

import shutil
import traceback
from pathlib import Path

import jax
import pytest

from dit_video.core.errors import UserError
from dit_video.models.backbones.dit.model import Dit

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT / name for name in ("dit_video", "experiments", "tests", "tools")]
MAX_DEPTH = 7
REACHED = "the training reached the model"
COMPREHENSIONS = {"<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"}


def is_own(filename: str) -> bool:
    """Return True for a file of this repository, not of a virtual environment in its root."""
    return any(Path(filename).is_relative_to(folder) for folder in FOLDERS)


@pytest.fixture
def stacks(monkeypatch):
    """Return the list of call stacks of the model: functions of this repository after `main`, the model's included."""
    call, recorded = Dit.__call__, []
    jax.clear_caches()  # a program that another test has compiled would not call the model again

    def probe(self, *arguments, **keywords):
        frames = [frame for frame in traceback.extract_stack() if is_own(frame.filename)]
        names = [f"{Path(frame.filename).stem}.{frame.name}" for frame in frames if frame.name not in COMPREHENSIONS]
        starts = [index for index, frame in enumerate(names) if frame.endswith(".main")]
        recorded.append(names[starts[-1] + 1 :])
        if "loop.run" in recorded[-1]:
            raise UserError(REACHED)  # what follows the training calls the model as sampling does
        return call(self, *arguments, **keywords)

    monkeypatch.setattr(Dit, "__call__", probe)
    return recorded


def test_training_reaches_the_model_in_seven_calls(script, tiny_run, tiny_clips, tmp_path, stacks):
    ignored = shutil.ignore_patterns("denoiser", "pipeline")
    run = shutil.copytree(tiny_run, tmp_path / "run", ignore=ignored, symlinks=True)
    ended = script("experiments/train.py", ROOT / "tests/support/tiny.py", "--data", tiny_clips, "--workdir", run)
    assert REACHED in ended.err
    training = [stack for stack in stacks if "loop.run" in stack]
    assert training
    assert max(map(len, training)) <= MAX_DEPTH, training[-1]


def test_sampling_reaches_the_model_in_seven_calls(script, tiny_run, tmp_path, stacks):
    arguments = ("--prompt", "a red circle moving left", "--size", "5x16x16", "--out", tmp_path / "clip.mp4")
    ended = script("experiments/sample.py", tiny_run, *arguments)
    assert ended.code == 0, ended.err
    assert stacks
    assert max(map(len, stacks)) <= MAX_DEPTH, stacks[-1]
