"""Blocks of steps: the same samples as all steps at once, progress between them, and what may stop them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.diffusion import CosineBetas, DpmMultistep, Edm, RectifiedFlow, VariancePreservingProcess
from dit_video.sampling import Monitor, Sampling, sample_latents
from dit_video.sampling.sampler import estimate_parts, return_to_time
from support.tiny_denoiser import DENOISER, SHAPE, SMALL, make_request

REQUESTS = [make_request("red", (2, 4, 4)), SMALL, make_request("a box", (1, 4, 6), seed=2)]
SAMPLING = Sampling(steps=7, guidance=2.0)


def sample_requests(sampling=SAMPLING, requests=REQUESTS, **options):
    return sample_latents(DENOISER, requests, sampling=sampling, shape=SHAPE, rows=2, **options)


@pytest.mark.parametrize("solver", [SAMPLING.solver, DpmMultistep()])
def test_samples_do_not_depend_on_the_length_of_blocks(solver):
    sampling = Sampling(steps=7, guidance=2.0, solver=solver)
    results = [
        sample_requests(sampling, monitor=Monitor(lambda progress: None, block_steps=steps)) for steps in (1, 3, 7)
    ]
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(first, second)


def test_the_monitor_sees_every_block_and_what_it_leads_to():
    seen = []

    def watch(progress):
        seen.append((progress.step, progress.steps, progress.requests, progress.estimate_latents()))

    results = sample_requests(monitor=Monitor(watch, block_steps=2))
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
        sample_requests(requests=REQUESTS[:1], monitor=Monitor(stop, block_steps=2))
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
