"""Solvers are held to a flow that is known: of data that are normal, N(m, s^2).

With x_t = (1 - t) x_0 + t e, x_t is normal of mean a(t) = (1 - t) m and variance b(t)^2 = (1 - t)^2 s^2 + t^2. The best
velocity is E[e - x_0 | x_t = x] = -m + (b'(t) / b(t)) (x - a(t)), for b b' = t - (1 - t) s^2 is the covariance of
e - x_0 with x_t. So (x - a) / b stays as it is along the flow, and the noise e at t = 1 becomes m + s e at t = 0.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dit_video.diffusion import SAMPLERS, Euler, Heun, RectifiedFlow, sample, sampler, time_grid
from dit_video.errors import UserError

MEAN, STD = 2.0, 0.3
NOISE = jnp.asarray(np.random.default_rng(0).normal(size=(64, 4)), jnp.float32)


def denoise(noisy, time):
    variance = (1 - time) ** 2 * STD**2 + time**2
    return -MEAN + (time - (1 - time) * STD**2) / variance * (noisy - (1 - time) * MEAN)


def run(solver, steps, process=RectifiedFlow(), noise=NOISE):  # noqa: B008
    return jax.jit(lambda x, times: sample(denoise, x, times, process=process, solver=solver))(
        noise, time_grid(process, steps)
    )


def error(solver, steps):
    return float(jnp.abs(run(solver, steps) - (MEAN + STD * NOISE)).mean())


@pytest.mark.parametrize(("solver", "order", "steps"), [(Euler(), 1, 40), (Heun(), 2, 20)], ids=["euler", "heun"])
def test_order_of_convergence(solver, order, steps):
    errors = [error(solver, steps * 2**k) for k in range(3)]
    found = np.log2(np.asarray(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(found, order, atol=0.15)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_samples_have_the_mean_and_deviation_of_the_data(name, shift):
    noise = jnp.asarray(stats.norm.ppf((np.arange(4000) + 0.5) / 4000), jnp.float32)
    found = run(sampler(name), 100, RectifiedFlow(shift=shift), noise)
    assert found.mean() == pytest.approx(MEAN, abs=0.01)
    assert found.std() == pytest.approx(STD, rel=0.05)
    assert stats.kstest((found - MEAN) / STD, "norm").statistic < 0.02


@pytest.mark.parametrize("solver", [Euler(), Heun()], ids=["euler", "heun"])
def test_a_constant_velocity_is_followed_exactly_in_one_step(solver):
    data = 3 * NOISE + 1
    process = RectifiedFlow()
    found = sample(lambda x, t: NOISE - data, NOISE, time_grid(process, 1), process=process, solver=solver)
    np.testing.assert_allclose(found, data, atol=1e-5)


def test_evaluations_and_their_times():
    times = []

    def recorded(noisy, time):
        times.append(float(time))
        return denoise(noisy, time)

    with jax.disable_jit():
        for solver in (Euler(), Heun()):
            sample(recorded, NOISE[:1], time_grid(RectifiedFlow(), 2), process=RectifiedFlow(), solver=solver)
    assert times == [1.0, 0.5, 1.0, 0.5, 0.5, 0.0]


def test_samples_of_a_batch_do_not_depend_on_each_other():
    together = run(Heun(), 8)
    np.testing.assert_allclose(run(Heun(), 8, noise=NOISE[:3]), together[:3], rtol=1e-6)
    changed = run(Heun(), 8, noise=NOISE.at[3:].mul(100.0))
    np.testing.assert_array_equal(changed[:3], together[:3])


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.7])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_grid_falls_from_noise_to_data(steps, shift):
    times = np.asarray(time_grid(RectifiedFlow(shift=shift), steps))
    assert times.shape == (steps + 1,)
    assert times[0] == pytest.approx(1, abs=1e-6)
    assert times[-1] == 0
    assert (np.diff(times) < 0).all()


def test_the_grid_has_the_shift_of_training():
    # 3 t / (1 + 2 t) at 1, 1/2 and 0.
    np.testing.assert_allclose(time_grid(RectifiedFlow(shift=3.0), 2), [1, 0.75, 0], atol=1e-6)


@pytest.mark.parametrize("steps", [0, -3])
def test_less_than_one_step(steps):
    with pytest.raises(UserError, match=f"at least 1 step, not {steps}"):
        time_grid(RectifiedFlow(), steps)


def test_samplers_by_name():
    assert sampler("euler") == Euler()
    assert sampler("heun") == Heun()
    with pytest.raises(UserError, match="unknown sampler 'ddim'; use one of euler, heun"):
        sampler("ddim")
