"""Clips that begin with an image, sampled by the small pipelines of `tiny_wan`."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import dit_video
from dit_video.core.errors import UserError
from dit_video.models.conditioning import FrameConditioning, make_cond_latents
from dit_video.sampling.completion import Completion
from dit_video.sampling.known_pixels import collect_known_pixels
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.request import Request
from dit_video.tokens import Grid, patchify
from support import tiny_clip
from support.latents import generate_latents
from support.random_params import make_random_params
from support.tiny_wan import ANIMATING, DIT, SIZE, write_animating_wan, write_wan

KNOWING = replace(DIT, layers=1, time="token")
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def animating(tmp_path_factory):
    """Return a pipeline like Wan 2.1, conditioned on the latents of the image, a mask and image tokens."""
    folder = tmp_path_factory.mktemp("i2v") / "wan"
    write_animating_wan(folder, backbone=replace(ANIMATING, layers=1))
    return dit_video.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def knowing(tmp_path_factory):
    """Return a pipeline like TI2V-5B, whose first latent frame is clean, at time 0."""
    folder = tmp_path_factory.mktemp("ti2v") / "wan"
    write_wan(folder, backbone=KNOWING)
    return dit_video.load(folder, dtype="float32")


def sample_latents(pipeline, size=SIZE, **options):
    return generate_latents(pipeline, "a red ball", size=size, steps=2, guidance=1.0, **options)


def plan_fields(pipeline, image):
    """Return the fields of a clip that begins with an image, by name."""
    plan = Completion()(Request("", SIZE, image=image), pipeline.model_parts)
    return {field.name: values for field, values in plan.fields.items()}


@pytest.mark.slow
def test_the_image_conditions_as_latents_and_as_tokens(animating):
    conditioning = plan_fields(animating, IMAGES[0])
    cond_latents = conditioning["cond_latents"]
    assert cond_latents.shape == (2, 4, 4, 8)
    np.testing.assert_array_equal(cond_latents[0, ..., :4], np.ones((4, 4, 4)))
    np.testing.assert_array_equal(cond_latents[1, ..., :4], np.zeros((4, 4, 4)))
    # Causal: the first latent frame is of the first frame alone.
    encoded = animating.encode(dit_video.Clip(IMAGES[:1], 16))
    np.testing.assert_allclose(cond_latents[:1, ..., 4:], encoded, atol=1e-4)
    assert conditioning["image_tokens"].shape == (tiny_clip.VISION.tokens, tiny_clip.VISION.width)
    latents = sample_latents(animating, image=IMAGES[0])
    assert np.isfinite(latents).all()
    assert np.abs(sample_latents(animating, image=dit_video.Clip(IMAGES[1:], 16)) - latents).max() > 1e-3


@pytest.mark.slow
def test_several_clips_have_images_of_their_own(animating):
    requests = [dit_video.Request("a red ball", SIZE, image=image) for image in IMAGES]
    clips = animating.generate_many(requests, sampling=animating.make_sampling(steps=2, guidance=1.0))
    for image, clip in zip(IMAGES, clips, strict=True):
        alone = animating.decode(sample_latents(animating, image=image)).frames
        np.testing.assert_allclose(clip.frames.astype(int), alone.astype(int), atol=1)
    assert np.abs(clips[0].frames.astype(int) - clips[1].frames.astype(int)).max() > 1
    with pytest.raises(UserError, match="this model needs an image; give image="):
        animating.generate_many([requests[0], replace(requests[1], image=None)])


@pytest.mark.slow
def test_a_saved_pipeline_keeps_its_image_encoder(animating, tmp_path):
    animating.save(tmp_path / "own")
    again = dit_video.load(tmp_path / "own")
    np.testing.assert_array_equal(sample_latents(again, image=IMAGES[0]), sample_latents(animating, image=IMAGES[0]))


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("animating", {}, r"this model needs an image; give image="),
        (
            "animating",
            {"image": IMAGES[0], "last_image": IMAGES[1], "method": "trained"},
            "method='trained' is invalid: this model was not trained for what is known",
        ),
        (
            "animating",
            {"image": IMAGES[0], "size": (1, 16, 16)},
            "a clip of one frame is invalid: this model animates an image. Use 5 frames or more",
        ),
        (
            "animating",
            {"image": IMAGES[0], "last_image": IMAGES[1], "size": (1, 16, 16)},
            "a clip of one frame is invalid: this model animates",
        ),
        ("animating", {"image": IMAGES[0], "method": "training_free"}, "reads a first image in any case"),
        ("animating", {"image": IMAGES[0] / 1.0}, r"image of float64 .* is invalid: .* Use pixels / 255"),
        ("animating", {"image": dit_video.Clip(IMAGES, 16)}, r"a clip of 2 frames is no image. Use Clip\("),
        (
            "animating",
            {"image": IMAGES[0], "control": dit_video.Clip(IMAGES, 16)},
            "control of a request .* image, last_",
        ),
        ("knowing", {"generated": np.ones(5, bool)}, "video=None is invalid with generated"),
        (
            "knowing",
            {"video": dit_video.Clip(IMAGES, 16), "generated": np.ones(2, bool)},
            "it must be at least as long",
        ),
        ("knowing", {"video": dit_video.Clip(IMAGES, 16)}, "say what of it changes. Use generated=, or strength="),
        ("knowing", {"strength": 0.5}, "strength=0.5 is invalid: it is that of a video"),
        ("knowing", {"last_image": IMAGES[0], "method": "trained"}, "method='trained' is invalid"),
        ("knowing", {"image": IMAGES[0], "resample": 0}, "resample=0 is invalid"),
        ("knowing", {"image": IMAGES[0], "method": "fast"}, "method='fast' is invalid. Use auto, trained or"),
    ],
)
def test_missing_or_misshapen_images_are_refused(request, kind, options, message):
    with pytest.raises(UserError, match=message):
        sample_latents(request.getfixturevalue(kind), **options)


@pytest.mark.parametrize("shape", [(7,), (7, 20, 16), (20, 16)])
def test_a_longer_video_loses_its_last_frames(shape):
    """A camera's clip has a length that hardly any model samples; its mask is cut and scaled alike."""
    draw = np.random.default_rng(1)
    frames, generated = draw.integers(0, 256, (7, 20, 16, 3), dtype=np.uint8), draw.random(shape) > 0.5
    cut = generated[:5] if len(shape) != 2 else generated
    known, expected = (
        collect_known_pixels(Request("", SIZE, video=dit_video.Clip(video, 16), generated=mask))
        for video, mask in ((frames, generated), (frames[:5], cut))
    )
    for given, wanted in zip(known, expected, strict=True):
        np.testing.assert_array_equal(given, wanted)


