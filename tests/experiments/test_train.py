"""`experiments/train.py` with options that most runs do not use."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dit_video.evaluation.metrics.frames import MotionSmoothness

ROOT = Path(__file__).resolve().parents[2]
TINY = "tests/support/tiny.py"


def test_train_needs_held_out_clips_to_report_an_autoencoder(script, tiny_clips, tmp_path):
    arguments = ("--data", tiny_clips, "--workdir", tmp_path / "run", "--autoencoder-only", "--data.held-out")
    ended = script("experiments/train.py", ROOT / TINY, *arguments)
    assert ended.code == 2
    assert "no clips are held out to be reconstructed" in ended.err
    assert not (tmp_path / "run" / "autoencoder").exists()


CAPTIONS_CONFIG = """
from dataclasses import replace
from dit_video.evaluation.config import CaptionEvaluation
from support.tiny import EXPERIMENT

EXPERIMENT = replace(EXPERIMENT, evaluation=CaptionEvaluation())
"""


@pytest.fixture
def silent_clips(tiny_clips, tmp_path):
    """Return a folder of clips without captions."""
    return shutil.copytree(tiny_clips, tmp_path / "clips", ignore=shutil.ignore_patterns("*.csv", "*.json"))


@pytest.fixture
def captions_config(tmp_path):
    """Return a config that samples captions of its clips."""
    path = tmp_path / "config.py"
    path.write_text(CAPTIONS_CONFIG)
    return path


@pytest.mark.slow
def test_clips_without_captions_are_trained_on_and_reported_without_samples(
    script, silent_clips, captions_config, tmp_path
):
    run = tmp_path / "run"
    arguments = (captions_config, "--data", silent_clips, "--workdir", run, "--monitoring.sample-every", 10)
    for _ in range(2):  # the second time from the finished run
        ended = script("experiments/train.py", *arguments)
        assert ended.code == 0, ended.err
        told = "no clip has a caption: the denoiser is trained without text, and the report has no samples"
        assert told in ended.out + ended.err
        metrics = json.loads((run / "metrics.json").read_text())
        assert (metrics["samples"], metrics["examples"], len(metrics["clips"])) == (0, {}, 3)
        assert (run / "report.html").is_file()
        assert not (run / "samples").exists()
    assert list((run / "denoiser" / "samples").glob("*.mp4"))  # of empty prompts


class WandbError(Exception):
    pass


def refuse_login():
    raise WandbError("No API key configured. Use `wandb login` to log in.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--monitoring.validate-every", 2, "--data.held-out"],
            r"monitoring\.validate_every=2 .* no clips are held out",
        ),
        (["--monitoring.evaluate-every", 2], r"monitoring\.evaluate_every=2 is invalid: no clip has a caption"),
        (
            ["--monitoring.wandb", "videos"],
            r"monitoring\.wandb='videos' .*: No API key configured.* WANDB_MODE=offline",
        ),
        (
            ["--sampling.guidance", "image=2"],
            r"guidance of image is invalid: the model has no such conditions, but text",
        ),
        (["--monitoring.sample-every", 2, "--sampling.guidance", 2, 3], r"this model has no second expert"),
        (["--monitoring.tensorboard"], r"monitoring\.tensorboard needs tensorboardX, which is not installed"),
    ],
)
def test_what_the_config_and_the_data_decide_is_said_before_anything_is_trained(
    script, silent_clips, captions_config, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=refuse_login, Error=WandbError))
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    run = tmp_path / "run"
    ended = script("experiments/train.py", captions_config, "--data", silent_clips, "--workdir", run, *arguments)
    assert ended.code == 2
    assert re.search(message, ended.err)
    assert not (run / "autoencoder").exists()


def test_a_metric_that_cannot_be_computed_is_refused_before_anything_is_trained(
    script, tiny_clips, captions_config, tmp_path, monkeypatch
):
    config = CAPTIONS_CONFIG.replace("CaptionEvaluation()", "CaptionEvaluation(metrics=(MotionSmoothness(),))")
    captions_config.write_text(f"from {MotionSmoothness.__module__} import MotionSmoothness\n{config}")
    monkeypatch.setitem(sys.modules, "cv2", None)
    run = tmp_path / "run"
    ended = script("experiments/train.py", captions_config, "--data", tiny_clips, "--workdir", run)
    assert ended.code == 2
    assert "optical flow needs OpenCV" in ended.err
    assert not (run / "autoencoder").exists()
