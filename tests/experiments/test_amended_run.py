"""A run of train.py that continues with another mesh, attention and accumulation has the undisturbed run's losses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dit_video.training.hooks.logging import read_metrics
from support.devices import HANG, make_environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("--denoiser.batch", "8", "--log-every", "1", "--keep.newest", "10", "--parallel.data", "1")


def train(run: Path, clips: Path, *options: str, devices: int) -> str:
    """Train on so many devices, and return what train.py prints on stderr."""
    command = ["experiments/train.py", "tests/support/tiny.py", "--data", clips, "--workdir", run, *OPTIONS, *options]
    command = [sys.executable, *map(str, command)]
    environment = make_environment(devices)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT, timeout=HANG)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_half_the_devices_continue_with_the_same_losses(tiny_clips, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert "amended" not in train(whole, tiny_clips, "--parallel.fsdp", "4", "--parallel.context", "2", devices=8)
    options = ("--parallel.fsdp", "4", "--denoiser.accumulation-steps", "2", "--model.backbone.attention", "chunked")
    shutil.copytree(whole, run, symlinks=True)
    shutil.rmtree(run / "pipeline")  # as after a failure between steps 4 and 8
    for step in (8, 10):
        shutil.rmtree(run / "denoiser" / "checkpoints" / str(step))
    said = train(run, tiny_clips, *options, "--save-every", "3", devices=4)
    assert "amended: " in said
    assert "parallel.context 2 -> 1" in said
    (amendment,) = json.loads((run / "experiment.json").read_text())["amendments"]
    assert amendment["steps"]["denoiser"] == 4
    expected, actual = (read_metrics(each / "denoiser" / "metrics.jsonl") for each in (whole, run))
    assert [entry["step"] for entry in actual] == [*range(1, 11)]
    losses, expected_losses = (np.array([entry["loss"] for entry in entries]) for entries in (actual, expected))
    np.testing.assert_array_equal(losses[:4], expected_losses[:4])
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    assert (run / "pipeline").is_dir()
