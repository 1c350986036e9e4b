"""Generation tasks with small random pipelines of Wan of every kind: what is kept, and what follows from it.

Frames of a clip are numbered from 0. The autoencoder has a stride of 4 frames, so that the latent frames of a clip of 9
are those of the frames 0, 1 to 4, and 5 to 8.
"""

import warnings

import numpy as np
import pytest

import dit_video
from dit_video.sampling.request import Condition, Request
from dit_video.sampling.tasks import Extend, Inpaint, Interpolate
from support.wan_tasks import (
    ALL,
    CLIP,
    FPS,
    FRAMES,
    OF_TEXT,
    OPTIONS,
    PROMPT,
    SIZE,
    TIMES,
    UNTRAINED,
    add_noise,
    decode_kept,
    each,
    encode,
    get_first_image,
    sample_and_put_in_place,
    sample_latents,
    select_frames,
    warns,
)

# Images.


@pytest.mark.nightly
@each(UNTRAINED)
def test_a_model_of_text_keeps_a_first_image_without_training(pipeline):
    with warns():
        latents, other_seed, other_image = (
            sample_latents(pipeline, image=FRAMES[number], seed=seed) for number, seed in ((0, 0), (0, 1), (5, 0))
        )
    for number, result in ((0, latents), (0, other_seed), (5, other_image)):
        np.testing.assert_allclose(result[:1], encode(pipeline, FRAMES[number : number + 1]), atol=1e-4)
    for other in (other_seed, other_image, sample_latents(pipeline)):
        assert np.abs(other - latents)[1:].max() > 1e-3


@each(UNTRAINED)
def test_a_kept_image_has_the_noise_of_each_time(pipeline):
    noise = np.random.default_rng(1).standard_normal((3, 4, 4, 4)).astype(np.float32)
    with warns():
        request = Request(PROMPT, SIZE, image=FRAMES[0], noise=noise)
        trace = pipeline.trace(request, sampling=pipeline.make_sampling(times=TIMES, guidance=2.0))
    clean = encode(pipeline, FRAMES[:1])
    for latents, time in zip(trace.latents, (*TIMES[1:], 0.0), strict=True):
        np.testing.assert_allclose(latents[:1], add_noise(clean, noise[:1], time), atol=1e-4)


@pytest.mark.nightly
@each(["knowing", "animating"])
def test_a_model_that_is_trained_for_a_first_image_does_not_warn(pipeline):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latents = sample_latents(pipeline, image=FRAMES[0])
        clip = pipeline.generate(PROMPT, size=SIZE, image=FRAMES[0], **OPTIONS)
        trained = sample_latents(pipeline, image=FRAMES[0], method="trained")
    np.testing.assert_array_equal(trained, latents)
    np.testing.assert_array_equal(clip.frames, pipeline.decode(latents).frames)
    assert clip.recipe["method"] == "trained"
    assert np.abs(sample_latents(pipeline, image=FRAMES[5]) - latents)[1:].max() > 1e-3


def test_a_clean_first_image_is_kept_exactly(knowing):
    expected = encode(knowing, FRAMES[:1])
    trained = sample_latents(knowing, image=FRAMES[0])
    np.testing.assert_array_equal(trained[:1], expected)
    replaced = knowing.generate(PROMPT, size=SIZE, image=FRAMES[0], method="training_free", **OPTIONS)
    assert replaced.recipe["method"] == "training_free"
    latents = sample_latents(knowing, image=FRAMES[0], method="training_free")
    np.testing.assert_allclose(latents, trained, atol=1e-4)  # it sees the replaced latents as it was trained to
    assert np.abs(latents - sample_latents(knowing))[1:].max() > 1e-3


@pytest.mark.nightly
@each(ALL)
def test_a_last_image_is_put_in_its_place(pipeline):
    pictures = {"image": FRAMES[0], "last_image": FRAMES[-1]}
    is_trained = pipeline.config.model.frame_conditioning is not None
    with warns():
        latents, expected = sample_and_put_in_place(pipeline, select_frames(0, 8), **pictures)
        clip = pipeline.generate(PROMPT, size=SIZE, **pictures, **OPTIONS)
    np.testing.assert_allclose(latents[2], expected[2], atol=1e-4)
    np.testing.assert_array_equal(clip.frames, decode_kept(pipeline, latents, **pictures))
    assert clip.recipe["method"] == ("trained and training_free" if is_trained else "training_free")
    if not get_first_image(pipeline):
        np.testing.assert_allclose(latents[:1], encode(pipeline, FRAMES[:1]), atol=1e-4)


# Frames before, after and between those of a clip.


@each(ALL)
def test_an_extended_clip_begins_with_the_clip(pipeline):
    with warns():
        result = pipeline.run(Extend(CLIP, PROMPT, frames=4, overlap=5), **OPTIONS)
        conditions = (Condition(content=dit_video.Clip(FRAMES[4:], FPS)),)
        latents = sample_latents(pipeline, conditions=conditions)
    assert (result.frames.shape, result.fps) == ((13, 16, 16, 3), FPS)
    np.testing.assert_array_equal(result.frames[:9], FRAMES)
    np.testing.assert_array_equal(result.frames[9:], decode_kept(pipeline, latents, conditions=conditions)[5:])
    # The denoiser of images to videos makes the first latent frame as it is trained to.
    first = len(get_first_image(pipeline))
    np.testing.assert_allclose(latents[first:2], encode(pipeline, FRAMES[4:])[first:], atol=1e-4)


