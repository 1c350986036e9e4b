"""Pipelines of DiT and SiT that sample images by class. The parity tests compare them with diffusers."""

import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import dit_video
from dit_video.core.errors import MissingError, UserError
from dit_video.diffusion import (
    Ddim,
    Ddpm,
    Epsilon,
    Heun,
    LearnedVariance,
    RectifiedFlow,
    VariancePreservingProcess,
    Velocity,
)
from dit_video.models.encoders import ByteEncoderConfig, ClassNamesConfig
from dit_video.sampling.pipeline import Request
from dit_video.sampling.probe import DenoiserProbe
from support.latents import generate_latents
from support.tiny_class_dit import DDIM, DIT, NAMES, SIDE, SIT, write_class_dit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a pipeline, to be read only."""
    return write_class_dit(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def pipeline(folder):
    return dit_video.load(folder, dtype="float32")


def sample_latents(pipeline, label, **options):
    return generate_latents(pipeline, label, **{"steps": 3, "guidance": 2.0} | options)


def test_the_pipeline_config_is_read_from_the_folder(pipeline):
    config = pipeline.config
    assert config.model.text_encoder == ClassNamesConfig(classes=5, names=(*NAMES.values(), "4"))
    assert config.model.process == VariancePreservingProcess()
    assert config.model.prediction == LearnedVariance()
    assert (config.sampling.solver, config.sampling.guidance.get_scale("text"), config.size) == (
        Ddim(),
        4.0,
        (1, SIDE, SIDE),
    )


def test_a_pipeline_generates_an_image_of_a_class(pipeline):
    clip = pipeline.generate(2, steps=3, guidance=2.0)
    assert clip.frames.shape == (1, SIDE, SIDE, 3)
    assert clip.frames.std() > 1


def test_a_class_can_be_named_by_its_name_or_its_number(pipeline):
    latents = sample_latents(pipeline, 0)
    for name in ("0", "tench", "Tinca tinca", "tench, Tinca tinca"):
        np.testing.assert_array_equal(sample_latents(pipeline, name), latents)
    assert np.abs(sample_latents(pipeline, "goldfinch") - latents).max() > 1e-2


@pytest.mark.slow
def test_the_denoiser_probe_conditions_on_the_class(pipeline):
    inside = DenoiserProbe(pipeline, ["goldfinch", "tench"])
    noisy = jnp.zeros((2, inside.token_grid.volume, inside.patch.volume * inside.channels))
    first, second = np.asarray(inside.denoise(noisy, jnp.asarray(0.5))[0])
    assert np.abs(first - second).max() > 1e-3
    maps = inside.compute_attention_maps(noisy, 0.5, queries=[0])
    assert np.abs(maps[-1, 0] - maps[-1, 1]).max() > 1e-6


def test_guidance_leads_away_from_no_class_or_from_the_negative_one(pipeline):
    label, none, negative = (sample_latents(pipeline, each, guidance=1.0) for each in (2, "", 4))
    assert min(np.abs(label - other).max() for other in (none, negative)) > 1e-2
    np.testing.assert_allclose(sample_latents(pipeline, 2, guidance=0.0), none, atol=1e-4)
    np.testing.assert_allclose(sample_latents(pipeline, 2, guidance=0.0, negative="4"), negative, atol=1e-4)


@pytest.mark.slow
def test_several_requests_give_the_images_of_each_alone(pipeline):
    size = pipeline.config.size
    requests = [Request("goldfinch", size, seed=1), Request("0", size), Request("4", size, seed=2)]
    sampling = pipeline.make_sampling(steps=3, guidance=2.0, solver="ddpm")
    clips = pipeline.generate_many(requests, sampling=sampling)
    for request, clip in zip(requests, clips, strict=True):
        alone = pipeline.generate(request.prompt, seed=request.seed, steps=3, guidance=2.0, solver="ddpm")
        assert np.abs(clip.frames.astype(int) - alone.frames).max() <= 1


def test_a_pipeline_saved_in_the_native_layout_is_the_same(pipeline, tmp_path):
    pipeline.save(tmp_path / "own")
    again = dit_video.load(tmp_path / "own")
    assert again.config == pipeline.config
    np.testing.assert_array_equal(sample_latents(again, "goldfinch"), sample_latents(pipeline, 2))


@pytest.mark.slow
def test_a_learned_variance_is_used_only_if_the_scheduler_says_so(tmp_path):
    drawn_with = {}
    for kind, variance, prediction in (
        ("fixed_small", "dropped", Epsilon()),
        ("learned_range", "predicted", LearnedVariance()),
    ):
        scheduler = {"_class_name": "DDPMScheduler", "clip_sample": False, "variance_type": kind}
        result = dit_video.load(write_class_dit(tmp_path / kind, scheduler=scheduler))
        assert (result.config.model.backbone.variance, result.config.model.prediction) == (variance, prediction)
        drawn_with[kind] = sample_latents(result, 1)
    assert np.abs(drawn_with["fixed_small"] - drawn_with["learned_range"]).max() > 1e-2


@pytest.mark.nightly
@pytest.mark.parametrize("backbone", [pytest.param(DIT, marks=pytest.mark.slow), SIT], ids=["DiT", "SiT"])
def test_the_authors_models_need_no_scheduler(tmp_path, backbone):
    result = dit_video.load(write_class_dit(tmp_path, backbone, scheduler=None))
    config = result.config
    if backbone is SIT:
        assert (config.model.process, config.model.prediction) == (RectifiedFlow(), Velocity())
        assert (config.sampling.solver, config.sampling.steps) == (Heun(), 50)
    else:
        assert config.model.prediction == LearnedVariance()
        assert (config.sampling.solver, config.sampling.steps) == (Ddpm(), 250)
    assert np.isfinite(sample_latents(result, 1)).all()


def test_the_time_is_scaled_to_the_steps_of_the_scheduler(tmp_path):
    result = dit_video.load(write_class_dit(tmp_path, scheduler={**DDIM, "num_train_timesteps": 100}))
    assert result.config.model.backbone.time_embedding.scale == 100.0


def test_wrong_classes_text_encoders_and_missing_folders_are_refused(pipeline, folder, tmp_path):
    for label, message in (
        (5, "'5' is no class: use a number from 0 to 4, or one of 6 names such as"),
        ("trench", "'trench' is no class"),
        ("crane", "'crane' .* classes 1, 3. Use the number"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline.generate(label)
    with pytest.raises(UserError, match="has no text encoder; leave out text_encoder"):
        dit_video.load(folder, text_encoder=tmp_path)
    with pytest.raises(UserError, match="has no text encoder; leave out text_encoder="):
        pipeline.with_text_encoder(tmp_path)
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / "vae")
    with pytest.raises(MissingError, match="lacks the folders vae"):
        dit_video.load(copy)
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    with pytest.raises(UserError, match="predicts noise, the scheduler is of a RectifiedFlow"):
        dit_video.load(write_class_dit(tmp_path / "flow", scheduler=flow))
    with pytest.raises(UserError, match="captions are of 0 classes, the backbone of 5"):
        replace(pipeline.config.model, text_encoder=ByteEncoderConfig())
