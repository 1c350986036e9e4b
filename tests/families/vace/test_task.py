"""The conditioner of VACE: its fields, reference images before the clip, strengths of layers, and refused requests."""

import numpy as np
import pytest

import dit_video
from dit_video.core.errors import UserError
from dit_video.families.vace.pipeline import VaceConditioner
from dit_video.sampling.request import Condition, Request
from dit_video.sampling.tasks import Edit, Extend, Vary
from dit_video.tokens import Grid
from support.latents import generate_latents
from support.tiny_vace import CONTROL, write_vace
from support.tiny_wan import write_wan

SIZE = (5, 16, 24)
FRAMES = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
CLIP, POSES = dit_video.Clip(FRAMES, 16), dit_video.Clip(FRAMES[::-1, ::-1].copy(), 16)
IS_KEPT = np.random.default_rng(1).random(SIZE) < 0.5


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vace") / "tiny"
    write_vace(folder)
    return dit_video.load(folder, dtype="float32")


def plan(pipeline, **pictures):
    return VaceConditioner()(Request("", SIZE, **pictures), pipeline.model_parts)


def get_parts(pipeline, **pictures):
    """Return the inactive latents, the reactive ones, and the mask of a request."""
    (field,) = (made := plan(pipeline, **pictures)).fields
    assert field == CONTROL.field
    return np.split(made.fields[field], [4, 8], axis=-1)


def encode(pipeline, pixels, is_grey):
    return pipeline.codec.encode_pixels(np.where(is_grey[..., None], np.float32(127.5), pixels).astype(np.float32))


NO_PIXELS = np.zeros(SIZE, bool)


