import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.diffusion import (
    Ddpm,
    Epsilon,
    LearnedVariance,
    Objective,
    VariancePreservingProcess,
    make_noise_fn,
    make_uniform_times,
    sample,
    stateless,
)
from dit_video.models.backbones.denoise import make_denoise_fn
from dit_video.models.conditioning import ClassIds, Conditioning
from dit_video.nn import get_graph_def
from dit_video.tokens import Grid, PackedRows, compute_positions
from support.random_params import make_random_params
from support.tiny_class_dit import DIT

STEPS = 100
PROCESS = VariancePreservingProcess(steps=STEPS)
LEARNED = LearnedVariance(steps=STEPS, bound_weight=0.02)
OBJECTIVE, PLAIN = (Objective(process=PROCESS, prediction=prediction) for prediction in (LEARNED, Epsilon()))
DRAW = np.random.default_rng(0)
DATA, NOISE, VALUES = (DRAW.normal(size=(4, 6)).astype(np.float32) for _ in range(3))
SHARES = DRAW.uniform(-1, 1, size=(4, 6)).astype(np.float32)
NUMBERS = np.asarray([1, 2, 37, STEPS])
"""Indices of diffusion steps."""
TIME = jnp.asarray(NUMBERS / STEPS, jnp.float32)


@jax.jit
def hybrid(values, shares, time=TIME):
    data, noise = jnp.asarray(DATA), jnp.asarray(NOISE)
    return OBJECTIVE.loss(stateless(lambda noisy, time: jnp.concatenate([values, shares], axis=-1)), data, noise, time)


@jax.jit
def plain(values):
    return PLAIN.loss(stateless(lambda noisy, time: values), jnp.asarray(DATA), jnp.asarray(NOISE), TIME)


def bound():
    """Compute the bound of improved DDPM from betas and their products: each step in bits."""
    betas = np.linspace(1e-4, 0.02, STEPS)
    kept = np.cumprod(1 - betas)
    before = np.append(1.0, kept[:-1])
    posterior = betas * (1 - before) / (1 - kept)
    lower = np.log(np.append(posterior[1], posterior[1:]))
    of_data, of_noisy = betas * np.sqrt(before) / (1 - kept), (1 - before) * np.sqrt(1 - betas) / (1 - kept)

    def look_up(table):
        return table[NUMBERS - 1][:, None]

    noisy = np.sqrt(look_up(kept)) * DATA + np.sqrt(1 - look_up(kept)) * NOISE
    guessed = (noisy - np.sqrt(1 - look_up(kept)) * VALUES) / np.sqrt(look_up(kept))
    own = (SHARES + 1) / 2 * np.log(look_up(betas)) + (1 - SHARES) / 2 * look_up(lower)
    off = (look_up(of_data) * (DATA - guessed)) ** 2 * np.exp(-own)
    divergence = (own - look_up(lower) - 1 + np.exp(look_up(lower) - own) + off) / 2
    mean = look_up(of_data) * guessed + look_up(of_noisy) * noisy
    surprise = (own + np.log(2 * np.pi) + (DATA - mean) ** 2 * np.exp(-own)) / 2
    return np.where(NUMBERS[:, None] == 1, surprise, divergence).mean(axis=1) / np.log(2)


def test_the_hybrid_loss_is_that_of_improved_ddpm():
    expected = bound()
    assert np.ptp(expected) > 1
    result = hybrid(VALUES, SHARES) - plain(VALUES)
    np.testing.assert_allclose(result, 0.02 * STEPS * expected, rtol=2e-3)


def test_the_bound_has_gradients_to_the_variance_alone():
    of_values, of_shares = jax.grad(lambda *both: hybrid(*both).sum(), (0, 1))(VALUES, SHARES)
    np.testing.assert_allclose(of_values, jax.grad(lambda values: plain(values).sum())(VALUES), atol=1e-6)
    assert (np.abs(of_shares) > 1e-7).all()


def test_between_steps_the_loss_is_finite():
    for time in (1e-5, 0.9 / STEPS, 1.4 / STEPS, 1.6 / STEPS, 0.55551):
        assert np.isfinite(hybrid(VALUES, SHARES, jnp.full((4,), time))).all()


