"""Runs with a task mix, of cached and of online latents."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest

import dit_video
from dit_video.experiment.run import Run
from dit_video.models.conditioning import Beginning, FirstFrame, FrameConditioning, InsideOfBox
from support.latents import generate_latents

pytestmark = pytest.mark.slow
MASKS = (FirstFrame(weight=2.0), Beginning(), InsideOfBox())


def make_experiment(tiny, *, is_cached, time="segment"):
    autoencoder, backbone = tiny.EXPERIMENT.model.autoencoder, tiny.EXPERIMENT.model.backbone
    cond_channels = autoencoder.stride.t + autoencoder.channels if time == "segment" else 0
    backbone = backbone.replace(cond_channels=cond_channels, time=time)
    conditioning = FrameConditioning(prob=0.8, rest="grey", masks=MASKS)
    experiment = tiny.EXPERIMENT.replace_model(backbone=backbone, frame_conditioning=conditioning)
    data = dataclasses.replace(experiment.data, cache_latents=is_cached)
    return dataclasses.replace(experiment, data=data).replace_stage("denoiser", steps=6)


def prepare_run(tiny, tiny_run, folder, **options):
    run = Run.create(folder, make_experiment(tiny, **options))
    run.take((tiny_run / "data").resolve())
    (folder / "autoencoder").mkdir()
    shutil.copy(tiny_run / "autoencoder" / "weights.safetensors", folder / "autoencoder")
    return run


@pytest.mark.parametrize(
    ("is_cached", "time"), [(True, "segment"), (False, "segment"), (True, "token"), (False, "token")]
)
def test_a_task_mix_is_trained_and_sampled(tiny, tiny_run, tmp_path, is_cached, time):
    run = prepare_run(tiny, tiny_run, tmp_path / "run", is_cached=is_cached, time=time)
    run.run_stages()
    pipeline = dit_video.load(tmp_path / "run")
    assert pipeline.config.model.frame_conditioning.masks == MASKS
    clip = dit_video.Clip(np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8), 8)
    kept = generate_latents(pipeline, "red", size=(5, 16, 16), image=clip.frames[0], method="trained")
    free = generate_latents(pipeline, "red", size=(5, 16, 16))
    assert np.abs(kept - free).max() > 1e-3
    if time == "token":
        np.testing.assert_allclose(kept[:1], pipeline.encode(dit_video.Clip(clip.frames[:1], 8)), atol=1e-4)


def test_a_resumed_run_draws_the_same_masks(tiny, tiny_run, tmp_path):
    run = prepare_run(tiny, tiny_run, tmp_path / "run", is_cached=True)
    run.run_stages()
    _, open_batches = run.experiment.denoiser.open_inputs(run)
    whole = list(itertools.islice(open_batches(0), 5))
    rest = list(itertools.islice(open_batches(3), 2))
    for first, second in zip(whole[3:], rest, strict=True):
        for name in ("cond_mask", "cond_latents"):
            np.testing.assert_array_equal(first.fields[name], second.fields[name])