@pytest.mark.parametrize(
    ("pictures", "is_kept", "generated"),
    [
        ({}, NO_PIXELS, None),
        ({"control": POSES}, NO_PIXELS, POSES.frames),
        ({"video": CLIP, "generated": ~IS_KEPT}, IS_KEPT, None),
        ({"video": CLIP, "generated": ~IS_KEPT, "control": POSES}, IS_KEPT, POSES.frames),
        ({"video": CLIP, "generated": np.arange(5) >= 2}, (np.arange(5) < 2)[:, None, None] | NO_PIXELS, None),
        ({"image": FRAMES[0]}, (np.arange(5) == 0)[:, None, None] | NO_PIXELS, None),
        (
            {"last_image": FRAMES[-1], "control": POSES},
            (np.arange(5) == 4)[:, None, None] | NO_PIXELS,
            POSES.frames,
        ),
    ],
    ids=["text", "control", "mask", "mask and control", "frames", "image", "last image and control"],
)
def test_the_control_holds_both_parts_of_the_clip_and_the_mask(pipeline, pictures, is_kept, generated):
    inactive, reactive, mask = get_parts(pipeline, **pictures)
    steering = np.full(FRAMES.shape, 127.5) if generated is None else generated
    np.testing.assert_allclose(inactive, encode(pipeline, FRAMES, ~is_kept), atol=1e-5)
    np.testing.assert_allclose(reactive, encode(pipeline, steering, is_kept), atol=1e-5)
    # Two latent frames of 4x6 positions with 4x4 pixels each: the pixels of the second and of the fourth frame.
    assert mask.shape == (2, 4, 6, 16)
    for latent_frame, frame in ((0, 1), (1, 3)):
        for row in range(16):
            for column in range(24):
                channel = 4 * (row % 4) + column % 4
                assert mask[latent_frame, row // 4, column // 4, channel] == (not is_kept[frame, row, column])


def test_an_edit_starts_from_its_clip_which_is_no_control(pipeline):
    """VACE was trained to read clips, and an edit begins with the noisy latents, as in any model of text to video."""
    made, text = plan(pipeline, video=CLIP, strength=0.7), plan(pipeline)
    np.testing.assert_array_equal(made.fields[CONTROL.field], text.fields[CONTROL.field])
    np.testing.assert_array_equal(made.start, pipeline.encode(CLIP))
    assert (made.start_time, made.method) == (0.7, "")
    both = plan(pipeline, video=CLIP, generated=~IS_KEPT, strength=0.7, reference_images=[FRAMES[0]])
    kept = plan(pipeline, video=CLIP, generated=~IS_KEPT, reference_images=[FRAMES[0]])
    np.testing.assert_array_equal(both.fields[CONTROL.field], kept.fields[CONTROL.field])
    assert (len(both.start), both.leading_frames, both.method) == (3, 1, "trained")
    np.testing.assert_array_equal(both.start[1:], made.start)
    for task in (Edit(CLIP, "a red ball", strength=0.7), Vary(CLIP)):
        result = pipeline.run(task, sampling=pipeline.make_sampling(steps=4, guidance=1.0))
        assert result.frames.shape == FRAMES.shape


@pytest.mark.slow
def test_conditions_are_kept_as_parts_of_a_video_are(pipeline):
    """So VACE extends, blends and interpolates clips, as it was trained to."""
    kept, numbers = CLIP.frames[1:3], np.arange(len(CLIP.frames))
    by_mask = get_parts(pipeline, video=CLIP, generated=(numbers != 1) & (numbers != 2))
    condition = Condition(content=dit_video.Clip(kept, CLIP.fps), frame=1)
    for part, expected in zip(get_parts(pipeline, conditions=[condition]), by_mask, strict=True):
        np.testing.assert_array_equal(part, expected)
    extended = pipeline.run(Extend(CLIP, "a dog", frames=4), steps=2)
    np.testing.assert_array_equal(extended.frames[: len(CLIP.frames)], CLIP.frames)
    assert extended.recipe["method"] == "trained"


def test_a_mask_is_fitted_as_its_video_is(pipeline):
    """Scaled by one half to cover the clip, and cropped above and below alike."""
    large = dit_video.Clip(np.zeros((5, 40, 48, 3), np.uint8), 16)
    is_kept, expected = np.zeros((5, 40, 48), bool), np.zeros(SIZE, bool)
    is_kept[:, 4:20, :24], expected[:, :8, :12] = True, True
    small = {"video": dit_video.Clip(np.zeros((*SIZE, 3), np.uint8), 16), "generated": ~expected}
    fitted = get_parts(pipeline, video=large, generated=~is_kept)
    for part, other in zip(get_parts(pipeline, **small), fitted, strict=True):
        np.testing.assert_allclose(other, part, atol=1e-5)


def test_reference_images_lead_the_last_one_first(pipeline):
    images = [FRAMES[0], np.full((8, 6, 3), 40, np.uint8)]
    made = plan(pipeline, reference_images=images, control=POSES)
    values = made.fields[CONTROL.field]
    assert made.leading_frames == 2
    assert len(values) == 4
    np.testing.assert_array_equal(values[2:], plan(pipeline, control=POSES).fields[CONTROL.field])
    # The second image is twice as large in the middle of a white frame.
    white = np.full((1, 16, 24, 3), 255, np.uint8)
    white[:, :, 6:18] = 40
    for frame, pixels in zip(values, (white, FRAMES[:1]), strict=False):
        np.testing.assert_allclose(frame[None, ..., :4], pipeline.codec.encode_pixels(pixels), atol=1e-5)
        assert not frame[..., 4:].any()


OPTIONS = {"steps": 2, "guidance": 2.0}


def sample_latents(pipeline, **pictures):
    return generate_latents(pipeline, "a red ball", size=SIZE, **OPTIONS, **pictures)


@pytest.mark.slow
def test_requests_sampled_together_are_those_sampled_alone(pipeline):
    requests = [
        {"control": POSES, "strengths": {"control": (0.5, 2.0)}},
        {"reference_images": [FRAMES[0]], "seed": 3},
        {"image": FRAMES[0]},
    ]
    sampling = pipeline.make_sampling(**OPTIONS)
    together = pipeline.generate_latents([Request("a red ball", SIZE, **each) for each in requests], sampling=sampling)
    for latents, arguments in zip(together, requests, strict=True):
        assert latents.shape == (2, 4, 6, 4)
        np.testing.assert_allclose(latents, sample_latents(pipeline, **arguments), atol=1e-5)


@pytest.mark.nightly
def test_one_strength_is_that_of_every_layer(pipeline):
    full, half, each, last = (
        sample_latents(pipeline, control=POSES, strengths=strengths)
        for strengths in ({}, {"control": 0.5}, {"control": [0.5, 0.5]}, {"control": [1.0, 0.5]})
    )
    np.testing.assert_array_equal(half, each)
    assert np.abs(half - full).max() > 1e-3
    assert np.abs(last - half).max() > 1e-3


@pytest.mark.slow
def test_a_trajectory_is_that_of_the_clip_alone(pipeline):
    request = Request("a red ball", SIZE, reference_images=[FRAMES[0]])
    sampling = pipeline.make_sampling(**OPTIONS)
    trace = pipeline.trace(request, sampling=sampling)
    assert trace.latents.shape == (2, 2, 4, 6, 4)
    np.testing.assert_allclose(trace.latents[-1], pipeline.generate_latents([request], sampling=sampling)[0], atol=1e-5)


@pytest.mark.nightly
def test_a_saved_pipeline_keeps_its_conditioner(pipeline, tmp_path):
    pipeline.save(tmp_path / "saved")
    again = dit_video.load(tmp_path / "saved")
    assert again.config.conditioner == VaceConditioner()
    arguments = {"control": POSES, "image": FRAMES[0]}
    np.testing.assert_allclose(sample_latents(again, **arguments), sample_latents(pipeline, **arguments), atol=1e-5)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ({"video": CLIP}, r"generated=None is invalid: video and generated need each other.* use control="),
        ({"generated": ~IS_KEPT}, "video=None is invalid"),
        (
            {"video": CLIP, "generated": IS_KEPT[:4]},
            r"generated of shape \[4, 16, 24\] is invalid.* \[5, 16, 24\], .* \[5\]",
        ),
        ({"video": CLIP, "generated": IS_KEPT.astype(np.uint8)}, "generated of uint8"),
        (
            {"video": CLIP, "generated": ~IS_KEPT, "image": FRAMES[0]},
            "image is invalid: some of its pixels are also kept",
        ),
        ({"control": dit_video.Clip(FRAMES[:4], 16)}, "control of 4 frames is invalid for a clip of 5"),
        ({"video": dit_video.Clip(FRAMES[:1], 16), "generated": ~IS_KEPT[:1]}, "video of 1 frames is invalid"),
        (
            {"reference_images": [FRAMES[0, 0]]},
            r"reference_images of shape \[24, 3\] is invalid: an image is \[H W 3\]",
        ),
        ({"reference_images": [CLIP]}, "a clip of 5 frames is no image"),
        ({"conditions": [Condition(content=FRAMES[0], strength=0.5)]}, "strength= of a condition is invalid"),
        ({"image": FRAMES[0], "method": "training_free"}, "method='training_free' is invalid"),
        (
            {"strengths": {"control": (1.0, 2.0, 3.0)}},
            "has one strength or 2, not 3. Use one number or as many",
        ),
        ({"strengths": {"pose": 1.0}}, "pose is unknown to this model; use control"),
        ({"conditioning": {"control": POSES}}, "conditioning={'control': …} is invalid.* Use control="),
    ],
)
def test_requests_that_do_not_fit_are_refused(pipeline, pictures, message):
    with pytest.raises(UserError, match=message):
        sample_latents(pipeline, **pictures)


def test_noise_also_has_the_frames_of_reference_images(pipeline):
    noise = np.random.default_rng(0).normal(size=(2, 4, 6, 4)).astype(np.float32)
    with pytest.raises(UserError, match=r"noise for .* has shape \(3, 4, 6, 4\)"):
        sample_latents(pipeline, reference_images=[FRAMES[0]], noise=noise)


def test_a_model_without_control_refuses_it(tmp_path):
    write_wan(tmp_path / "wan")
    wan = dit_video.load(tmp_path / "wan", dtype="float32")
    with pytest.raises(UserError, match="control of a request is invalid: this model was not trained with it"):
        sample_latents(wan, control=POSES)
    with pytest.raises(UserError, match=r"conditioner=VaceConditioner\(\) is invalid for a WanDitConfig"):
        sample_latents(wan, conditioner=VaceConditioner())


def test_without_a_size_the_clip_is_as_long_as_its_control(pipeline):
    request = Request("", control=dit_video.Clip(FRAMES, 16))
    assert pipeline.config.resolve_size(request).t == 5
    assert pipeline.config.size == Grid(81, 480, 832)
