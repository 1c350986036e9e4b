import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_video.diffusion import (
    FlowMatching,
    RectifiedFlow,
    compute_distance,
    make_consistency_fn,
    make_estimator,
    matching_gradient,
    matching_loss,
    stateless,
)
from support import mixture_teacher as mixture

PROCESS = RectifiedFlow()
SAMPLES = jax.random.normal(jax.random.key(0), (512, 1, 2)) - 1


def estimate(mean):
    """Estimate the data from noisy values, for data of a standard normal around `mean`."""

    def data(noisy, time):
        alpha, sigma = PROCESS.alpha(time), PROCESS.sigma(time)
        return mean + alpha / (alpha**2 + sigma**2) * (noisy - alpha * mean)

    return data


def gradient(samples, real, fake, key):
    time = jax.random.uniform(key, (len(samples), 1, 1), minval=0.02, maxval=0.98)
    noisy = PROCESS.add_noise(samples, jax.random.normal(key, samples.shape), time)
    result = estimate(real)(noisy, time)
    size = compute_distance(samples, result).mean(axis=-1)[:, None, None]
    return matching_gradient(samples, result, estimate(fake)(noisy, time), size)


def test_equal_scores_have_no_gradient():
    np.testing.assert_array_equal(gradient(SAMPLES, 2.0, 2.0, jax.random.key(1)), 0)


def test_samples_move_from_the_fake_distribution_to_the_real_one():
    assert (gradient(SAMPLES, 2.0, -1.0, jax.random.key(1)) < 0).all()  # against it: towards 2
    assert (gradient(SAMPLES, -4.0, -1.0, jax.random.key(1)) > 0).all()


def test_gradient_descent_ends_at_the_real_distribution():
    """With a critic that is exact at every step, samples shift to the teacher's mean and not further."""
    mean, means = jnp.asarray(-1.0), []
    for key in jax.random.split(jax.random.key(1), 60):
        mean = mean - 0.2 * gradient(SAMPLES + (mean + 1), 2.0, mean, key).mean()
        means.append(float(mean))
    assert means[0] > -1
    np.testing.assert_allclose(means[-10:], 2.0, atol=0.05)


def test_the_gradient_is_normalised():
    real, fake = SAMPLES + 1, SAMPLES - 1
    np.testing.assert_allclose(matching_gradient(SAMPLES, real, fake, jnp.full((512, 1, 1), 4.0)), -0.5, rtol=1e-5)
    np.testing.assert_allclose(compute_distance(SAMPLES, real), 1.0, rtol=1e-5)
    assert np.isfinite(matching_gradient(SAMPLES, SAMPLES, fake, jnp.zeros((512, 1, 1)))).all()


def test_the_loss_has_the_given_gradient():
    expected = jax.random.normal(jax.random.key(5), SAMPLES.shape)
    result = jax.grad(lambda scale: matching_loss(scale * SAMPLES, scale * expected).sum())(1.0)
    np.testing.assert_allclose(result, (expected * SAMPLES).sum() / 2, rtol=1e-4)  # over the two values of each


@pytest.mark.slow
def test_a_student_learns_to_sample_a_mixture_in_one_step():
    objective, process = FlowMatching(), mixture.PROCESS
    slow, fast = (
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b1=0.0, b2=0.99))
        for rate in (optax.linear_schedule(1e-3, 0.0, 800), 5e-3)
    )
    real = make_estimator(stateless(mixture.denoise), process, mixture.PREDICTION)

    def generated(params, key):
        f = make_consistency_fn(stateless(mixture.make_student(params)), process, mixture.PREDICTION)
        return f(jax.random.normal(key, (256, 2)), jnp.ones((256, 1)))

    def critic_loss(critic, samples, key):
        key = jax.random.fold_in(key, 1)
        time = objective.compute_time(jax.random.uniform(key, (256,)))
        denoise = stateless(lambda noisy, token_time: mixture.make_student(critic)(noisy, token_time[:, None]))
        return objective.loss(denoise, samples, jax.random.normal(key, samples.shape), time).mean()

    def student_loss(params, critic, key):
        samples, key = generated(params, key), jax.random.fold_in(key, 1)
        time = jax.random.uniform(key, (256, 1), minval=0.02, maxval=0.98)
        noisy = process.add_noise(samples, jax.random.normal(key, samples.shape), time)
        result = real(noisy, time).data
        fake = make_estimator(stateless(mixture.make_student(critic)), process, mixture.PREDICTION)(noisy, time).data
        moved = matching_gradient(samples, result, fake, compute_distance(samples, result)[:, None])
        return matching_loss(samples, jax.lax.stop_gradient(moved)).mean()

    def updated(optimizer, loss, params, state, *args):
        updates, state = optimizer.update(jax.grad(loss)(params, *args), state)
        return optax.apply_updates(params, updates), state

    def step(carry, key):
        params, state, critic, critic_state = carry
        for turn in jax.random.split(key, 5):
            samples = generated(params, turn)
            critic, critic_state = updated(fast, critic_loss, critic, critic_state, samples, turn)
        params, state = updated(slow, student_loss, params, state, critic, key)
        return (params, state, critic, critic_state), None

    first, critic = (mixture.init_student(jax.random.key(seed)) for seed in (1, 2))
    keys = jax.random.split(jax.random.key(3), 800)
    start = (first, slow.init(first), critic, fast.init(critic))
    trained = jax.jit(lambda start: jax.lax.scan(step, start, keys)[0][0])(start)
    expected = mixture.sample(jax.random.key(4), 256)
    before, after = (
        mixture.energy_distance(generated(params, jax.random.key(5)), expected) for params in (first, trained)
    )
    assert before > 0.5
    assert after < before / 4
