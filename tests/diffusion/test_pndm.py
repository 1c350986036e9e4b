"""PNDM: orders of convergence, evaluations, and identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.diffusion import (
    Ddim,
    Edm,
    Epsilon,
    Pndm,
    RectifiedFlow,
    StepInterval,
    V,
    VariancePreservingProcess,
    Velocity,
    make_estimator,
    make_uniform_times,
    sample,
    stateless,
)
from support import gaussian_mixture as mixture

FLOW, VP = RectifiedFlow(), VariancePreservingProcess()
NOISE = np.random.default_rng(0).normal(size=(8, 2))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def solve(solver, process, prediction, times):
    estimate = make_estimator(mixture.make_denoise_fn(process, prediction), process, prediction)
    start = process.add_noise(jnp.asarray(mixture.sample(0, 8)), jnp.asarray(NOISE), times[0])

    def step(state, pair):
        return solver.step(estimate, process, state, StepInterval(*pair)), None

    pairs = times[:-1], times[1:]
    return jax.lax.scan(step, solver.init(start, steps=len(times) - 1), pairs)[0].x


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("solver", "process", "prediction", "order"),
    [
        (Pndm(start="runge-kutta"), FLOW, Velocity(), 4),
        (Pndm(start="runge-kutta"), Edm(sigma_max=5.0, exponent=1.0), Epsilon(), 4),
        (Pndm(), FLOW, Velocity(), 3),
        pytest.param(Pndm(), VP, Epsilon(), 2, marks=pytest.mark.slow),
        pytest.param(Pndm(value="v"), VP, V(), 1, marks=pytest.mark.slow),
    ],
    ids=["flow", "linear sigma", "heun's start", "noise", "v"],
)
def test_the_order_is_that_of_the_weights_where_the_move_is_linear_in_time(solver, process, prediction, order):
    """For other processes the weights, made for uniform steps, leave an error of second order, of v even of first."""
    with jax.enable_x64(True):
        ends = [np.asarray(solve(solver, process, prediction, jnp.linspace(0.8, 0.2, n + 1))) for n in (40, 80, 160)]
        exact = np.asarray(solve(Pndm(start="runge-kutta"), process, prediction, jnp.linspace(0.8, 0.2, 2001)))
    errors = [np.abs(end - exact).mean() for end in ends]
    np.testing.assert_allclose(np.log2(errors[1] / errors[2]), order, atol=0.35)
    assert errors[-1] < 5e-3


@pytest.mark.slow
def test_on_ddpms_process_the_error_is_smaller_than_that_of_ddim():
    with jax.enable_x64(True):
        times = jnp.linspace(0.9, 0.1, 21)
        exact = np.asarray(solve(Pndm(), VP, Epsilon(), jnp.linspace(0.9, 0.1, 2001)))
        pndm, ddim = (np.abs(np.asarray(solve(each, VP, Epsilon(), times)) - exact).mean() for each in (Pndm(), Ddim()))
    assert pndm < ddim / 3


@pytest.mark.parametrize("start", ["heun", "runge-kutta"])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_a_constant_velocity_is_followed_exactly(steps, start):
    noise = jnp.asarray(NOISE, jnp.float32)
    data = jnp.asarray(3 * NOISE + 1, jnp.float32)
    run = jax.jit(
        lambda noise: sample(
            stateless(lambda x, t: noise - data),
            noise,
            make_uniform_times(FLOW, steps),
            process=FLOW,
            solver=Pndm(start=start),
        )
    )
    np.testing.assert_allclose(run(noise), data, atol=2e-5)


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("heun", [1, 0.8, 0.8, 0.6, 0.4, 0.2]),
        ("runge-kutta", [1, 0.9, 0.9, 0.8, 0.8, 0.7, 0.7, 0.6, 0.6, 0.5, 0.5, 0.4, 0.4, 0.2]),
    ],
)
def test_the_model_is_evaluated_once_per_step_after_the_start(start, expected):
    """The model time at a midpoint lies between those at the ends of the step."""
    calls = []

    def denoise(noisy, time):
        calls.append(float(time))
        return noisy

    times = make_uniform_times(FLOW, 5)
    with jax.disable_jit():
        noise = jnp.asarray(NOISE, jnp.float32)
        sample(stateless(denoise), noise, times, process=FLOW, solver=Pndm(start=start), model_times=times / 2)
    np.testing.assert_allclose(calls, np.asarray(expected) / 2, atol=1e-6)


def test_midpoints_are_noise_steps_if_the_model_has_them():
    calls = []

    def denoise(noisy, time):
        calls.append(float(time))
        return noisy

    times = jnp.asarray([1.0, 0.9, 0.75, 0.7])
    with jax.disable_jit():
        noise = jnp.asarray(NOISE, jnp.float32)
        solver = Pndm(start="runge-kutta", training_steps=20)
        sample(stateless(denoise), noise, times, process=FLOW, solver=solver)
    # 0.825 and 0.725 lie between two of 20 steps.
    np.testing.assert_allclose(calls[1::4], [0.95, 0.8, 0.7], atol=1e-6)


def test_a_process_without_finite_slope_is_refused():
    process = VariancePreservingProcess(zero_terminal_snr=True)
    Pndm(value="v").check(process)
    with pytest.raises(UserError, match=r'Use Pndm\(value="v"\)'):
        Pndm().check(process)
    with pytest.raises(UserError, match=r"training_steps=0 is invalid: use 1"):
        Pndm(training_steps=0)
