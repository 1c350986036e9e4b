"""Training-free completion on a random text-to-video model: what is kept is kept, whatever the model does."""

import warnings

import numpy as np
import pytest

import dit_video
from dit_video.evaluation.metrics.reconstruction import compute_limited_psnr
from dit_video.sampling.request import Condition, Request
from dit_video.tokens import Grid
from dit_video.video import Clip
from support.latents import generate_latents
from support.tiny_pipeline import SIZE, make_config, make_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:this model was not trained")


@pytest.fixture(scope="module")
def pipeline():
    """Return a text-to-video pipeline with random weights."""
    return make_pipeline(make_config(steps=6))


@pytest.fixture(scope="module")
def clip(pipeline):
    """Return a clip that the random autoencoder reconstructs as well as it can."""
    frames = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    return pipeline.reconstruct(Clip(frames, 8, caption="a clip"))


def sample(pipeline, **options):
    return generate_latents(pipeline, "red", size=SIZE, **options)


def test_latents_of_a_strength_below_1_are_released(pipeline, clip):
    kept, released, never = (
        sample(pipeline, conditions=[Condition(content=clip.frames[0], strength=strength)])
        for strength in (1.0, 0.5, 1e-5)
    )
    free = sample(pipeline)
    encoded = pipeline.encode(Clip(clip.frames[:1], 8))
    np.testing.assert_allclose(kept[:1], encoded, atol=1e-5)
    distances = [float(np.abs(each[:1] - encoded).mean()) for each in (kept, released, never)]
    assert distances[0] < distances[1] < distances[2]
    np.testing.assert_allclose(never, free, atol=1e-5)


def test_a_keyframe_off_the_temporal_stride_is_kept(pipeline, clip):
    condition = Condition(content=clip.frames[6], frame=6)
    kept, free = (pipeline.generate("red", size=SIZE, conditions=each) for each in ([condition], []))
    gain = compute_limited_psnr(clip.frames[6], kept.frames[6]) - compute_limited_psnr(clip.frames[6], free.frames[6])
    assert gain > 3


def test_pixels_next_to_a_region_are_kept_although_they_share_latents_with_it(pipeline, clip):
    generated = np.ones(SIZE, bool)
    generated[:, :, :11] = False  # the second column of latents has known columns 8 to 10, and unknown ones
    columns = np.s_[:, :, 8:11]
    kept, free = (
        pipeline.generate("red", size=SIZE, **options).frames[columns]
        for options in ({"video": clip, "generated": generated}, {})
    )
    assert compute_limited_psnr(clip.frames[columns], kept) - compute_limited_psnr(clip.frames[columns], free) > 3


def test_known_pixels_of_other_requests_change_nothing(pipeline, clip):
    requests = [
        Request("red", SIZE, image=clip.frames[0]),
        Request("blue", SIZE, seed=1),
        Request("red", SIZE, conditions=[Condition(content=clip.frames[6], frame=6)], seed=2),
        Request("green", Grid(5, 16, 16), seed=3, image=clip.frames[8]),
    ]
    together = pipeline.generate_latents(requests)
    for request, latents in zip(requests, together, strict=True):
        np.testing.assert_allclose(latents, pipeline.generate_latents([request])[0], atol=2e-5)


@pytest.mark.nightly
def test_resampling_keeps_what_is_known_and_changes_the_rest(pipeline, clip):
    once, twice = (sample(pipeline, image=clip.frames[0], resample=count) for count in (1, 2))
    np.testing.assert_allclose(once[:1], twice[:1], atol=1e-5)
    assert np.abs(once[1:] - twice[1:]).max() > 1e-2
    np.testing.assert_array_equal(twice, sample(pipeline, image=clip.frames[0], resample=2))


@pytest.mark.slow
def test_resampling_works_with_solvers_of_several_steps(pipeline, clip):
    for solver in ("unipc", "dpm++2m", "ddpm"):
        latents = sample(pipeline, image=clip.frames[0], resample=2, solver=solver)
        assert np.isfinite(latents).all()
        np.testing.assert_allclose(latents[:1], pipeline.encode(Clip(clip.frames[:1], 8)), atol=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("options", [{"frame": 0, "resample": 2}, {"frame": 6, "resample": 1}])
def test_a_callback_does_not_change_the_result(pipeline, clip, options):
    """Sample with more steps than one block holds."""
    condition = Condition(content=clip.frames[0], frame=options["frame"])
    values = {"conditions": [condition], "resample": options["resample"], "steps": 70, "guidance": 1.0}
    watched = sample(pipeline, callback=lambda progress: None, **values)
    np.testing.assert_array_equal(watched, sample(pipeline, **values))


@pytest.mark.nightly
def test_a_trace_ends_with_the_sample(pipeline, clip):
    for frame, resample in ((0, 1), (6, 1), (0, 2)):
        condition = Condition(content=clip.frames[0], frame=frame)
        request = Request("red", SIZE, conditions=[condition], resample=resample)
        trace = pipeline.trace(request)
        assert len(trace.latents) == 6
        np.testing.assert_allclose(trace.latents[-1], pipeline.generate_latents([request])[0], atol=1e-5)


def test_a_masked_edit_generates_where_the_mask_is_true_and_starts_from_the_clip(pipeline, clip):
    generated = np.arange(9) >= 5
    edited = sample(pipeline, video=clip, generated=generated, strength=0.3)
    encoded = pipeline.encode(clip)
    np.testing.assert_allclose(edited[:2], encoded[:2], atol=1e-4)
    filled = sample(pipeline, video=clip, generated=generated)
    assert np.abs(edited[2] - encoded[2]).mean() < np.abs(filled[2] - encoded[2]).mean()


def test_it_says_that_a_model_was_not_trained_for_a_task(pipeline, clip):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(pipeline)
        with pytest.raises(UserWarning, match="not trained for what is known"):
            sample(pipeline, image=clip.frames[0])
        sample(pipeline, image=clip.frames[0], method="training_free")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": 0, "conditions": [0]}, "some of its pixels are also kept of another picture"),
        ({"conditions": [9]}, "frame=9 of a condition is invalid for a clip of 9"),
        ({"video": 8, "generated": np.ones((9, 4, 4), bool)}, "generated of shape .* is invalid"),
        ({"video": 8, "strength": 0.0}, "strength=0.0 is invalid"),
        ({"video": 8, "strength": 1.5}, "strength=1.5 is invalid"),
    ],
)
def test_requests_that_do_not_fit_are_refused(pipeline, clip, options, message):
    frames = clip.frames
    values = dict(options)
    if "image" in values:
        values["image"] = frames[0]
    if "video" in values:
        values["video"] = Clip(frames[: values["video"] + 1], 8)
    if "conditions" in values:
        values["conditions"] = [Condition(content=frames[0], frame=frame) for frame in values["conditions"]]
    with pytest.raises(dit_video.core.errors.UserError, match=message):
        sample(pipeline, **values)
