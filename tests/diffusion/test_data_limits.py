"""Limits of the estimated data, for every prediction and solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.config_json import from_json, to_json
from dit_video.core.errors import UserError
from dit_video.diffusion import (
    SOLVERS,
    X0,
    ClippedPrediction,
    Epsilon,
    FlowMatching,
    LearnedVariance,
    RectifiedFlow,
    ThresholdedPrediction,
    V,
    VariancePreservingProcess,
    Velocity,
    make_noise_fn,
    make_uniform_times,
    sample,
    stateless,
)

PROCESS = VariancePreservingProcess()
DATA, NOISE = (jnp.asarray(np.random.default_rng(seed).normal(size=(3, 40)), jnp.float32) for seed in (0, 1))
TIME = jnp.asarray(0.4)


def estimate(prediction, data):
    """Return the estimate of a model that is right."""
    noisy, target = PROCESS.add_noise(data, NOISE, TIME), prediction.target(PROCESS, data, NOISE, TIME)
    return noisy, prediction.estimate(PROCESS, noisy, target, TIME)


@pytest.mark.parametrize("prediction", [Epsilon(), X0(), V()])
@pytest.mark.parametrize("kind", [ClippedPrediction, ThresholdedPrediction])
def test_data_within_the_limits_are_kept(kind, prediction):
    data = DATA / jnp.abs(DATA).max()
    for recompute_noise in (False, True):
        result = estimate(kind(prediction=prediction, recompute_noise=recompute_noise), data)[1]
        np.testing.assert_allclose(result.data, data, atol=1e-5)
        np.testing.assert_allclose(result.noise, NOISE, atol=1e-5)


def test_data_beyond_the_limit_are_clipped_and_the_noise_is_kept():
    result = estimate(ClippedPrediction(max_value=0.7), DATA)[1]
    np.testing.assert_allclose(result.data, np.clip(DATA, -0.7, 0.7), atol=1e-5)
    np.testing.assert_allclose(result.noise, NOISE, atol=1e-5)


@pytest.mark.parametrize(
    "limited", [ClippedPrediction(recompute_noise=True), ThresholdedPrediction(recompute_noise=True)]
)
def test_recomputed_noise_explains_the_noisy_value(limited):
    noisy, result = estimate(limited, DATA)
    np.testing.assert_allclose(PROCESS.add_noise(result.data, result.noise, TIME), noisy, atol=1e-5)
    assert np.abs(result.noise - NOISE).max() > 0.1


def test_a_threshold_is_the_quantile_of_each_sample_within_its_bounds():
    data = DATA * jnp.asarray([[0.2], [1.0], [30.0]])
    result = estimate(ThresholdedPrediction(quantile=0.8, max_threshold=2.0), data)[1].data
    thresholds = np.clip(np.quantile(np.abs(data), 0.8, axis=1), 1, 2)
    assert thresholds[0] == 1 < thresholds[1] < thresholds[2] == 2
    for row in range(3):
        expected = np.clip(data[row], -thresholds[row], thresholds[row]) / thresholds[row]
        np.testing.assert_allclose(result[row], expected, atol=1e-4)
    np.testing.assert_allclose(estimate(ThresholdedPrediction(), DATA)[1].data, jnp.clip(DATA, -1, 1), atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"heun", "pndm"}))
def test_samples_of_every_solver_lie_within_the_limits(name):
    """A model that overshoots: it predicts data twice as large as those of its range."""
    data = 2 * jnp.sign(DATA)
    noise_fn = make_noise_fn(jax.random.split(jax.random.key(0), 3), (40,))
    options = {"process": RectifiedFlow(), "solver": SOLVERS[name], "noise_fn": noise_fn}
    denoise, times = stateless(lambda noisy, time: data), make_uniform_times(RectifiedFlow(), 3)
    run = jax.jit(lambda prediction: sample(denoise, NOISE, times, prediction=prediction, **options), static_argnums=0)
    assert jnp.abs(run(X0())).max() > 1.5
    np.testing.assert_allclose(run(ClippedPrediction(prediction=X0())), jnp.sign(DATA), atol=1e-4)


def test_a_learned_variance_is_kept():
    limited = LearnedVariance(prediction=ClippedPrediction(prediction=Epsilon()))
    noisy = PROCESS.add_noise(DATA, NOISE, TIME)
    result = limited.estimate(PROCESS, noisy, jnp.concatenate([NOISE, DATA], axis=-1), TIME)
    np.testing.assert_allclose(result.data, jnp.clip(DATA, -1, 1), atol=1e-5)
    np.testing.assert_allclose(result.variance, (DATA + 1) / 2)


def test_the_loss_is_that_of_the_prediction():
    args = stateless(lambda noisy, time: -noisy), DATA[..., None], NOISE[..., None], jnp.full((3, 40), 0.4)
    limited = FlowMatching(prediction=ClippedPrediction(prediction=Velocity(), max_value=0.1))
    np.testing.assert_array_equal(limited.loss(*args), FlowMatching().loss(*args))


@pytest.mark.parametrize("kind", [ClippedPrediction, ThresholdedPrediction])
def test_a_limited_prediction_is_a_config(kind):
    assert from_json(to_json(kind(prediction=V()))) == kind(prediction=V())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClippedPrediction(max_value=0.0), r"max_value=0\.0 is invalid.* Use 1"),
        (lambda: ThresholdedPrediction(quantile=1.2), r"quantile=1\.2.* Use quantile=0\.995"),
        (lambda: ThresholdedPrediction(max_threshold=0.5), r"max_threshold=0\.5 .* Use quantile=0\.995"),
        (
            lambda: ClippedPrediction(prediction=LearnedVariance()),
            r"Use LearnedVariance\(prediction=ClippedPrediction\(prediction=",
        ),
    ],
)
def test_invalid_limits_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