@each(ALL)
def test_by_default_a_clip_is_extended_from_as_many_frames_as_fit(pipeline):
    clip = dit_video.Clip(FRAMES[:6], FPS)
    with warns():
        result = pipeline.run(Extend(clip, PROMPT, frames=4), **OPTIONS)
        conditions = (Condition(content=dit_video.Clip(FRAMES[1:6], FPS)),)
        latents = sample_latents(pipeline, conditions=conditions)
    new = decode_kept(pipeline, latents, conditions=conditions)[5:]
    np.testing.assert_array_equal(result.frames, np.concatenate([clip.frames, new]))


@each(OF_TEXT)
def test_a_clip_extended_backwards_ends_with_the_clip(pipeline):
    with warns():
        result = pipeline.run(Extend(CLIP, PROMPT, frames=4, overlap=5, before=True), **OPTIONS)
        conditions = (Condition(content=dit_video.Clip(FRAMES[:5], FPS), frame=4),)
        latents = sample_latents(pipeline, conditions=conditions)
    assert (result.frames.shape, result.fps) == ((13, 16, 16, 3), FPS)
    np.testing.assert_array_equal(result.frames[4:], FRAMES)
    np.testing.assert_array_equal(result.frames[:4], decode_kept(pipeline, latents, conditions=conditions)[:4])
    # Of the autoencoder's input, the frames before the clip repeat its first one.
    known = np.concatenate([np.repeat(FRAMES[:1], 4, axis=0), FRAMES[:5]])
    np.testing.assert_allclose(latents[2], encode(pipeline, known)[2], atol=1e-4)
    with warns():
        conditions = (Condition(content=dit_video.Clip(FRAMES[4:], FPS), frame=4),)
        latents, expected = sample_and_put_in_place(pipeline, np.arange(9) >= 4, conditions=conditions)
    np.testing.assert_allclose(latents[1], expected[1], atol=1e-4)


@each(ALL)
def test_an_interpolated_clip_has_the_duration_of_the_clip(pipeline):
    clip = dit_video.Clip(FRAMES[::2], FPS)
    with warns():
        result = pipeline.run(Interpolate(clip, PROMPT, factor=2), **OPTIONS)
        by_times = pipeline.run(Interpolate(clip, PROMPT, places=[0, 2, 4, 6, 8]), **OPTIONS)
        conditions = [Condition(content=FRAMES[number], frame=number) for number in range(0, 9, 2)]
        latents, expected = sample_and_put_in_place(pipeline, select_frames(*range(0, 9, 2)), conditions=conditions)
    assert (result.frames.shape, result.fps) == ((9, 16, 16, 3), 2 * FPS)
    assert len(result.frames[:-1]) / result.fps == len(clip.frames[:-1]) / clip.fps
    np.testing.assert_array_equal(result.frames, decode_kept(pipeline, latents, conditions=conditions))
    np.testing.assert_array_equal(by_times.frames, result.frames)
    np.testing.assert_allclose(latents[1:], expected[1:], atol=1e-4)


@each(UNTRAINED)
def test_an_interpolated_clip_ends_with_the_clip(pipeline):
    """Frames are sampled up to the autoencoder's stride, and those after the clip's last are cut off."""
    clip = dit_video.Clip(FRAMES[[0, 6]], FPS)
    with warns():
        result = pipeline.run(Interpolate(clip, PROMPT, factor=6), **OPTIONS)
        conditions = [Condition(content=FRAMES[number], frame=number) for number in (0, 6)]
        latents = sample_latents(pipeline, conditions=conditions)
    assert result.fps == 6 * FPS
    np.testing.assert_array_equal(result.frames, decode_kept(pipeline, latents, conditions=conditions)[:7])


# Regions.


@each(OF_TEXT)
def test_pixels_outside_of_an_inpainted_region_are_kept(pipeline):
    generated = np.zeros((16, 16), bool)
    generated[:, :8] = True
    with warns():
        result = pipeline.run(Inpaint(CLIP, generated, PROMPT), **OPTIONS)
        latents, other_seed = (sample_latents(pipeline, video=CLIP, generated=generated, seed=seed) for seed in (0, 1))
    assert (result.frames.shape, result.fps) == ((9, 16, 16, 3), FPS)
    np.testing.assert_array_equal(result.frames, decode_kept(pipeline, latents, video=CLIP, generated=generated))
    # The autoencoder gets the nearest kept pixel in place of those of the region.
    frames = np.where(generated[..., None], FRAMES[:, :, 8:9], FRAMES)
    for kept in (latents, other_seed):
        np.testing.assert_allclose(kept[:, :, 2:], encode(pipeline, frames)[:, :, 2:], atol=1e-4)
    assert np.abs(latents - other_seed)[:, :, :2].max() > 1e-3


@each(ALL)
def test_the_frames_before_an_inpainted_part_are_kept(pipeline):
    generated = np.zeros(SIZE, bool)
    generated[5:] = True
    with warns():
        result = pipeline.run(Inpaint(CLIP, generated, PROMPT), **OPTIONS)
        latents = sample_latents(pipeline, video=CLIP, generated=select_frames(5, 6, 7, 8))
    np.testing.assert_array_equal(
        result.frames, decode_kept(pipeline, latents, video=CLIP, generated=select_frames(5, 6, 7, 8))
    )
    first = len(get_first_image(pipeline))
    np.testing.assert_allclose(latents[first:2], encode(pipeline, FRAMES[:5])[first:], atol=1e-4)
