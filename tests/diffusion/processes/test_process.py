import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.diffusion import FlowMatching, RectifiedFlow, Uniform, Velocity, make_uniform_times

DRAW = np.random.default_rng(0)
DATA, NOISE = (jnp.asarray(DRAW.normal(size=(3, 4, 5)), jnp.float32) for _ in range(2))
TIME = jnp.asarray(DRAW.uniform(size=(3, 1, 1)), jnp.float32)
PROCESS = RectifiedFlow()
VELOCITY = Velocity()


def test_time_0_is_data_and_1_is_noise():
    np.testing.assert_array_equal(PROCESS.add_noise(DATA, NOISE, jnp.zeros(())), DATA)
    np.testing.assert_array_equal(PROCESS.add_noise(DATA, NOISE, jnp.ones(())), NOISE)


def test_data_and_noise_come_back_from_the_velocity():
    noisy, velocity = PROCESS.add_noise(DATA, NOISE, TIME), VELOCITY.target(PROCESS, DATA, NOISE, TIME)
    result = VELOCITY.estimate(PROCESS, noisy, velocity, TIME)
    np.testing.assert_allclose(result.data, DATA, atol=1e-6)
    np.testing.assert_allclose(result.noise, NOISE, atol=1e-6)


def test_any_prediction_is_data_and_noise_that_explain_the_noisy_value():
    noisy, velocity = PROCESS.add_noise(DATA, NOISE, TIME), 3 * DATA + 1
    data, noise, *_ = VELOCITY.estimate(PROCESS, noisy, velocity, TIME)
    np.testing.assert_allclose(PROCESS.add_noise(data, noise, TIME), noisy, atol=1e-5)
    np.testing.assert_allclose(VELOCITY.target(PROCESS, data, noise, TIME), velocity, atol=1e-5)


def test_the_velocity_is_the_derivative_along_the_path():
    step = 1e-2
    ahead, behind = (PROCESS.add_noise(DATA, NOISE, TIME + sign * step) for sign in (1, -1))
    np.testing.assert_allclose((ahead - behind) / (2 * step), VELOCITY.target(PROCESS, DATA, NOISE, TIME), atol=1e-4)


def test_a_shift_moves_times_towards_noise_and_keeps_the_ends():
    times = jnp.linspace(0, 1, 11)
    np.testing.assert_array_equal(PROCESS.shift_time(times), times)
    shifted = RectifiedFlow(shift=3.0).shift_time(times)
    assert (shifted[1:-1] > times[1:-1]).all()
    assert (jnp.diff(shifted) > 0).all()
    np.testing.assert_allclose(shifted[jnp.asarray([0, 5, 10])], [0, 0.75, 1], atol=1e-6)
    # Two shifts are one by their product; the inverse shift undoes it.
    twice = RectifiedFlow(shift=2.0).shift_time(RectifiedFlow(shift=1.5).shift_time(times))
    np.testing.assert_allclose(twice, shifted, atol=1e-6)
    np.testing.assert_allclose(RectifiedFlow(shift=1 / 3).shift_time(shifted), times, atol=1e-6)


def test_the_shift_holds_for_training_and_for_sampling():
    plain, shifted = (FlowMatching(process=RectifiedFlow(shift=shift), times=Uniform()) for shift in (1.0, 3.0))
    u = jnp.linspace(0, 1, 9)[1:-1]
    np.testing.assert_allclose(plain.compute_time(u), u, atol=1e-6)
    np.testing.assert_allclose(shifted.compute_time(u), 3 * u / (1 + 2 * u), rtol=1e-6)
    # So a model is sampled at quantiles of the times that it was trained at.
    np.testing.assert_allclose(make_uniform_times(shifted.process, 8)[1:-1], shifted.compute_time(u)[::-1], atol=1e-6)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan")])
def test_a_shift_that_is_not_positive_is_refused(shift):
    with pytest.raises(UserError, match="must be positive"):
        RectifiedFlow(shift=shift)


def test_a_process_is_a_value():
    assert RectifiedFlow(shift=2.0) == RectifiedFlow(shift=2.0) != RectifiedFlow()
    assert hash(RectifiedFlow(shift=2.0)) == hash(RectifiedFlow(shift=2.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        RectifiedFlow().shift = 2.0
