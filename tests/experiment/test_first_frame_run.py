"""A run of a model that reads the latents of a first frame, from clips to samples with and without an image."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import dit_video
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.experiment.run import Run
from dit_video.models.conditioning import FrameConditioning
from support.latents import generate_latents

pytestmark = pytest.mark.slow
SIZE = (5, 16, 16)


def test_a_model_that_reads_first_frames_is_trained_evaluated_and_sampled(tiny, tiny_run, tmp_path):
    """By default the latents of other frames are zeros; a mask needs one channel only."""
    backbone = tiny.EXPERIMENT.model.backbone
    backbone = backbone.replace(cond_channels=backbone.channels + 1)
    experiment = tiny.EXPERIMENT.replace_model(backbone=backbone, frame_conditioning=FrameConditioning())
    experiment = dataclasses.replace(experiment, evaluation=CaptionEvaluation(trained=2, held_out=0))
    run = Run.create(tmp_path / "run", experiment)
    run.take((tiny_run / "data").resolve())
    (tmp_path / "run" / "autoencoder").mkdir()
    shutil.copy(tiny_run / "autoencoder" / "weights.safetensors", tmp_path / "run" / "autoencoder")
    run.run_stages()
    pipeline = dit_video.load(tmp_path / "run")
    result = run.evaluate(pipeline=pipeline, folder=tmp_path / "evaluation")
    assert len(result.samples.names) == 2
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    image = np.random.default_rng(0).integers(0, 256, (*SIZE[1:], 3), dtype=np.uint8)
    options = {"size": SIZE, "steps": 2, "guidance": 1.0}
    with_image, without = (
        generate_latents(pipeline, "a red square", image=first, **options) for first in (image, None)
    )
    assert np.isfinite([with_image, without]).all()
    assert with_image.shape == without.shape