@pytest.mark.nightly
def test_an_image_of_another_size_is_scaled_and_cropped(animating):
    wide = np.concatenate([IMAGES[1], IMAGES[0], IMAGES[1]], 1)
    np.testing.assert_array_equal(sample_latents(animating, image=wide), sample_latents(animating, image=IMAGES[0]))


@pytest.mark.nightly
def test_without_a_size_the_clip_has_the_aspect_ratio_of_the_image(animating):
    config = replace(animating.config, size=Grid(5, 32, 32))
    pipeline = animating.replace(config=config)
    latents = sample_latents(pipeline, image=np.concatenate([IMAGES[0]] * 3, 1), size=None)
    assert pipeline.decode(latents).frames.shape == (5, 16, 48, 3)


@pytest.mark.nightly
@pytest.mark.parametrize("mask_channels", [1, 3])
def test_without_grey_frames_sampling_has_the_latents_of_training(knowing, mask_channels):
    """Those are the latents of the first frame, and zeros; all are zero without an image, if training knew that."""
    channels = mask_channels + DIT.channels
    model = replace(
        knowing.config.model,
        backbone=replace(DIT, layers=1, cond_channels=channels),
        frame_conditioning=FrameConditioning(prob=0.5),
    )
    pipeline = Pipeline(
        replace(knowing.config, model=model),
        autoencoder=knowing.codec.params,
        denoiser={"backbone": make_random_params(model.backbone.make), "text": {}},
    )
    clip = dit_video.Clip(np.random.default_rng(1).integers(0, 256, (*SIZE, 3), dtype=np.uint8), 16)
    tokens = patchify(pipeline.encode(clip), DIT.patch)
    is_first = np.arange(len(tokens)) < len(tokens) // 2
    sizes = {"patch_volume": DIT.patch.volume, "channels": channels}
    expected = make_cond_latents(tokens[None], jnp.asarray(is_first)[None], **sizes)[0]
    fields = plan_fields(pipeline, clip.frames[0])
    np.testing.assert_allclose(patchify(fields["cond_latents"], DIT.patch), expected, atol=1e-4)
    without_image = Completion()(Request("", SIZE), pipeline.model_parts).fields
    assert [field.name for field in without_image] == ["cond_latents"]
    assert not any(values.any() for values in without_image.values())
    with_image, without = sample_latents(pipeline, image=clip.frames[0]), sample_latents(pipeline)
    assert np.abs(with_image - without).max() > 1e-3
    with pytest.raises(UserError, match="method='trained' is invalid"):
        sample_latents(pipeline, image=clip.frames[0], last_image=clip.frames[0], method="trained")


def test_a_model_with_mask_channels_needs_to_say_what_they_hold(animating):
    with pytest.raises(UserError, match=r"frame_conditioning=None is invalid: .* Use FrameConditioning"):
        replace(animating.config.model, frame_conditioning=None)
