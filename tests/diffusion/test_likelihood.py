"""The likelihood of normal data, for which the best prediction is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dit_video.core.errors import UserError
from dit_video.diffusion import (
    X0,
    CosineBetas,
    Edm,
    Epsilon,
    HutchinsonTrace,
    Preconditioning,
    ProbeTrace,
    RectifiedFlow,
    V,
    VariancePreservingProcess,
    Velocity,
    log_likelihood,
    make_uniform_times,
    stateless,
)
from support.clip_rows import make_best_denoise

MEAN, STD = jnp.asarray([0.5, -0.3, 0.1]), jnp.asarray([0.4, 1.0, 0.7])
DATA = MEAN + STD * jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
NATS = stats.norm.logpdf(DATA, MEAN, STD).sum(axis=1)


def nats(process, prediction, times, **options):
    @jax.jit
    def run(data, times):
        return log_likelihood(
            make_best_denoise(process, prediction, mean=MEAN, std=STD),
            data,
            times,
            process=process,
            prediction=prediction,
            **options,
        )

    return run(DATA, times)


CASES = {
    "flow": (RectifiedFlow(), Velocity(), 64),
    "shifted-flow-v": (RectifiedFlow(shift=3.0), V(), 64),
    "ddpm": (VariancePreservingProcess(), Epsilon(), 64),
    "cosine": (VariancePreservingProcess(betas=CosineBetas()), V(), 64),
    "edm": (Edm(), Preconditioning(), 96),
}


@pytest.mark.parametrize(("process", "prediction", "steps"), CASES.values(), ids=CASES)
def test_the_likelihood_of_normal_data_is_exact(process, prediction, steps):
    result = nats(process, prediction, make_uniform_times(process, steps))
    np.testing.assert_allclose(result.nats, NATS, atol=0.03)
    np.testing.assert_allclose(result.bits_per_dimension, -result.nats / (3 * math.log(2)), rtol=1e-6)


def test_the_error_is_of_second_order():
    errors = [
        np.abs(nats(RectifiedFlow(), Velocity(), make_uniform_times(RectifiedFlow(), steps)).nats - NATS).mean()
        for steps in (16, 32)
    ]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.3)


def test_predictions_undefined_at_time_0_are_integrated_from_a_later_time():
    """Integration begins with a thousandth of noise in the data."""
    process = RectifiedFlow()
    times = jnp.append(make_uniform_times(process, 128)[:-1], 1e-3)
    np.testing.assert_allclose(nats(process, X0(), times).nats, NATS, atol=0.03)


# --- Hutchinson's estimate ------------------------------------------------------------------------------------------

MIX = jnp.asarray([[1.0, 0.8, 0.0], [-0.5, 1.0, 0.3], [0.0, 0.6, 1.0]])


def mixed(noisy, time):
    """Return a velocity whose derivative is not diagonal."""
    return jnp.tanh(noisy @ MIX) * (1 - time)


@jax.jit
def estimated(keys, data=DATA[:2]):
    divergence = HutchinsonTrace(keys=keys)
    times = make_uniform_times(RectifiedFlow(), 8)
    return log_likelihood(stateless(mixed), data, times, process=RectifiedFlow(), divergence=divergence).nats


@pytest.mark.nightly
def test_hutchinsons_estimate_is_unbiased():
    exact = log_likelihood(
        stateless(mixed), DATA[:2], make_uniform_times(RectifiedFlow(), 8), process=RectifiedFlow()
    ).nats
    keys = jax.random.split(jax.random.key(0), (4000, 2))
    draws = np.asarray(jax.jit(jax.vmap(estimated))(keys))
    assert (draws.std(axis=0) > 0.1).all()
    assert (np.abs(draws.mean(axis=0) - exact) < 4 * draws.std(axis=0) / math.sqrt(4000)).all()


def test_an_estimate_does_not_depend_on_the_rest_of_the_batch():
    keys = jax.random.split(jax.random.key(1), 2)
    together = estimated(keys)
    np.testing.assert_allclose(estimated(keys[::-1], DATA[:2][::-1]), together[::-1], rtol=1e-6)
    other = estimated(keys.at[1].set(jax.random.key(7)), DATA[:2].at[1].add(9.0))
    assert other[0] == together[0]
    assert other[1] != together[1]


def test_several_examples_in_a_row_have_likelihoods_of_their_own():
    """The row holds two examples and padding; the probes are all signs of a value, so that the estimate is exact."""
    times, process = make_uniform_times(RectifiedFlow(), 8), RectifiedFlow()

    def predict(noisy, time):
        return jnp.concatenate([mixed(noisy[:, :3], time), mixed(noisy[:, 3:6], time), noisy[:, 6:] ** 2], axis=1)

    row = jnp.concatenate([DATA[:1], DATA[1:2], jnp.full((1, 2), 0.5)], axis=1)
    corners = jnp.asarray(np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3), axis=-1).reshape(8, 1, 3), jnp.float32)
    probes = jnp.concatenate([corners, corners, jnp.ones((8, 1, 2))], axis=-1)
    result = log_likelihood(
        stateless(predict),
        row,
        times,
        process=process,
        divergence=ProbeTrace(probes),
        sum_values=lambda values: values[:, :6].reshape(2, 3).sum(axis=1),
    )
    alone = log_likelihood(stateless(mixed), DATA[:2], times, process=process)
    np.testing.assert_allclose(result.nats, alone.nats, rtol=1e-5)
    np.testing.assert_allclose(result.bits_per_dimension, alone.bits_per_dimension, rtol=1e-5)


def test_invalid_settings_are_refused():
    with pytest.raises(UserError, match="times=1 is invalid: it must be at least 2"):
        nats(RectifiedFlow(), Velocity(), jnp.ones(1))
    with pytest.raises(UserError, match="5 examples need a key each"):
        nats(
            RectifiedFlow(),
            Velocity(),
            jnp.linspace(1, 0, 3),
            divergence=HutchinsonTrace(keys=jax.random.split(jax.random.key(0), 4)),
        )
