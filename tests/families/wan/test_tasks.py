"""Generation tasks with small random pipelines of Wan of every kind: what is kept, and what follows from it.

Frames of a clip are numbered from 0. The autoencoder has a stride of 4 frames, so that the latent frames of a clip of 9
are those of the frames 0, 1 to 4, and 5 to 8.
"""

import itertools
import warnings
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import dit_video
from dit_video.core.errors import UserError
from dit_video.core.rng import make_generator
from dit_video.generation.batches import PlannedBatch
from dit_video.generation.edit_paths import EditPaths
from dit_video.generation.pictures import Condition
from dit_video.generation.request import Request
from dit_video.generation.tasks.seamless_loop import SeamlessLoop
from dit_video.pipelines.pipeline import Pipeline
from support.tiny_wan import ANIMATING, DIT, TWO, write_animating_wan, write_wan

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPT, SIZE, FPS = "a red ball moves left", (9, 16, 16), 12.0
OPTIONS = {"steps": 4, "guidance": 2.0}
TIMES = (1.0, 0.9, 0.75, 0.5)
"""Times at which steps start; with two experts, the second one takes the last two."""
FRAMES = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
CLIP = dit_video.Clip(FRAMES, FPS)
WITHOUT_TRAINING = "not trained for what is known of the clip: it is kept without training"


@pytest.fixture(scope="module")
def text_to_video(tmp_path_factory):
    """Return a pipeline like Wan 2.1 of text to video, which is not trained to keep anything."""
    folder = tmp_path_factory.mktemp("t2v") / "wan"
    write_wan(folder, backbone=replace(DIT, layers=1))
    return dit_video.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory):
    """Return a pipeline like Wan 2.2 of text to video: of four steps, each expert takes two."""
    folder = tmp_path_factory.mktemp("two") / "wan"
    write_wan(folder, backbone=replace(DIT, layers=1), **TWO)
    return dit_video.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def knowing(tmp_path_factory):
    """Return a pipeline like TI2V-5B, which is trained to keep a first frame, at time 0."""
    folder = tmp_path_factory.mktemp("ti2v") / "wan"
    write_wan(folder, backbone=replace(DIT, layers=1, time="token"))
    return dit_video.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def animating(tmp_path_factory):
    """Return a pipeline like Wan 2.1 of images to videos, which always gets a first frame."""
    folder = tmp_path_factory.mktemp("i2v") / "wan"
    write_animating_wan(folder, backbone=replace(ANIMATING, layers=1))
    return dit_video.load(folder, dtype="float32")


UNTRAINED, OF_TEXT = ("text_to_video", "two_experts"), ("text_to_video", "two_experts", "knowing")
ALL = (*OF_TEXT, "animating")


@pytest.fixture
def pipeline(request):
    """Return the pipeline of the name that a test is parametrised with."""
    return request.getfixturevalue(request.param)


def each(names):
    """Run a test with each of these pipelines."""
    return pytest.mark.parametrize("pipeline", names, indirect=True)


def sample_latents(pipeline, prompt=PROMPT, **options):
    return pipeline.generate(prompt, output="latents", **{"size": SIZE, **OPTIONS} | options)


def warns():
    return pytest.warns(UserWarning, match=WITHOUT_TRAINING)


def encode(pipeline, frames):
    return pipeline.encode(dit_video.Clip(np.ascontiguousarray(frames), FPS))


def add_noise(latents, noise, time):
    """Return the sample of rectified flow."""
    return (1 - time) * latents + time * noise


def get_first_image(pipeline):
    """Return the options of a clip that begins with that of the clip, for models that need it."""
    conditioning = pipeline.config.frame_conditioning
    return {"image": FRAMES[0]} if conditioning is not None and conditioning.prob == 1 else {}


def sample_and_put_in_place(pipeline, is_known, **options):
    """Return sampled latents, and what they should be: those before, with the known frames put in the decoded clip.

    The latter are complete for latent frames of which a part is known.
    """
    estimates = []
    latents = sample_latents(pipeline, callback=lambda each: estimates.append(each.progress), **options)
    (before,) = estimates[-1].estimate_latents().values()
    pixels = np.where(is_known[:, None, None, None], FRAMES, pipeline.decode(before).frames)
    assert np.abs(latents - before).max() > 1e-2
    return latents, encode(pipeline, pixels)


def select_frames(*numbers):
    return np.isin(np.arange(SIZE[0]), numbers)


