"""Samples from random parameters, compared with a loop over the unpacked model, and in blocks of steps."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.diffusion import CosineBetas, DpmMultistep, Edm, Heun, RectifiedFlow, VariancePreservingProcess
from dit_video.models.conditioning import Conditioning, TextTokens
from dit_video.sampling import Monitor, Sampling, SamplingRequest, draw_initial_noise, sample_latents
from dit_video.sampling.program import make_program
from dit_video.sampling.sampler import estimate_parts, return_to_time
from dit_video.tokens import Grid, PackedRows, compute_positions, compute_token_grid, patchify, unpatchify
from support.tiny_denoiser import DENOISER, DIT, SAMPLING, SHAPE, SMALL, make_request

MIXED = [make_request("red"), SMALL, make_request("a box", (1, 4, 6), seed=2), make_request("", (3, 2, 2), seed=3)]


def sample_requests(requests, sampling=SAMPLING, shape=SHAPE, rows=2):
    return sample_latents(DENOISER, requests, sampling=sampling, shape=shape, rows=rows)


@functools.cache
def mixed():
    return sample_requests(MIXED)


@jax.jit
def velocity(params, tokens, time, text, positions):
    """Return the velocity of one clip alone, without packing or padding."""
    segments, text_segments = jnp.ones((1, tokens.shape[0]), jnp.int32), jnp.ones((1, text.shape[0]), jnp.int32)
    context = nnx.merge(DENOISER.text, params["text"])(text[None], text_segments)
    layout = PackedRows(segments=segments, positions=positions[None], count=1)
    conditioning = Conditioning(TextTokens(context.values, context.segments))
    prediction, _ = nnx.merge(DENOISER.backbone, params["backbone"])(
        tokens[None], time.reshape(1, 1), layout, conditioning
    )
    return prediction[0]


def sample_by_hand(request: SamplingRequest, *, interval: float = 1.0):
    """Take two Euler steps with guidance 2 over the shifted times 1, 2/3, 0."""
    grid = compute_token_grid(Grid(*request.noise.shape[:3]), DIT.patch)
    x, positions = patchify(request.noise, DIT.patch), compute_positions(grid, step=(interval, 1.0, 1.0))
    for time, following in ((1.0, 2 / 3), (2 / 3, 0.0)):
        c, u = (
            np.asarray(velocity(DENOISER.params, x, jnp.asarray(time), DENOISER.tokenizer(text), positions))
            for text in (request.prompt, request.negative)
        )
        x = x + (following - time) * (u + 2.0 * (c - u))
    return unpatchify(x, grid, DIT.patch)


def test_packed_samples_are_those_of_a_loop_over_the_unpacked_model():
    results = mixed()
    for index in (0, 1):
        assert np.std(results[index] - MIXED[index].noise) > 0.1
        np.testing.assert_allclose(results[index], sample_by_hand(MIXED[index]), atol=5e-5)


def test_coordinates_along_time_may_count_seconds():
    timed = DENOISER._replace(token_dt=0.25)
    result = sample_latents(timed, MIXED, sampling=SAMPLING, shape=SHAPE, rows=2)[0]
    np.testing.assert_allclose(result, sample_by_hand(MIXED[0], interval=0.25), atol=5e-5)
    assert np.abs(result - mixed()[0]).max() > 1e-3


def test_results_come_in_order_and_in_the_requested_sizes():
    for result, request in zip(mixed(), MIXED, strict=True):
        assert (result.shape, result.dtype) == (request.noise.shape, np.float32)
        assert np.isfinite(result).all()


def test_a_result_does_not_depend_on_the_other_requests():
    for index, request in enumerate(MIXED):
        np.testing.assert_allclose(sample_requests([request])[0], mixed()[index], atol=2e-5)
    for index, result in zip((2, 0, 3, 1), sample_requests([MIXED[index] for index in (2, 0, 3, 1)]), strict=True):
        np.testing.assert_allclose(result, mixed()[index], atol=2e-5)


def test_another_prompt_in_the_same_row_changes_nothing_bit_for_bit():
    others = [request._replace(prompt="blue") if index != 1 else request for index, request in enumerate(MIXED)]
    results = sample_requests(others)
    np.testing.assert_array_equal(results[1], mixed()[1])
    assert all((results[index] != mixed()[index]).any() for index in (0, 2, 3))


def test_more_requests_than_fit_the_rows_are_sampled_in_turns():
    requests = [make_request(f"{index}", (1, 2, 4), seed=index) for index in range(8)]
    results = sample_requests(requests)
    for index in (0, 3, 7):
        np.testing.assert_allclose(results[index], sample_requests(requests[index : index + 1])[0], atol=2e-5)


def test_one_program_serves_every_prompt_size_seed_guidance_and_number_of_steps():
    mixed()
    # A row has room for three clips: the branches are in separate rows.
    five = [make_request("", (2, 2, 2), seed=10)] * 5
    sample_requests(five)
    program = make_program(
        DENOISER.backbone, DENOISER.text, DENOISER.process, DENOISER.prediction, SAMPLING.solver, None, True, None
    )
    before = program._cache_size()
    assert before >= 2
    sample_requests([make_request("other words", (1, 4, 4), seed=9, negative="no")], Sampling(steps=2, guidance=5.5))
    sample_requests([make_request("", (2, 2, 2), seed=11)] * 4)
    for steps in (1, 3, 64):
        sample_requests([SMALL], replace(SAMPLING, steps=steps))
    assert program._cache_size() == before


@pytest.mark.nightly
def test_a_request_larger_than_a_row_is_sampled_too():
    large = make_request("wide", (3, 4, 6), seed=4)
    results = sample_requests([SMALL, large])
    np.testing.assert_allclose(results[0], mixed()[1], atol=2e-5)
    np.testing.assert_allclose(results[1], sample_by_hand(large), atol=5e-5)


def test_guidance_follows_the_prompt_and_the_negative_prompt_by_its_scale():
    unguided = Sampling(steps=2, guidance=1.0)
    plain = sample_requests([SMALL], unguided)[0]
    np.testing.assert_array_equal(sample_requests([SMALL._replace(negative="red")], unguided)[0], plain)
    # At scale 0 the prompt says nothing, and the negative prompt is the prompt.
    swapped = SMALL._replace(prompt="whatever", negative=SMALL.prompt)
    np.testing.assert_allclose(sample_requests([swapped], Sampling(steps=2, guidance=0.0))[0], plain, atol=2e-5)
    assert np.abs(sample_requests([SMALL._replace(negative="red")])[0] - mixed()[1]).max() > 1e-3
    assert np.abs(plain - mixed()[1]).max() > 1e-3


@pytest.mark.nightly
def test_a_solver_is_chosen_with_the_request():
    """Heun corrects the first of two steps, from 1 to 2/3; the step to the data is one of Euler."""
    heun = sample_requests([SMALL], Sampling(steps=2, guidance=1.0, solver=Heun()))[0]
    x, positions, text = patchify(SMALL.noise, DIT.patch), compute_positions(Grid(1, 1, 2)), DENOISER.tokenizer("dot")

    def slope(x, time):
        return np.asarray(velocity(DENOISER.params, x, jnp.asarray(time), text, positions))

    first = slope(x, 1.0)
    x = x - (first + slope(x - first / 3, 2 / 3)) / 6
    x = x - 2 / 3 * slope(x, 2 / 3)
    np.testing.assert_allclose(heun, unpatchify(x, Grid(1, 1, 2), DIT.patch), atol=5e-5)


def test_a_prompt_longer_than_the_text_of_a_row_is_refused():
    for request in (make_request("x" * 25), make_request("", negative="x" * 25), make_request("x" * 25, (5, 4, 4))):
        with pytest.raises(UserError, match="a prompt of 28 text tokens is longer than a row's 20; shorten the prompt"):
            sample_requests([request])


def test_invalid_requests_are_refused_and_no_requests_make_nothing():
    with pytest.raises(UserError, match="not divisible by the patch"):
        sample_requests([make_request("red", (1, 3, 4))])
    with pytest.raises(UserError, match="steps=0 is invalid: it must be at least 1"):
        Sampling(steps=0)
    assert sample_requests([]) == []


def test_noise_is_a_function_of_seed_and_size():
    noise = draw_initial_noise(5, Grid(4, 8, 8), 3)
    assert (noise.shape, noise.dtype) == ((4, 8, 8, 3), np.float32)
    np.testing.assert_array_equal(noise, draw_initial_noise(5, Grid(4, 8, 8), 3))
    assert (noise != draw_initial_noise(6, Grid(4, 8, 8), 3)).all()
    assert noise.mean() == pytest.approx(0, abs=0.15)
    assert noise.std() == pytest.approx(1, abs=0.1)


# Blocks of steps: the same samples as all steps at once, progress between them, and what may stop them.

REQUESTS = [make_request("red", (2, 4, 4)), SMALL, make_request("a box", (1, 4, 6), seed=2)]
SEVEN_STEPS = Sampling(steps=7, guidance=2.0)


def sample_in_blocks(sampling=SEVEN_STEPS, requests=REQUESTS, **options):
    return sample_latents(DENOISER, requests, sampling=sampling, shape=SHAPE, rows=2, **options)


@pytest.mark.nightly
@pytest.mark.parametrize("solver", [SEVEN_STEPS.solver, DpmMultistep()])
def test_samples_do_not_depend_on_the_length_of_blocks(solver):
    sampling = Sampling(steps=7, guidance=2.0, solver=solver)
    results = [
        sample_in_blocks(sampling, monitor=Monitor(lambda progress: None, block_steps=steps)) for steps in (1, 3, 7)
    ]
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(first, second)


def test_the_monitor_sees_every_block_and_what_it_leads_to():
    seen = []

    def watch(progress):
        seen.append((progress.step, progress.steps, progress.requests, progress.estimate_latents()))

    results = sample_in_blocks(monitor=Monitor(watch, block_steps=2))
    assert [step for step, *_ in seen if 0 in seen[0][2]][:4] == [2, 4, 6, 7]
    assert {steps for _, steps, *_ in seen} == {7}
    assert sorted({index for _, _, requests, _ in seen for index in requests}) == [0, 1, 2]
    for step, _, requests, estimates in seen:
        for index in requests:
            assert estimates[index].shape == results[index].shape
            if step == 7:
                np.testing.assert_allclose(estimates[index], results[index], atol=1e-5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_the_monitor_raises_ends_the_sampling_after_its_block(error):
    steps = []

    def stop(progress):
        steps.append(progress.step)
        if progress.step >= 4:
            raise error

    with pytest.raises(error):
        sample_in_blocks(requests=REQUESTS[:1], monitor=Monitor(stop, block_steps=2))
    assert steps == [2, 4]


@pytest.mark.parametrize("process", [RectifiedFlow(), VariancePreservingProcess(betas=CosineBetas()), Edm()])
def test_two_samples_of_a_path_tell_its_data_and_noise(process):
    data, noise = (jax.random.normal(jax.random.key(seed), (3, 4)) for seed in range(2))
    for time, next_time in ((1.0, 0.7), (0.6, 0.1), (0.3, 0.0)):
        ends = jnp.asarray(time), jnp.asarray(next_time)
        before, after = (process.add_noise(data, noise, end) for end in ends)
        estimates = estimate_parts(process, before, after, *ends)
        np.testing.assert_allclose(estimates[0], data, atol=2e-3)
        np.testing.assert_allclose(estimates[1], noise, atol=2e-3)


@pytest.mark.parametrize("process", [RectifiedFlow(), VariancePreservingProcess(betas=CosineBetas()), Edm()])
def test_a_sample_that_returns_to_a_time_has_the_distribution_of_that_time(process):
    count, time, next_time = 20_000, jnp.asarray(0.8), jnp.asarray(0.4)
    noise, added = (jax.random.normal(jax.random.key(seed), (count,)) for seed in range(2))
    data = jnp.full((count,), 2.0)
    returned = return_to_time(process, process.add_noise(data, noise, next_time), added, time, next_time)
    np.testing.assert_allclose(returned.mean(), 2 * process.alpha(time), atol=0.03 * float(process.sigma(time)))
    np.testing.assert_allclose(returned.std(), process.sigma(time), rtol=0.03)
