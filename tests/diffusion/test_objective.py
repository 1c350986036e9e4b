"""Objectives: what the model gets, and the weights of the loss, which are equivalent for every prediction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.diffusion import (
    X0,
    CosineBetas,
    Edm,
    EdmWeight,
    Epsilon,
    FlowMatching,
    MinSnr,
    Objective,
    Preconditioning,
    RectifiedFlow,
    SigmoidWeight,
    UniformWeighting,
    V,
    VariancePreservingProcess,
    Velocity,
    stateless,
)

DRAW_TOKENS = np.random.default_rng(0)
TOKENS, TOKEN_NOISE = (jnp.asarray(DRAW_TOKENS.normal(size=(2, 4, 5)), jnp.float32) for _ in range(2))
TOKEN_TIMES = jnp.asarray(DRAW_TOKENS.uniform(size=(2, 4)), jnp.float32)
OBJECTIVE = FlowMatching()


def test_the_model_gets_noisy_tokens_and_their_times():
    seen = {}

    def denoise(noisy, time):
        seen.update(noisy=noisy, time=time)
        return noisy

    OBJECTIVE.loss(stateless(denoise), TOKENS, TOKEN_NOISE, TOKEN_TIMES)
    np.testing.assert_array_equal(seen["time"], TOKEN_TIMES)
    np.testing.assert_allclose(
        seen["noisy"], (1 - TOKEN_TIMES[..., None]) * TOKENS + TOKEN_TIMES[..., None] * TOKEN_NOISE, atol=1e-6
    )


def test_a_perfect_prediction_has_no_loss():
    assert not OBJECTIVE.loss(
        stateless(lambda noisy, time: TOKEN_NOISE - TOKENS), TOKENS, TOKEN_NOISE, TOKEN_TIMES
    ).any()


def test_the_loss_is_the_mean_squared_error_of_every_token():
    error = jnp.asarray(DRAW_TOKENS.normal(size=(2, 4, 5)), jnp.float32)
    result = OBJECTIVE.loss(
        stateless(lambda noisy, time: TOKEN_NOISE - TOKENS + error), TOKENS, TOKEN_NOISE, TOKEN_TIMES
    )
    assert result.shape == (2, 4)
    np.testing.assert_allclose(result, np.square(error).mean(axis=-1), rtol=1e-4)


def test_a_bfloat16_prediction_is_compared_in_float32():
    result = OBJECTIVE.loss(
        stateless(lambda noisy, time: (TOKEN_NOISE - TOKENS).astype(jnp.bfloat16)), TOKENS, TOKEN_NOISE, TOKEN_TIMES
    )
    assert result.dtype == jnp.float32
    assert (result < 1e-4).all()


def test_the_shift_is_applied_to_drawn_times_once():
    objective = FlowMatching(process=RectifiedFlow(shift=4.0))
    # The median of logit-normal times of mean 0 is 1/2; shifted by 4 it is 4/5.
    np.testing.assert_allclose(objective.compute_time(jnp.asarray([0.5])), [0.8], rtol=1e-5)


# Loss weightings: functions of the schedule, equivalent for every prediction


TIMES = jnp.asarray([0.2505, 0.5005, 0.9505])
FLOW, DDPM, EDM = RectifiedFlow(), VariancePreservingProcess(), Edm()
PROCESSES = {"flow": FLOW, "ddpm": DDPM, "cosine": VariancePreservingProcess(betas=CosineBetas()), "edm": EDM}
PREDICTIONS = {"x0": X0(), "v": V(), "velocity": Velocity(), "edm": Preconditioning()}
WEIGHTINGS = {"min-snr": MinSnr(), "edm": EdmWeight(), "sigmoid": SigmoidWeight(bias=-1.0)}

each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
each_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)


def snr(process, time=TIMES):
    return jnp.square(process.alpha(time) / process.sigma(time))


@each_process
@each_weighting
@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
def test_a_weighting_is_equivalent_for_every_prediction(process, weighting, prediction):
    error = prediction.data_error_scale(process, TIMES)
    of_data = weighting(process, prediction, TIMES) / jnp.square(error)
    of_noise = weighting(process, Epsilon(), TIMES) * snr(process)
    np.testing.assert_allclose(of_data, of_noise, rtol=1e-4)


@each_process
def test_min_snr_weights_are_those_of_the_paper(process):
    ratio = snr(process)
    np.testing.assert_allclose(MinSnr(gamma=2.0)(process, X0(), TIMES), jnp.minimum(ratio, 2), rtol=1e-4)
    np.testing.assert_allclose(MinSnr(gamma=2.0)(process, Epsilon(), TIMES), jnp.minimum(1, 2 / ratio), rtol=1e-4)
    if isinstance(process, VariancePreservingProcess):  # the paper's form of v
        result = MinSnr(gamma=2.0)(process, V(), TIMES)
        np.testing.assert_allclose(result, jnp.minimum(ratio, 2) / (ratio + 1), rtol=1e-4)


def test_edm_weights_are_those_of_the_paper():
    sigma = EDM.sigma(TIMES)
    np.testing.assert_allclose(EdmWeight()(EDM, X0(), TIMES), (sigma**2 + 0.25) / (0.5 * sigma) ** 2, rtol=1e-5)
    for process in PROCESSES.values():
        result = EdmWeight(data_std=2.0)(process, Preconditioning(data_std=2.0), TIMES)
        np.testing.assert_allclose(result, 1, rtol=1e-4)


@pytest.mark.nightly
@each_process
def test_the_sigmoid_weighting_is_defined_over_uniform_log_snrs(process):
    """The integral of the weights over time is that over the log-SNR, which ends at the ends of the process."""
    bias = 0.5
    times = jnp.linspace(0.0, 1.0, 8001)[1:-1] + 1e-5
    result = jnp.sum(SigmoidWeight(bias=bias)(process, Epsilon(), times)) / 8000
    last = 2 * process.half_log_snr(jnp.ones(()))
    expected = jnp.log1p(jnp.exp(bias - last))  # the integral of sigmoid(bias - x) from there to infinity
    if process is not FLOW:
        np.testing.assert_allclose(result, expected, rtol=0.02)
    of_flow = SigmoidWeight(bias=bias)(FLOW, Velocity(), TIMES)
    logarithm = 2 * FLOW.half_log_snr(TIMES)
    rate = 2 / (TIMES * (1 - TIMES))
    of_noise = rate / (1 + jnp.exp(logarithm - bias))
    np.testing.assert_allclose(of_flow, of_noise * (1 - TIMES) ** 2, rtol=1e-4)


@pytest.mark.nightly
@each_process
@each_weighting
def test_weights_are_finite_and_not_negative_at_all_training_times(process, weighting):
    time = jnp.asarray([1e-5, 1e-3, 0.5, 0.999, 1 - 1e-5])
    for prediction in (Epsilon(), *PREDICTIONS.values()):
        result = weighting(process, prediction, time)
        assert np.isfinite(result).all()
        assert (result >= 0).all()
    assert np.isfinite(weighting(process, V(), jnp.asarray([0.0, 1.0]))[1])


DRAW = np.random.default_rng(0)
DATA, NOISE = (jnp.asarray(DRAW.normal(size=(3, 2, 4)), jnp.float32) for _ in range(2))
TIME = jnp.asarray(DRAW.uniform(0.1, 0.9, size=(3, 2)), jnp.float32)


def objective(weighting):
    return Objective(process=DDPM, prediction=Epsilon(), weighting=weighting)


@pytest.mark.parametrize("weighting", [UniformWeighting(), MinSnr()])
def test_a_loss_does_not_depend_on_the_rest_of_the_batch(weighting):
    """Weights that are normalised over a batch would make the loss of a sample depend on it."""
    loss = jax.jit(lambda *batch: objective(weighting).loss(stateless(lambda noisy, time: 0 * noisy), *batch))
    together = loss(DATA, NOISE, TIME)
    assert (together > 0).all()
    for row in range(3):
        one = (values[row : row + 1] for values in (DATA, NOISE, TIME))
        np.testing.assert_allclose(loss(*one)[0], together[row], rtol=1e-6)


def test_the_loss_is_weighted_by_the_time_of_its_token():
    plain, weighted = (
        objective(weighting).loss(stateless(lambda noisy, time: 0 * noisy), DATA, NOISE, TIME)
        for weighting in (UniformWeighting(), MinSnr())
    )
    np.testing.assert_allclose(weighted, plain * jnp.minimum(1, 5 / snr(DDPM, TIME)), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinSnr(gamma=0.0), "gamma=0.0 is invalid.* Use 5"),
        (lambda: EdmWeight(data_std=-1.0), "data_std=-1.0 is invalid.* Use 1 for normalised latents"),
        (lambda: SigmoidWeight(bias=float("inf")), "must be a finite number"),
    ],
)
def test_invalid_weightings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