# Images.


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
    np.testing.assert_array_equal(sample_latents(knowing, image=FRAMES[0])[:1], expected)
    replaced = knowing.generate(PROMPT, size=SIZE, image=FRAMES[0], method="training_free", **OPTIONS)
    assert replaced.recipe["method"] == "training_free"
    latents = sample_latents(knowing, image=FRAMES[0], method="training_free")
    np.testing.assert_allclose(latents[:1], expected, atol=1e-4)
    assert np.abs(latents - sample_latents(knowing, image=FRAMES[0]))[1:].max() > 1e-3


@each(ALL)
def test_a_last_image_is_put_in_its_place(pipeline):
    pictures = {"image": FRAMES[0], "last_image": FRAMES[-1]}
    is_trained = pipeline.config.frame_conditioning is not None
    with warns():
        latents, expected = sample_and_put_in_place(pipeline, select_frames(0, 8), **pictures)
        clip = pipeline.generate(PROMPT, size=SIZE, **pictures, **OPTIONS)
    np.testing.assert_allclose(latents[2], expected[2], atol=1e-4)
    np.testing.assert_array_equal(clip.frames, pipeline.decode(latents).frames)
    assert clip.recipe["method"] == ("trained and training_free" if is_trained else "training_free")
    if not get_first_image(pipeline):
        np.testing.assert_allclose(latents[:1], encode(pipeline, FRAMES[:1]), atol=1e-4)


# Frames before, after and between those of a clip.


@each(ALL)
def test_an_extended_clip_begins_with_the_clip(pipeline):
    with warns():
        result = pipeline.extend(CLIP, PROMPT, frames=4, overlap=5, **OPTIONS)
        conditions = (Condition(content=dit_video.Clip(FRAMES[4:], FPS)),)
        latents = sample_latents(pipeline, conditions=conditions)
    assert (result.frames.shape, result.fps) == ((13, 16, 16, 3), FPS)
    np.testing.assert_array_equal(result.frames[:9], FRAMES)
    np.testing.assert_array_equal(result.frames[9:], pipeline.decode(latents).frames[5:])
    # The denoiser of images to videos makes the first latent frame as it is trained to.
    first = len(get_first_image(pipeline))
    np.testing.assert_allclose(latents[first:2], encode(pipeline, FRAMES[4:])[first:], atol=1e-4)


@each(ALL)
def test_by_default_a_clip_is_extended_from_as_many_frames_as_fit(pipeline):
    clip = dit_video.Clip(FRAMES[:6], FPS)
    with warns():
        result = pipeline.extend(clip, PROMPT, frames=4, **OPTIONS)
        conditions = (Condition(content=dit_video.Clip(FRAMES[1:6], FPS)),)
        latents = sample_latents(pipeline, conditions=conditions)
    np.testing.assert_array_equal(result.frames, np.concatenate([clip.frames, pipeline.decode(latents).frames[5:]]))


@each(OF_TEXT)
def test_a_clip_extended_backwards_ends_with_the_clip(pipeline):
    with warns():
        result = pipeline.extend(CLIP, PROMPT, frames=4, overlap=5, before=True, **OPTIONS)
        conditions = (Condition(content=dit_video.Clip(FRAMES[:5], FPS), frame=4),)
        latents = sample_latents(pipeline, conditions=conditions)
    assert (result.frames.shape, result.fps) == ((13, 16, 16, 3), FPS)
    np.testing.assert_array_equal(result.frames[4:], FRAMES)
    np.testing.assert_array_equal(result.frames[:4], pipeline.decode(latents).frames[:4])
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
        result = pipeline.interpolate(clip, PROMPT, factor=2, **OPTIONS)
        by_times = pipeline.interpolate(clip, PROMPT, times=[0, 2, 4, 6, 8], **OPTIONS)
        conditions = [Condition(content=FRAMES[number], frame=number) for number in range(0, 9, 2)]
        latents, expected = sample_and_put_in_place(pipeline, select_frames(*range(0, 9, 2)), conditions=conditions)
    assert (result.frames.shape, result.fps) == ((9, 16, 16, 3), 2 * FPS)
    assert len(result.frames[:-1]) / result.fps == len(clip.frames[:-1]) / clip.fps
    np.testing.assert_array_equal(result.frames, pipeline.decode(latents).frames)
    np.testing.assert_array_equal(by_times.frames, result.frames)
    np.testing.assert_allclose(latents[1:], expected[1:], atol=1e-4)


