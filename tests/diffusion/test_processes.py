"""Relations that follow from alpha and sigma, for every process and every prediction."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.diffusion import (
    X0,
    CosineBetas,
    Edm,
    Epsilon,
    FlowMatching,
    LinearBetas,
    Preconditioning,
    RectifiedFlow,
    ScaledLinearBetas,
    Uniform,
    V,
    VariancePreservingProcess,
    Velocity,
    make_estimator,
    make_uniform_times,
    stateless,
)

PROCESSES = {
    "flow": RectifiedFlow(shift=3.0),
    "linear": VariancePreservingProcess(),
    "scaled-linear": VariancePreservingProcess(betas=ScaledLinearBetas()),
    "cosine": VariancePreservingProcess(betas=CosineBetas()),
    "shifted": VariancePreservingProcess(betas=ScaledLinearBetas(), snr_shift=3.0),
    "zero-snr": VariancePreservingProcess(betas=ScaledLinearBetas(), zero_terminal_snr=True),
    "edm": Edm(data_std=1.0),
}
PREDICTIONS = {"epsilon": Epsilon(), "x0": X0(), "v": V(), "velocity": Velocity(), "edm": Preconditioning(data_std=1.0)}
TIMES = jnp.asarray([[0.2], [0.5], [0.9]])
DATA, NOISE = (jnp.asarray(np.random.default_rng(seed).normal(size=(3, 8)), jnp.float32) for seed in (0, 1))

each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


@each_process
@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
def test_a_prediction_is_converted_into_data_and_noise(process, prediction):
    noisy, target = process.add_noise(DATA, NOISE, TIMES), prediction.target(process, DATA, NOISE, TIMES)
    result = prediction.estimate(process, noisy, target, TIMES)
    size = jnp.maximum(1, process.sigma(TIMES))
    np.testing.assert_allclose(result.data / size, DATA / size, atol=2e-4)
    np.testing.assert_allclose(result.noise, NOISE, atol=2e-4 / float(process.sigma(jnp.asarray(0.2))))
    # An error of the prediction comes back as one of the data, of the size that is promised.
    wrong = prediction.estimate(process, noisy, target + 0.1, TIMES)
    error = jnp.abs(wrong.data - result.data).mean(axis=1)
    np.testing.assert_allclose(error, 0.1 * prediction.data_error_scale(process, TIMES)[:, 0], rtol=1e-2)


@each_process
def test_the_time_follows_from_the_ratio_of_noise_to_data(process):
    times = jnp.linspace(0.05, 0.95, 19)
    ratio = process.sigma(times) / process.alpha(times)
    np.testing.assert_allclose(process.ratio_to_time(ratio), times, rtol=1e-4)
    np.testing.assert_allclose(process.half_log_snr(times), -jnp.log(ratio), rtol=1e-4, atol=1e-5)
    assert (jnp.diff(ratio) > 0).all()
    assert process.alpha(jnp.zeros(())) == 1
    assert process.sigma(jnp.zeros(())) == 0


@each_process
def test_the_velocity_is_the_derivative_of_the_noisy_value(process):
    # Not at a knot of a schedule of steps, where the slope jumps.
    times = TIMES + 0.0005
    result = Velocity().target(process, DATA, NOISE, times)
    ahead, behind = (process.add_noise(DATA, NOISE, times + step) for step in (4e-4, -4e-4))
    np.testing.assert_allclose(result, (ahead - behind) / 8e-4, rtol=0.02, atol=0.02)


@each_process
@pytest.mark.parametrize(("time", "following"), [(0.9, 0.5), (0.5, 0.49), (0.3, 0.0)])
def test_the_posterior_undoes_a_step_of_noise(process, time, following):
    """x_s drawn from the posterior of x_t and x_0 is distributed as x_s given x_0: its moments agree."""
    time, following = jnp.asarray(time), jnp.asarray(following)
    mean_at = process.posterior(process.alpha(time) * DATA, DATA, time, following).mean
    np.testing.assert_allclose(mean_at, process.alpha(following) * DATA, rtol=1e-3, atol=1e-3)
    slope = process.posterior(jnp.ones(()), jnp.zeros(()), time, following)
    variance = (slope.mean * process.sigma(time)) ** 2 + slope.variance
    np.testing.assert_allclose(variance, process.sigma(following) ** 2, rtol=1e-3, atol=1e-6)


def test_a_part_that_a_prediction_does_not_determine_is_zero():
    """Thus sampling may start at pure noise, and evaluate the model at the data."""
    flow = RectifiedFlow()
    of_noise = Epsilon().estimate(flow, NOISE, 0.9 * NOISE, jnp.ones(()))
    np.testing.assert_array_equal(of_noise.noise, 0.9 * NOISE)
    assert not of_noise.data.any()
    of_data = X0().estimate(flow, DATA, 0.9 * DATA, jnp.zeros(()))
    np.testing.assert_array_equal(of_data.data, 0.9 * DATA)
    assert not of_data.noise.any()


def test_the_schedules_of_noise_are_those_of_the_papers():
    linear, scaled, cosine = (
        VariancePreservingProcess(betas=betas) for betas in (LinearBetas(), ScaledLinearBetas(), CosineBetas())
    )
    # The last alpha-bar of DDPM (4.04e-5), of Stable Diffusion (0.00466) and of improved DDPM's cosine (2.4e-9).
    result = [float(process.alpha(jnp.ones(()))) ** 2 for process in (linear, scaled, cosine)]
    np.testing.assert_allclose(result, [4.036e-5, 4.660e-3, 2.428e-9], rtol=2e-3)
    np.testing.assert_allclose(linear.sigma(jnp.asarray(0.001)) ** 2, 1e-4, rtol=1e-3)


def test_a_shift_divides_the_signal_to_noise_ratio():
    plain, shifted = (VariancePreservingProcess(snr_shift=shift) for shift in (1.0, 3.0))
    times = jnp.linspace(0.001, 1, 1000)
    np.testing.assert_allclose(shifted.half_log_snr(times), plain.half_log_snr(times) - np.log(3) / 2, atol=1e-4)


def test_with_zero_terminal_snr_the_last_step_is_pure_noise_and_the_first_is_kept():
    plain, rescaled = (
        VariancePreservingProcess(betas=ScaledLinearBetas(), zero_terminal_snr=is_zero) for is_zero in (False, True)
    )
    times = np.arange(1, 1001) / 1000
    before, after = plain.alpha(times), rescaled.alpha(times)
    assert after[-1] == 0
    assert rescaled.sigma(jnp.ones(())) == 1
    np.testing.assert_allclose(after[0], before[0], rtol=1e-12)
    # One linear function of alpha for all steps (arXiv 2305.08891, algorithm 1).
    np.testing.assert_allclose(
        (after[:-1] - after[1:]) / (before[:-1] - before[1:]), after[0] / (before[0] - before[-1])
    )
    noise = rescaled.add_noise(DATA, NOISE, jnp.ones(()))
    np.testing.assert_array_equal(noise, NOISE)
    np.testing.assert_allclose(V().estimate(rescaled, noise, -DATA, jnp.ones(())).data, DATA, atol=1e-6)


def test_the_inputs_of_edm_models_have_unit_variance():
    process, seen = Edm(data_std=0.5), []
    estimate = make_estimator(
        stateless(lambda noisy, time: seen.append(noisy) or noisy), process, Preconditioning(data_std=0.5)
    )
    for time in (0.1, 0.5, 1.0):
        estimate(process.add_noise(0.5 * DATA / DATA.std(), NOISE / NOISE.std(), jnp.asarray(time)), jnp.asarray(time))
    np.testing.assert_allclose([value.std() for value in seen], 1, atol=0.25)
    assert process.scale_initial_noise(NOISE).std() == pytest.approx(float(80 * NOISE.std()), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VariancePreservingProcess(steps=0), "steps=0 is invalid: it must be at least 1"),
        (lambda: VariancePreservingProcess(snr_shift=0.0), "snr_shift=0.0 is invalid.* Use 1"),
        (lambda: VariancePreservingProcess(steps=1, zero_terminal_snr=True), "steps=1 is invalid.* at least 2"),
        (lambda: LinearBetas(beta_start=0.1, beta_end=0.01), "beta_start=0.1, beta_end=0.01 is invalid"),
        (lambda: ScaledLinearBetas(beta_end=1.5), "beta_end=1.5 is invalid.* beta_end < 1"),
        (lambda: Edm(sigma_max=-1.0), "sigma_max=-1.0.* must be positive"),
        (lambda: FlowMatching(process=Edm()), "Predict Epsilon, V or Preconditioning"),
    ],
)
def test_invalid_processes_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


# Process


DRAW = np.random.default_rng(0)
FLOW_DATA, FLOW_NOISE = (jnp.asarray(DRAW.normal(size=(3, 4, 5)), jnp.float32) for _ in range(2))
TIME = jnp.asarray(DRAW.uniform(size=(3, 1, 1)), jnp.float32)
PROCESS = RectifiedFlow()
VELOCITY = Velocity()


def test_time_0_is_data_and_1_is_noise():
    np.testing.assert_array_equal(PROCESS.add_noise(FLOW_DATA, FLOW_NOISE, jnp.zeros(())), FLOW_DATA)
    np.testing.assert_array_equal(PROCESS.add_noise(FLOW_DATA, FLOW_NOISE, jnp.ones(())), FLOW_NOISE)


def test_data_and_noise_come_back_from_the_velocity():
    noisy, velocity = (
        PROCESS.add_noise(FLOW_DATA, FLOW_NOISE, TIME),
        VELOCITY.target(PROCESS, FLOW_DATA, FLOW_NOISE, TIME),
    )
    result = VELOCITY.estimate(PROCESS, noisy, velocity, TIME)
    np.testing.assert_allclose(result.data, FLOW_DATA, atol=1e-6)
    np.testing.assert_allclose(result.noise, FLOW_NOISE, atol=1e-6)


def test_any_prediction_is_data_and_noise_that_explain_the_noisy_value():
    noisy, velocity = PROCESS.add_noise(FLOW_DATA, FLOW_NOISE, TIME), 3 * FLOW_DATA + 1
    data, noise, *_ = VELOCITY.estimate(PROCESS, noisy, velocity, TIME)
    np.testing.assert_allclose(PROCESS.add_noise(data, noise, TIME), noisy, atol=1e-5)
    np.testing.assert_allclose(VELOCITY.target(PROCESS, data, noise, TIME), velocity, atol=1e-5)


def test_the_velocity_is_the_derivative_along_the_path():
    step = 1e-2
    ahead, behind = (PROCESS.add_noise(FLOW_DATA, FLOW_NOISE, TIME + sign * step) for sign in (1, -1))
    np.testing.assert_allclose(
        (ahead - behind) / (2 * step), VELOCITY.target(PROCESS, FLOW_DATA, FLOW_NOISE, TIME), atol=1e-4
    )


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
