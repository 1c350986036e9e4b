"""Edits, loops and methods of generation tasks with small random pipelines of Wan of every kind."""

import itertools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.core.rng import make_generator
from dit_video.sampling.edit_paths import EditPaths
from dit_video.sampling.packing import PlannedBatch
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.preparation import check_requests
from dit_video.sampling.request import Condition, Request
from dit_video.sampling.tasks import DescribedEdit, Edit, Extend, Generate, Inpaint, Interpolate, Loop
from dit_video.sampling.tasks.generation import SeamlessLoop
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
    each,
    encode,
    get_first_image,
    sample_latents,
    warns,
)

# Changes of a clip.


@pytest.mark.nightly
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
    previous = sample_latents(pipeline, video=CLIP, strength=TIMES[first_step - 1], **options)
    assert np.abs(previous - expected).max() > 1e-2
    latents = sample_latents(pipeline, video=CLIP, strength=between, **options | {"noise": None})
    options = {"times": TIMES, "guidance": OPTIONS["guidance"], **get_first_conditions(pipeline)}
    result = pipeline.run(Edit(CLIP, PROMPT, strength=between), **options)
    np.testing.assert_array_equal(result.frames, pipeline.decode(latents).frames)
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


def get_first_conditions(pipeline):
    """Return the options of a task whose clip begins with that of the clip, for models that need it."""
    return {"conditions": [Condition(content=image) for image in get_first_image(pipeline).values()]}


def make_paths(pipeline, prompt, source, *, source_guidance=2.0, **options):
    """Return the paths of an edit of what `source` describes to `prompt`, with a guidance scale of 2."""
    request = Request(prompt, SIZE, **get_first_image(pipeline))
    target, described = (
        pipeline.make_stepper(each, sampling=pipeline.make_sampling(guidance=guidance, **options))
        for each, guidance in ((request, 2.0), (replace(request, prompt=source), source_guidance))
    )
    return EditPaths(described, target)


@pytest.mark.nightly
@each(ALL)
def test_an_edit_to_what_the_clip_shows_changes_nothing(pipeline):
    latents = pipeline.encode(CLIP)
    paths, others = (make_paths(pipeline, PROMPT, source, steps=4) for source in (PROMPT, "the table"))
    np.testing.assert_allclose(paths.edit_by_flow(latents, strength=0.95, seed=0), latents, atol=1e-4)
    assert np.abs(others.edit_by_flow(latents, strength=0.95, seed=0) - latents).max() > 1e-3
    options = OPTIONS | get_first_conditions(pipeline)
    task = DescribedEdit(CLIP, PROMPT, source=PROMPT, source_guidance=2.0, strength=0.95)
    result = pipeline.run(task, **options)
    np.testing.assert_allclose(result.frames.astype(int), pipeline.reconstruct(CLIP).frames, atol=1)
    assert result.fps == FPS
    for source, scale in (("the table", 2.0), (PROMPT, 1.0)):
        changed = pipeline.run(replace(task, source=source, source_guidance=scale), **options)
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
def test_an_edit_follows_the_paths_of_both_prompts(pipeline):
    """This is algorithm 1 of FlowEdit, with the velocities of steps."""
    latents = pipeline.encode(CLIP)
    paths = make_paths(pipeline, PROMPT, "the table", source_guidance=1.0, times=TIMES)
    expected = latents
    for step in range(1, 4):
        start, end = (*TIMES, 0.0)[step : step + 2]
        noise = make_generator(3, "edit", step).standard_normal(latents.shape).astype(np.float32)
        source = add_noise(latents, noise, start)
        target = expected + source - latents
        target_velocity, source_velocity = (
            (path(values, [step, step + 1]) - values) / (end - start)
            for path, values in ((paths.target, target), (paths.source, source))
        )
        expected = expected + (end - start) * (target_velocity - source_velocity)
    edited = paths.edit_by_flow(latents, strength=0.9, seed=3)
    np.testing.assert_allclose(edited, expected, atol=1e-5)
    assert np.abs(edited - latents).max() > 1e-2


@each(ALL)
def test_an_edit_averages_its_draws(pipeline):
    latents = pipeline.encode(CLIP)
    paths = make_paths(pipeline, PROMPT, "the table", source_guidance=1.0, times=TIMES)
    noises = make_generator(3, "edit", 3).standard_normal((2, *latents.shape)).astype(np.float32)
    changes = []
    for noise in noises:
        noisy = add_noise(latents, noise, TIMES[3])
        changes.append(paths.target(noisy, [3, 4]) - paths.source(noisy, [3, 4]))
    assert np.abs(changes[0] - changes[1]).max() > 1e-3
    edited = paths.edit_by_flow(latents, strength=0.5, seed=3, draws=2)
    np.testing.assert_allclose(edited, latents + np.mean(changes, axis=0), atol=1e-4)
    with pytest.raises(UserError, match="draws=0 is invalid"):
        paths.edit_by_flow(latents, strength=0.5, seed=3, draws=0)


@each(ALL)
def test_inversion_with_the_prompt_of_the_clip_returns_to_the_clip(pipeline):
    """The more steps, the closer."""
    latents = pipeline.encode(CLIP)
    few, returned, changed = (
        make_paths(pipeline, PROMPT, source, steps=steps).edit_by_inversion(latents, strength=0.8)
        for source, steps in ((PROMPT, 10), (PROMPT, 60), ("the table", 60))
    )
    far, near = (np.abs(each - latents).max() for each in (few, returned))
    assert near < far / 3
    assert near < 0.2 * latents.std()
    assert np.abs(changed - returned).max() > 1e-3
    task = DescribedEdit(CLIP, PROMPT, source=PROMPT, source_guidance=2.0, edit_method="inversion")
    result = pipeline.run(task, **OPTIONS | {"steps": 60} | get_first_conditions(pipeline))
    np.testing.assert_array_equal(result.frames, pipeline.decode(returned).frames)
    assert result.fps == FPS