@each(UNTRAINED)
def test_an_interpolated_clip_ends_with_the_clip(pipeline):
    """Frames are sampled up to the autoencoder's stride, and those after the clip's last are cut off."""
    clip = dit_video.Clip(FRAMES[[0, 6]], FPS)
    with warns():
        result = pipeline.interpolate(clip, PROMPT, factor=6, **OPTIONS)
        conditions = [Condition(content=FRAMES[number], frame=number) for number in (0, 6)]
        latents = sample_latents(pipeline, conditions=conditions)
    assert result.fps == 6 * FPS
    np.testing.assert_array_equal(result.frames, pipeline.decode(latents).frames[:7])


# Regions.


@each(OF_TEXT)
def test_pixels_outside_of_an_inpainted_region_are_kept(pipeline):
    mask = np.zeros((16, 16), bool)
    mask[:, :8] = True
    with warns():
        result = pipeline.inpaint(CLIP, mask, PROMPT, **OPTIONS)
        latents, other_seed = (
            sample_latents(pipeline, video=CLIP, mask=np.broadcast_to(~mask, SIZE).copy(), seed=seed) for seed in (0, 1)
        )
    assert (result.frames.shape, result.fps) == ((9, 16, 16, 3), FPS)
    np.testing.assert_array_equal(result.frames, pipeline.decode(latents).frames)
    # The autoencoder gets the nearest kept pixel in place of those of the region.
    frames = np.where(mask[..., None], FRAMES[:, :, 8:9], FRAMES)
    for kept in (latents, other_seed):
        np.testing.assert_allclose(kept[:, :, 2:], encode(pipeline, frames)[:, :, 2:], atol=1e-4)
    assert np.abs(latents - other_seed)[:, :, :2].max() > 1e-3


@each(ALL)
def test_the_frames_before_an_inpainted_part_are_kept(pipeline):
    mask = np.zeros(SIZE, bool)
    mask[5:] = True
    with warns():
        result = pipeline.inpaint(CLIP, mask, PROMPT, **OPTIONS)
        latents = sample_latents(pipeline, video=CLIP, mask=~select_frames(5, 6, 7, 8))
    np.testing.assert_array_equal(result.frames, pipeline.decode(latents).frames)
    first = len(get_first_image(pipeline))
    np.testing.assert_allclose(latents[first:2], encode(pipeline, FRAMES[:5])[first:], atol=1e-4)


# Changes of a clip.


@each(ALL)
@pytest.mark.parametrize("first_step", [1, 3])
def test_editing_starts_from_the_noisy_clip(pipeline, first_step):
    """So do all further steps alone, with that in place of their noise."""
    noise = np.random.default_rng(1).standard_normal((3, 4, 4, 4)).astype(np.float32)
    noisy = add_noise(pipeline.encode(CLIP), noise, TIMES[first_step])
    options = {"steps": None, **get_first_image(pipeline)}
    expected = sample_latents(pipeline, times=TIMES[first_step:], noise=noisy, **options)
    options |= {"times": TIMES, "noise": noise}
    between = (TIMES[first_step - 1] + TIMES[first_step]) / 2
    for strength in (TIMES[first_step], between):
        edited = sample_latents(pipeline, video=CLIP, strength=strength, **options)
        np.testing.assert_allclose(edited, expected, atol=1e-4)
    earlier = sample_latents(pipeline, video=CLIP, strength=TIMES[first_step - 1], **options)
    assert np.abs(earlier - expected).max() > 1e-2
    result = pipeline.edit(CLIP, PROMPT, strength=between, **OPTIONS | options)
    np.testing.assert_array_equal(result.frames, pipeline.decode(edited).frames)
    assert result.fps == FPS


@each(ALL)
def test_more_strength_changes_a_clip_more(pipeline):
    pictures, latents = get_first_image(pipeline), pipeline.encode(CLIP)
    sampled = sample_latents(pipeline, **pictures)
    changes = []
    for strength in (0.07, 0.3, 0.8, 1.0):
        edited = sample_latents(pipeline, steps=50, video=CLIP, strength=strength, **pictures)
        changes.append(np.abs(edited - latents).mean())
    assert changes[0] < 0.2 * changes[-1]
    assert changes == sorted(changes)
    everything = sample_latents(pipeline, video=CLIP, strength=1.0, **pictures)
    np.testing.assert_array_equal(everything, sampled)
    with pytest.raises(UserError, match=r"start_time=0\.1 is invalid: .* Use at least 0\.501, or more steps"):
        sample_latents(pipeline, video=CLIP, strength=0.1, **pictures)


