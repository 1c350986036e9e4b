"""The state of sampling: padded steps, failed steps, traces and the state of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.diffusion import (
    SOLVERS,
    Euler,
    Heun,
    RectifiedFlow,
    advance,
    init_sampling,
    make_uniform_times,
    sample,
    stateless,
)
from support.marks import mark_slow_except

SAMPLER_NAMES = mark_slow_except(["ddpm", "euler", "unipc"], sorted(SOLVERS))
PROCESS = RectifiedFlow()
NOISE = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5)), jnp.float32)


def predict(noisy, time):
    return jnp.sin(3 * noisy) + time


denoise = stateless(predict)


def run(solver, steps, padded, model=denoise, **options):
    """Run `steps` steps in a program for `padded` steps."""
    times = make_uniform_times(PROCESS, steps)
    times = jnp.concatenate([times, jnp.full(padded - steps, times[-1])])
    program = jax.jit(lambda state, times: advance(model, state, times, process=PROCESS, solver=solver, noise_fn=draw))
    return program(init_sampling(solver, NOISE, steps=steps, **options), times)


def draw(number):
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), number), NOISE.shape)


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_steps_of_no_length_change_nothing(name):
    solver = SOLVERS[name]
    plain = sample(denoise, NOISE, make_uniform_times(PROCESS, 3), process=PROCESS, solver=solver, noise_fn=draw)
    state = run(solver, 3, 8)
    np.testing.assert_allclose(state.x, plain, rtol=1e-5, atol=1e-5)
    assert (int(state.steps_done), int(state.failed_step)) == (3, -1)
    assert state.trace is None


@pytest.mark.parametrize("solver", [Euler(), Heun()], ids=["euler", "heun"])
def test_the_state_of_every_step_is_recorded(solver):
    state = run(solver, 4, 4, has_trace=True)
    assert state.trace.x.shape == state.trace.data.shape == (4, *NOISE.shape)
    np.testing.assert_array_equal(state.trace.x[-1], state.x)
    for steps in (1, 2):
        part = sample(denoise, NOISE, make_uniform_times(PROCESS, 4)[: steps + 1], process=PROCESS, solver=solver)
        np.testing.assert_allclose(state.trace.x[steps - 1], part, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.trace.data[0], NOISE - predict(NOISE, 1.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("broken", "step"), [(1.0, 0), (0.5, 2), (0.25, 3)])
def test_the_first_step_that_is_not_finite_is_noted(broken, step):
    def model(noisy, time):
        return jnp.where(time <= broken, jnp.full_like(noisy, jnp.nan).at[1].set(0), noisy)

    assert int(run(Euler(), 4, 6, stateless(model)).failed_step) == step


@pytest.mark.nightly
@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_the_state_of_the_model_advances_once_a_step(name):
    """All evaluations of a step get the state that it begins with. Of Heun's two, the second one's is dropped."""

    def count(noisy, time, state):
        return predict(noisy, time) + 0.1 * state, state + 1

    def at_step(number):
        return stateless(lambda noisy, time: predict(noisy, time) + 0.1 * number)

    solver, times = SOLVERS[name], make_uniform_times(PROCESS, 3)
    state = run(solver, 3, 8, count, denoiser=jnp.zeros(()))
    assert float(state.denoiser) == 3
    expected = init_sampling(solver, NOISE, steps=3)
    for step in range(3):
        part = times[step : step + 2]
        expected = advance(
            at_step(step), expected, part, process=PROCESS, solver=solver, noise_fn=draw, first_step=step
        )
    np.testing.assert_allclose(state.x, expected.x, rtol=1e-5, atol=1e-5)