# Loops.


@pytest.mark.nightly
@each(OF_TEXT)
def test_a_loop_begins_where_it_ends(pipeline):
    result = pipeline.run(Loop(PROMPT, size=(12, 16, 16)), **OPTIONS)
    assert result.frames.shape == (12, 16, 16, 3)
    estimates = []
    options = {"size": (13, 16, 16), "conditioner": SeamlessLoop()}
    latents = sample_latents(pipeline, **options, callback=lambda each: estimates.append(each.progress))
    # The second of two turns, from the middle of a latent frame on.
    turn = pipeline.decode(np.concatenate([latents, latents[1:]])).frames[13:]
    np.testing.assert_array_equal(result.frames, np.roll(turn, -2, axis=0))
    clip = pipeline.generate(PROMPT, **options | OPTIONS)
    np.testing.assert_array_equal(clip.frames, np.concatenate([result.frames[-1:], result.frames]))
    # The last step's latents are rolled along time, and that before them is of the frame that is then the last.
    (before,) = estimates[-1].estimate_latents().values()
    shifts = [shift for shift in (1, 2) if np.abs(np.roll(before[1:], shift, axis=0) - latents[1:]).max() < 1e-4]
    assert len(shifts) == 1
    last = 12 - 4 * shifts[0]
    expected = encode(pipeline, pipeline.decode(before).frames[last : last + 1])
    np.testing.assert_allclose(latents[:1], expected, atol=1e-4)
    other_seed = pipeline.run(Loop(PROMPT, size=(12, 16, 16)), seed=1, **OPTIONS)
    assert np.abs(other_seed.frames.astype(int) - result.frames).max() > 1


# Methods.


@pytest.mark.filterwarnings("ignore:.*kept without training")
@pytest.mark.parametrize(
    ("task", "options"),
    [
        (Extend(CLIP, PROMPT, frames=4, before=True), {"conditions": [Condition(content=FRAMES[0])]}),
        (Edit(CLIP, PROMPT), {"conditions": [Condition(content=FRAMES[0])]}),
        (Inpaint(CLIP, np.eye(16) > 0, PROMPT), {"generated": np.arange(9) > 0}),
    ],
    ids=["extension backwards", "editing", "inpainting"],
)
def test_a_model_that_needs_an_image_says_so(animating, task, options):
    """What the error names is planned."""
    config, request = animating.config, task.make_request(animating.config)
    with pytest.raises(UserError, match=r"this model needs an image; give image=, .* \(of a task conditions=.*a mask"):
        animating.run(task, **OPTIONS)
    check_requests(config, [replace(request, **options)], config.sampling)


def test_a_model_that_needs_an_image_makes_no_loop(animating):
    with pytest.raises(UserError, match="a loop is invalid: this model animates an image"):
        animating.run(Loop(PROMPT, size=(8, 16, 16)), **OPTIONS)


@each(UNTRAINED)
def test_a_model_that_is_not_trained_for_a_task_says_so(pipeline):
    tasks = [
        Generate(PROMPT, size=SIZE, image=FRAMES[0]),
        Extend(CLIP, PROMPT, frames=4),
        Inpaint(CLIP, np.eye(16) > 0, PROMPT),
        Interpolate(CLIP, PROMPT, factor=2),
    ]
    for task in tasks:
        with pytest.raises(UserError, match="method='trained' is invalid: this model was not trained for what is"):
            pipeline.run(task, method="trained", **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("image", [0, 5])
def test_steps_of_two_experts_are_repeated(two_experts, image):
    with warns():
        latents, again = (sample_latents(two_experts, image=FRAMES[image], resample=count, seed=1) for count in (1, 2))
    for kept in (latents, again):
        np.testing.assert_allclose(kept[:1], encode(two_experts, FRAMES[image : image + 1]), atol=1e-4)
    assert np.abs(latents - again)[1:].max() > 1e-3
    # Without known pixels there is nothing to agree with.
    np.testing.assert_array_equal(sample_latents(two_experts, resample=2), sample_latents(two_experts))


@pytest.mark.nightly
def test_repeated_steps_return_to_their_first_time_with_noise(two_experts, monkeypatch):
    """The parts of the steps are single ones, where there are few."""
    noise, further = np.random.default_rng(1).standard_normal((2, 3, 4, 4, 4)).astype(np.float32)

    def draw_further(self, number):
        return jnp.asarray(self.pack_latents(self.batch.branches[0].tokens, {0: further}))

    monkeypatch.setattr(PlannedBatch, "draw_noise", draw_further)
    sampling = two_experts.make_sampling(times=TIMES, guidance=2.0, solver="euler")
    request = Request(PROMPT, SIZE, image=FRAMES[0], noise=noise, resample=2)
    with warns():
        (latents,) = two_experts.generate_latents([request], sampling=sampling)
        stepper = two_experts.make_stepper(request, sampling=sampling)
    expected = noise
    for step, (start, end) in enumerate(itertools.pairwise((*TIMES, 0.0))):
        once, share = stepper(expected, [step, step + 1]), (1 - start) / (1 - end)
        returned = share * once + np.float32(start**2 - (share * end) ** 2) ** 0.5 * further
        expected = stepper(returned, [step, step + 1])
    np.testing.assert_allclose(latents, expected, atol=1e-4)


@pytest.mark.nightly
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