def make_paths(pipeline, prompt, source, *, source_guidance=2.0, **options):
    """Return the paths of an edit of what `source` describes to `prompt`, with a guidance scale of 2."""
    request = Request(prompt, SIZE, **get_first_image(pipeline))
    target = pipeline.make_stepper(request, guidance=2.0, **options)
    return EditPaths(
        pipeline.make_stepper(request._replace(prompt=source), guidance=source_guidance, **options), target
    )


@each(ALL)
def test_an_edit_to_what_the_clip_shows_changes_nothing(pipeline):
    latents = pipeline.encode(CLIP)
    paths, others = (make_paths(pipeline, PROMPT, source, steps=4) for source in (PROMPT, "the table"))
    np.testing.assert_allclose(paths.edit_by_flow(latents, strength=0.95, seed=0), latents, atol=1e-4)
    assert np.abs(others.edit_by_flow(latents, strength=0.95, seed=0) - latents).max() > 1e-3
    options = OPTIONS | get_first_image(pipeline) | {"strength": 0.95}
    result = pipeline.edit(CLIP, PROMPT, source=PROMPT, source_guidance=2.0, **options)
    np.testing.assert_allclose(result.frames.astype(int), pipeline.reconstruct(CLIP).frames, atol=1)
    assert result.fps == FPS
    for source, scale in (("the table", 2.0), (PROMPT, 1.0)):
        changed = pipeline.edit(CLIP, PROMPT, source=source, source_guidance=scale, **options)
        assert (changed.frames != result.frames).any()


@each(ALL)
def test_an_edit_adds_the_difference_of_what_both_prompts_make_of_the_same_noise(pipeline):
    latents = pipeline.encode(CLIP)
    paths = make_paths(pipeline, PROMPT, "the table", source_guidance=1.0, times=TIMES)
    edited = paths.edit_by_flow(latents, strength=0.5, seed=3)
    noise = make_generator(3, "edit", 3).standard_normal(latents.shape).astype(np.float32)
    options = {"steps": None, "times": TIMES[3:], "noise": add_noise(latents, noise, 0.5)}
    options |= get_first_image(pipeline)
    target = sample_latents(pipeline, **options)
    source = sample_latents(pipeline, "the table", **options | {"guidance": 1.0})
    assert np.abs(target - source).max() > 1e-3
    np.testing.assert_allclose(edited, latents + target - source, atol=1e-4)


@each(ALL)
def test_inversion_with_the_prompt_of_the_clip_returns_to_the_clip(pipeline):
    """The more steps, the closer."""
    latents, options = pipeline.encode(CLIP), get_first_image(pipeline)
    few, returned, changed = (
        make_paths(pipeline, PROMPT, source, steps=steps).edit_by_inversion(latents, strength=0.8)
        for source, steps in ((PROMPT, 10), (PROMPT, 60), ("the table", 60))
    )
    far, near = (np.abs(each - latents).max() for each in (few, returned))
    assert near < far / 3
    assert near < 0.2 * latents.std()
    assert np.abs(changed - returned).max() > 1e-3
    options |= OPTIONS | {"steps": 60, "source": PROMPT, "source_guidance": 2.0, "edit_method": "inversion"}
    result = pipeline.edit(CLIP, PROMPT, **options)
    np.testing.assert_array_equal(result.frames, pipeline.decode(returned).frames)
    assert result.fps == FPS


# Loops.


@each(OF_TEXT)
def test_a_loop_begins_where_it_ends(pipeline):
    result = pipeline.loop(PROMPT, size=(12, 16, 16), **OPTIONS)
    assert result.frames.shape == (12, 16, 16, 3)
    estimates = []
    options = {"size": (13, 16, 16), "task": SeamlessLoop()}
    latents = sample_latents(pipeline, **options, callback=lambda each: estimates.append(each.progress))
    np.testing.assert_array_equal(result.frames, pipeline.decode(latents).frames[1:])
    # The last step's latents are rolled along time, and that before them is of the frame that is then the last.
    (before,) = estimates[-1].estimate_latents().values()
    shifts = [shift for shift in (1, 2) if np.abs(np.roll(before[1:], shift, axis=0) - latents[1:]).max() < 1e-4]
    assert len(shifts) == 1
    last = 12 - 4 * shifts[0]
    expected = encode(pipeline, pipeline.decode(before).frames[last : last + 1])
    np.testing.assert_allclose(latents[:1], expected, atol=1e-4)
    other_seed = pipeline.loop(PROMPT, size=(12, 16, 16), seed=1, **OPTIONS)
    assert np.abs(other_seed.frames.astype(int) - result.frames).max() > 1


