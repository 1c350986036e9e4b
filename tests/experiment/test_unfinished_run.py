"""A run that is not finished is read without its clips, and without a training that begins."""

import shutil

import numpy as np
import pytest

import dit_video
from dit_video.core.errors import MissingError, UserError
from dit_video.experiment.latents import make_encoding
from dit_video.experiment.run import Run
from dit_video.sampling.pipeline_config import PREVIEW
from dit_video.sampling.preview import load_preview_decoder
from dit_video.training.trainer import Trainer


@pytest.fixture
def copy(tiny_run, tmp_path):
    """Return a copy of the finished run that a test may change."""
    return shutil.copytree(tiny_run, tmp_path / "run")


def test_a_run_without_a_checkpoint_of_its_denoiser_says_how_to_go_on(copy):
    shutil.rmtree(copy / "denoiser")
    with pytest.raises(UserError, match="no checkpoint of its denoiser yet; continue it with: python"):
        Run.open(copy).newest_pipeline()


@pytest.mark.nightly
def test_an_unfinished_run_is_loaded_without_its_clips(tiny_pipeline, copy):
    shutil.rmtree(copy / "pipeline")
    shutil.rmtree(copy / "data")
    assert dit_video.load(copy).config == tiny_pipeline.config


@pytest.mark.nightly
def test_an_unfinished_run_has_the_preview_decoder_of_its_autoencoder(copy, tiny_run):
    shutil.rmtree(copy / "pipeline")
    expected = load_preview_decoder(tiny_run / "pipeline" / PREVIEW)
    np.testing.assert_array_equal(dit_video.load(copy).preview_decoder.patches, expected.patches)
    (copy / "autoencoder" / PREVIEW).unlink()
    assert dit_video.load(copy).preview_decoder is None


def test_what_is_read_of_a_run_trains_nothing(copy, monkeypatch):
    shutil.rmtree(copy / "pipeline")
    (copy / "autoencoder" / "weights.safetensors").unlink()
    monkeypatch.setattr(Trainer, "run", lambda *_: pytest.fail("a training was started"))
    run = Run.open(copy)
    for read in (lambda: dit_video.load(copy), run.codec, lambda: make_encoding(run)):
        with pytest.raises(MissingError, match="no trained autoencoder yet; continue its training with: python"):
            read()
