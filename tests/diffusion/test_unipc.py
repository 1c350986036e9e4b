"""UniPC on a known flow: that of normal data N(m, s^2), as in `test_sampler`, with (x - a(t)) / b(t) constant."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.diffusion import Euler, RectifiedFlow, UniPc, UniPcFlowSchedule, make_uniform_times, sample, stateless
from support.marks import mark_slow_except

MEAN, STD = 2.0, 0.3
NOISE = np.random.default_rng(0).normal(size=(8, 3))
FLOW = RectifiedFlow()


def spread(time):
    return jnp.sqrt((1 - time) ** 2 * STD**2 + time**2)


def denoise(noisy, time):
    slope = (time - (1 - time) * STD**2) / spread(time) ** 2
    return -MEAN + slope * (noisy - (1 - time) * MEAN)


def error(solver, times):
    """Return the error at the last of `times`, after a start on the exact flow at the first; in float64."""
    with jax.enable_x64(True):
        return float(compute_error(solver, jnp.asarray(times), jnp.asarray(NOISE)))


@functools.partial(jax.jit, static_argnums=0)
def compute_error(solver, times, noise):
    start, end = (1 - times[0]) * MEAN, (1 - times[-1]) * MEAN
    result = sample(stateless(denoise), start + spread(times[0]) * noise, times, process=FLOW, solver=solver)
    return jnp.abs(result - end - spread(times[-1]) * noise).mean()


@pytest.mark.parametrize("kind", [pytest.param("bh1", marks=pytest.mark.slow), "bh2"])
@pytest.mark.parametrize(("order", "expected"), [(1, 2), (2, 3), (3, 3)])
def test_solvers_with_corrector_converge_at_their_order(order, expected, kind):
    # Of order 3 the first step, which has no past, is as accurate as order 2's: some of its error is of that order.
    solver = UniPc(order=order, kind=kind, lower_order_final=False)
    errors = [error(solver, np.linspace(0.9, 0.1, steps + 1)) for steps in (40, 80, 160)]
    result = np.log2(np.asarray(errors[:-1]) / errors[1:])
    assert (result > expected - 0.25).all()
    assert order == 3 or (result < expected + 0.25).all()


@pytest.mark.nightly
@pytest.mark.parametrize("order", [1, 2])
def test_the_predictor_alone_converges_at_its_order(order):
    solver = UniPc(order=order, lower_order_final=False, uncorrected_steps=tuple(range(160)))
    errors = [error(solver, np.linspace(0.9, 0.1, steps + 1)) for steps in (40, 80, 160)]
    np.testing.assert_allclose(np.log2(np.asarray(errors[:-1]) / errors[1:]), order, atol=0.2)


def test_a_higher_order_is_closer():
    times = np.linspace(0.9, 0.1, 21)
    first, second, third = (error(UniPc(order=order, lower_order_final=False), times) for order in (1, 2, 3))
    assert third < second / 2 < first / 8


def test_from_noise_to_data_it_needs_fewer_evaluations_than_euler():
    def whole(solver, steps):
        return error(solver, np.asarray(make_uniform_times(FLOW, steps), np.float64))

    assert whole(UniPc(), 20) < whole(UniPc(), 10) / 4
    assert whole(UniPc(), 10) < whole(Euler(), 20) / 1.5
    assert whole(UniPc(), 40) < whole(UniPc(), 20) < whole(Euler(), 160)


@pytest.mark.nightly
def test_each_step_evaluates_the_model_once_at_its_time():
    calls = []

    def recorded(noisy, time):
        calls.append(float(time))
        return denoise(noisy, time)

    with jax.disable_jit():
        sample(
            stateless(recorded),
            jnp.asarray(NOISE, jnp.float32),
            make_uniform_times(FLOW, 4),
            process=FLOW,
            solver=UniPc(order=3),
        )
    assert calls == [1.0, 0.75, 0.5, 0.25]


def test_the_model_gets_the_model_times_of_the_schedule():
    calls = []

    def recorded(noisy, time):
        jax.debug.callback(lambda value: calls.append(float(value)), time, ordered=True)
        return denoise(noisy, time)

    grid = UniPcFlowSchedule()(RectifiedFlow(shift=3.0), 5)
    noise = jnp.asarray(NOISE, jnp.float32)
    sample(stateless(recorded), noise, grid.times, process=FLOW, solver=UniPc(), model_times=grid.model_times)
    jax.effects_barrier()
    # 3 u / (1 + 2 u) of u = 1, .8002, .6004, .4006, .2008, down to whole thousandths
    np.testing.assert_allclose(calls, [0.999, 0.923, 0.818, 0.667, 0.429], atol=1e-6)


@pytest.mark.parametrize("kind", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", mark_slow_except([5], [1, 2, 5]))
def test_a_constant_velocity_is_followed_exactly(steps, order, kind):
    noise = jnp.asarray(NOISE, jnp.float32)
    data = jnp.asarray(3 * NOISE + 1, jnp.float32)
    solver, times = UniPc(order=order, kind=kind), make_uniform_times(FLOW, steps)
    result = jax.jit(
        lambda noise: sample(stateless(lambda x, t: noise - data), noise, times, process=FLOW, solver=solver)
    )(noise)
    np.testing.assert_allclose(result, data, atol=2e-5)


def test_samples_of_a_batch_do_not_depend_on_each_other():
    noise, times = jnp.asarray(NOISE, jnp.float32), make_uniform_times(FLOW, 6)
    run = jax.jit(lambda noise: sample(stateless(denoise), noise, times, process=FLOW, solver=UniPc(order=3)))
    together = run(noise)
    np.testing.assert_array_equal(run(noise.at[3:].mul(100.0))[:3], together[:3])
    np.testing.assert_allclose(run(noise[:3]), together[:3], rtol=1e-5, atol=1e-6)


def test_a_sample_has_a_gradient():
    times = make_uniform_times(FLOW, 16)
    noise = jnp.asarray(NOISE, jnp.float32)
    gradient = jax.jit(jax.grad(lambda x: sample(stateless(denoise), x, times, process=FLOW, solver=UniPc()).sum()))(
        noise
    )
    np.testing.assert_allclose(gradient, STD, rtol=0.05)  # the data are m + s times the noise


def test_an_unsupported_order_is_refused():
    with pytest.raises(UserError, match="order 1, 2 or 3, not 4"):
        UniPc(order=4)