@pytest.mark.nightly
@pytest.mark.parametrize("number", [3, 20])
def test_the_variance_that_is_learned_is_that_of_the_step_back(number):
    """The data are normal, so that the best prediction and the variance of a step from it are known."""
    std, time = 0.7, jnp.asarray([number / STEPS])
    alpha, sigma = (float(part(time)[0]) for part in (PROCESS.alpha, PROCESS.sigma))
    alpha_before, sigma_before = (float(part(time - 1 / STEPS)[0]) for part in (PROCESS.alpha, PROCESS.sigma))
    size = alpha**2 * std**2 + sigma**2
    keys = jax.random.split(jax.random.key(0))
    data, noise = std * jax.random.normal(keys[0], (1, 100_000)), jax.random.normal(keys[1], (1, 100_000))

    @jax.jit
    def bound_for_share(share):
        def denoise(noisy, time):
            return jnp.concatenate([sigma / size * noisy, jnp.full_like(noisy, share)], axis=-1)

        return OBJECTIVE.loss(stateless(denoise), data, noise, time)[0]

    shares = jnp.linspace(-1, 1, 81)
    best = float(shares[jnp.argmin(jax.lax.map(bound_for_share, shares))])
    # Cov(x_s, x_t) = alpha_s alpha_t std^2 + (alpha_t / alpha_s) sigma_s^2.
    shared = alpha_before * alpha * std**2 + alpha / alpha_before * sigma_before**2
    true = alpha_before**2 * std**2 + sigma_before**2 - shared**2 / size
    upper = sigma**2 - (alpha / alpha_before * sigma_before) ** 2
    lower = upper * sigma_before**2 / sigma**2
    assert (best + 1) / 2 == pytest.approx(np.log(true / lower) / np.log(upper / lower), abs=0.05)


# --- a transformer that predicts its variance -----------------------------------------------------------------------

GRID = Grid(1, 4, 4)
LAYOUT = PackedRows(
    segments=jnp.ones((2, GRID.volume), jnp.int32),
    positions=jnp.tile(jnp.asarray(compute_positions(GRID))[None], (2, 1, 1)),
    count=1,
)
LABELS = Conditioning(ClassIds(jnp.asarray([[1], [3]])))
WIDTH = DIT.token_width


def denoiser(params):
    denoise = make_denoise_fn(nnx.merge(get_graph_def(DIT.make), params), LAYOUT, LABELS)
    return lambda noisy, time, state: denoise(noisy, jnp.broadcast_to(time, noisy.shape[:2]), state)


@pytest.mark.slow
def test_a_class_transformer_is_trained_and_sampled_with_its_variance():
    params, shape = make_random_params(DIT.make), (2, GRID.volume, WIDTH)
    data, noise = (jax.random.normal(jax.random.key(seed), shape) for seed in (0, 1))
    time = jnp.full(shape[:2], 0.37)

    @jax.jit
    def trained(params):
        return jax.grad(lambda params: OBJECTIVE.loss(denoiser(params), data, noise, time).mean(axis=(0, 1)))(params)

    # At each place of a patch the head has the prediction's channels, then the variance's: both are learned.
    bias = np.abs(trained(params)["head"]["bias"].reshape(DIT.patch.volume, 2, DIT.channels))
    assert (bias > 1e-6).all()

    @jax.jit
    def sampled(params):
        def run(prediction, denoise):
            return sample(
                denoise,
                noise,
                make_uniform_times(PROCESS, 4),
                process=PROCESS,
                solver=Ddpm(),
                prediction=prediction,
                noise_fn=make_noise_fn(jax.random.split(jax.random.key(5)), shape[1:]),
            )

        whole = denoiser(params)
        first = (
            whole(noise, jnp.asarray(0.3), None)[0],
            nnx.merge(get_graph_def(DIT.make), params)(noise, jnp.full((2, 1), 0.3), LAYOUT, LABELS)[0],
        )
        mean_alone = run(Epsilon(), stateless(lambda noisy, time: whole(noisy, time, None)[0][..., :WIDTH]))
        return first, run(LEARNED, whole), mean_alone

    (result, of_model), learned, fixed = sampled(params)
    places = np.asarray(of_model).reshape(*shape[:2], DIT.patch.volume, 2, DIT.channels)
    np.testing.assert_array_equal(result[..., :WIDTH], places[..., 0, :].reshape(shape))
    np.testing.assert_array_equal(result[..., WIDTH:], places[..., 1, :].reshape(shape))
    assert np.isfinite(learned).all()
    assert np.abs(learned - fixed).max() > 1e-2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedVariance(prediction=LearnedVariance()), "learns the variance itself"),
        (lambda: LearnedVariance(steps=1), "steps=1, .* 2 steps or more"),
        (lambda: LearnedVariance(bound_weight=-0.1), "bound_weight=-0.1.* bound_weight of 0 or more"),
    ],
)
def test_invalid_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
