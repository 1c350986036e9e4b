"""The commands that fine-tune a folder of LTX-Video, and sample from it with images and clips at some frames."""

import numpy as np
import pytest

import dit_video
from dit_video.core.trees import flatten
from dit_video.experiment.export import LORA_FILE
from dit_video.experiment.recipes.finetune import FineTuningOptions, make_finetuning_experiment
from dit_video.families.ltx.pipeline import KeyframesToVideo
from dit_video.scenes import shapes
from dit_video.tokens import Grid
from dit_video.training.hooks import logging
from dit_video.video import Clip, decode
from support.tiny_ltx import RESIDUAL_VAE, write_ltx

SAMPLE, STEPS = "experiments/sample.py", 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a folder whose positions count the seconds before a token's first frame."""
    folder = tmp_path_factory.mktemp("model") / "ltx"
    write_ltx(folder, kind="LTXConditionPipeline", vae=RESIDUAL_VAE)
    return folder


def test_the_experiment_has_the_authors_settings(model):
    experiment = make_finetuning_experiment(model, FineTuningOptions())
    config, sampling = experiment.model, experiment.sampling
    assert (sampling.steps, sampling.guidance.get_scale("text")) == (50, 3.0)
    assert (experiment.data.max_pixels, experiment.data.max_frames, experiment.model.fps) == (512 * 704, 161, 25.0)
    assert (config.layout.tokens, config.text_encoder.max_tokens) == (21 * 16 * 22, 256)
    assert experiment.conditioner == KeyframesToVideo(noise_scale=0.15)
    assert config.backbone.time_coordinate == "frame seconds"


@pytest.mark.slow
def test_fine_tuning_writes_adapters_that_reproduce_the_run(process, model, tmp_path):
    clips = shapes.write_folder(tmp_path / "clips", count=3, seed=0, sizes=(Grid(17, 32, 64), Grid(9, 64, 64)))
    options = ("--max-pixels", 64 * 64, "--max-frames", 17, "--dtype", "float32", "--steps", STEPS, "--warmup", 1)
    options += ("--sampling-steps", 2, "--samples", 2, "--log-every", 1, "--save-every", 100, "--lora.rank", 4)
    run = tmp_path / "run"
    ended = process(
        "experiments/finetune.py", model, "--data", clips, "--workdir", run, "--learning-rate", 3e-2, *options
    )
    assert ended.code == 0, ended.err
    losses = [entry["loss"] for entry in logging.read_metrics(run / "denoiser" / "metrics.jsonl")]
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:3]), losses
    pipeline, start = dit_video.load(run), dit_video.load(model, dtype="float32")
    assert pipeline.config.conditioner == start.config.conditioner
    assert pipeline.config.model.token_lead == 7 / 8
    loaded = flatten(start.load_lora(run / LORA_FILE).denoiser_params)
    for path, leaf in flatten(pipeline.denoiser_params).items():
        np.testing.assert_allclose(loaded[path], leaf, atol=1e-5, err_msg=path)
    clip = pipeline.generate("a red ball", size=(9, 32, 64), steps=1, image=np.zeros((32, 64, 3), np.uint8))
    assert clip.frames.shape == (9, 32, 64, 3)


@pytest.mark.slow
def test_clips_have_images_and_clips_at_some_frames(script, model, tmp_path):
    draw = np.random.default_rng(0)
    for name, frames in (("first", 1), ("last", 1), ("middle", 9)):
        suffix = "png" if frames == 1 else "mp4"
        Clip(draw.integers(0, 256, (frames, 40, 80, 3), dtype=np.uint8), 25.0).save(tmp_path / f"{name}.{suffix}")
    common = ("--prompt", "a red ball", "--size", "17x32x64", "--steps", 2, "--guidance", 1)
    pictures = {
        "ends": ("--image", tmp_path / "first.png", "--last-image", tmp_path / "last.png"),
        "middle": ("--conditions", f"{tmp_path / 'first.png'}@3@0.7", f"{tmp_path / 'middle.mp4'}@8"),
    }
    clips = {}
    for name, options in pictures.items():
        done = script(SAMPLE, model, *common, *options, "--out", tmp_path / f"{name}.gif")
        assert done.code == 0, done.err
        clips[name] = decode(tmp_path / f"{name}.gif").frames
        assert clips[name].shape == (17, 32, 64, 3)
    assert (clips["ends"] != clips["middle"]).any()
    misfit = ("--conditions", f"{tmp_path / 'middle.mp4'}@3", "--method", "trained")
    done = script(SAMPLE, model, *common, *misfit, "--out", tmp_path / "x.gif")
    assert done.code == 2
    assert "frame=3 of a condition is invalid: a clip of 9 frames begins at a multiple of 8. Use 0 or 8" in done.err