# Methods.


@pytest.mark.parametrize("task", ["extension backwards", "loop", "inpainting", "editing"])
def test_a_model_that_needs_an_image_says_so(animating, task):
    tasks = {
        "extension backwards": lambda: animating.extend(CLIP, PROMPT, frames=4, before=True, **OPTIONS),
        "loop": lambda: animating.loop(PROMPT, size=(8, 16, 16), **OPTIONS),
        "inpainting": lambda: animating.inpaint(CLIP, np.eye(16) > 0, PROMPT, **OPTIONS),
        "editing": lambda: animating.edit(CLIP, PROMPT, **OPTIONS),
    }
    with pytest.raises(UserError, match="this model needs an image; give image="):
        tasks[task]()


@each(UNTRAINED)
def test_a_model_that_is_not_trained_for_a_task_says_so(pipeline):
    tasks = [
        lambda **options: pipeline.generate(PROMPT, size=SIZE, image=FRAMES[0], **options),
        lambda **options: pipeline.extend(CLIP, PROMPT, frames=4, **options),
        lambda **options: pipeline.inpaint(CLIP, np.eye(16) > 0, PROMPT, **options),
        lambda **options: pipeline.interpolate(CLIP, PROMPT, factor=2, **options),
    ]
    for task in tasks:
        with pytest.raises(UserError, match="method='trained' is invalid: this model was not trained for what is"):
            task(method="trained", **OPTIONS)


@pytest.mark.parametrize("image", [0, 5])
def test_steps_of_two_experts_are_repeated(two_experts, image):
    with warns():
        latents, again = (sample_latents(two_experts, image=FRAMES[image], resample=count, seed=1) for count in (1, 2))
    for each in (latents, again):
        np.testing.assert_allclose(each[:1], encode(two_experts, FRAMES[image : image + 1]), atol=1e-4)
    assert np.abs(latents - again)[1:].max() > 1e-3
    # Without known pixels there is nothing to agree with.
    np.testing.assert_array_equal(sample_latents(two_experts, resample=2), sample_latents(two_experts))


def test_repeated_steps_return_to_their_first_time_with_noise(two_experts, monkeypatch):
    """The parts of the steps are single ones, where there are few."""
    noise, further = np.random.default_rng(1).standard_normal((2, 3, 4, 4, 4)).astype(np.float32)

    def draw_further(self, number):
        return jnp.asarray(self.pack_latents(self.batch.branches[0].tokens, {0: further}))

    monkeypatch.setattr(PlannedBatch, "draw_noise", draw_further)
    options = {"times": TIMES, "guidance": 2.0, "sampler": "euler"}
    request = Request(PROMPT, SIZE, image=FRAMES[0], noise=noise, resample=2)
    with warns():
        (latents,) = two_experts.generate_latents([request], **options)
        stepper = two_experts.make_stepper(request, **options)
    expected = noise
    for step, (start, end) in enumerate(itertools.pairwise((*TIMES, 0.0))):
        once, share = stepper(expected, [step, step + 1]), (1 - start) / (1 - end)
        returned = share * once + np.float32(start**2 - (share * end) ** 2) ** 0.5 * further
        expected = stepper(returned, [step, step + 1])
    np.testing.assert_allclose(latents, expected, atol=1e-4)


def test_two_equal_experts_repeat_the_steps_of_one(two_experts):
    params = {"autoencoder": two_experts.codec.params}
    first, text = two_experts.denoiser_params["backbone"], two_experts.denoiser_params["text"]
    one = Pipeline(replace(two_experts.config, boundary=None), **params, denoiser={"backbone": first, "text": text})
    equal = Pipeline(two_experts.config, **params, denoiser={"backbone": first, "low_noise": first, "text": text})
    options = {"image": FRAMES[0], "last_image": FRAMES[-1], "resample": 2}
    with warns():
        expected, result, different = (sample_latents(pipeline, **options) for pipeline in (one, equal, two_experts))
    np.testing.assert_allclose(result, expected, atol=1e-4)
    assert np.abs(different - expected)[1:].max() > 1e-3
