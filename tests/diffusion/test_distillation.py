"""Consistency models and distribution matching: their identities, and students that learn a mixture."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_video.core.errors import UserError
from dit_video.diffusion import (
    X0,
    Edm,
    Epsilon,
    FlowMatching,
    Preconditioning,
    RectifiedFlow,
    UniformTimes,
    V,
    VariancePreservingProcess,
    Velocity,
    compute_distance,
    consistency_loss,
    make_consistency_fn,
    make_estimator,
    matching_gradient,
    matching_loss,
    run_multistep,
    stateless,
    step_along_flow,
)
from support import mixture_teacher as mixture

PROCESS = RectifiedFlow(shift=3.0)
MEAN, STD = 1.5, 0.4
"""Standard deviation of a Gaussian, whose flow is known."""


def spread(time):
    return jnp.sqrt((PROCESS.alpha(time) * STD) ** 2 + PROCESS.sigma(time) ** 2)


def exact_consistency(noisy, time):
    """Return the end of the flow through `noisy`."""
    return MEAN + STD / spread(time) * (noisy - PROCESS.alpha(time) * MEAN)


def follow_flow(noisy, time, following):
    """Return the point of that flow at another time."""
    standard = (noisy - PROCESS.alpha(time) * MEAN) / spread(time)
    return PROCESS.alpha(following) * MEAN + spread(following) * standard


def gaussian(noisy, time):
    """Return the exact velocity."""
    alpha, sigma = PROCESS.alpha(time), PROCESS.sigma(time)
    data = MEAN + alpha * STD**2 / spread(time) ** 2 * (noisy - alpha * MEAN)
    return (noisy - alpha * data) / sigma - data


NOISY = jax.random.normal(jax.random.key(0), (64, 3)) + 0.5
TIME, FOLLOWING = jnp.linspace(0.1, 1.0, 64)[:, None], jnp.linspace(0.05, 0.8, 64)[:, None]


def test_the_loss_of_the_exact_consistency_function_is_zero():
    reached = follow_flow(NOISY, TIME, FOLLOWING)
    loss = consistency_loss(exact_consistency, exact_consistency, NOISY, reached, TIME, FOLLOWING)
    assert loss.shape == (64,)
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    one_step = make_consistency_fn(stateless(gaussian), PROCESS, Velocity())
    assert consistency_loss(one_step, one_step, NOISY, reached, TIME, FOLLOWING).mean() > 0.01


@pytest.mark.slow
def test_the_exact_function_is_a_fixed_point_of_distillation():
    """Its gradient comes only from the error of the teacher's step, which is of second order."""
    estimate = make_estimator(stateless(gaussian), PROCESS, Velocity())

    def off(intervals):
        times = jnp.linspace(1.0, 0.0, intervals + 1)[: intervals // 2 + 1, None]  # where there is noise enough
        noisy = jnp.full((intervals // 2, 1), 0.7)
        reached = step_along_flow(estimate, PROCESS, noisy, times[:-1], times[1:])
        return np.abs(exact_consistency(reached, times[1:]) - exact_consistency(noisy, times[:-1])).max()

    errors = [off(intervals) for intervals in (16, 32, 64)]
    assert errors[0] < 0.02
    for coarse, fine in itertools.pairwise(errors):
        assert 3 < coarse / fine < 5


@pytest.mark.parametrize(
    ("process", "prediction"),
    [
        (RectifiedFlow(), Velocity()),
        (VariancePreservingProcess(), Epsilon()),
        (VariancePreservingProcess(), V()),
        (Edm(), Preconditioning()),
    ],
)
def test_at_time_0_a_consistency_function_returns_its_input(process, prediction):
    f = make_consistency_fn(stateless(lambda noisy, time: 5 * jnp.sin(noisy)), process, prediction)
    np.testing.assert_allclose(f(NOISY, jnp.zeros(())), NOISY, atol=1e-5)
    assert np.abs(f(NOISY, jnp.full((), 0.5)) - NOISY).max() > 0.1


def test_a_model_of_the_data_is_refused():
    with pytest.raises(UserError, match="Velocity"):
        make_consistency_fn(stateless(gaussian), PROCESS, X0())


def test_no_gradient_reaches_the_target():
    def loss(scale):
        f = lambda noisy, time: scale * exact_consistency(noisy, time)  # noqa: E731
        return consistency_loss(exact_consistency, f, NOISY, NOISY, TIME, FOLLOWING).sum()

    assert jax.grad(loss)(1.1) == 0


def test_the_loss_is_linear_in_large_differences_and_quadratic_in_small_ones():
    def loss(difference):
        time = jnp.zeros((1, 1))
        return float(
            consistency_loss(lambda x, t: x + difference, lambda x, t: x, time, time, time, time, width=0.1)[0]
        )

    assert loss(200.0) == pytest.approx(2 * loss(100.0), rel=0.01)
    assert loss(0.002) == pytest.approx(4 * loss(0.001), rel=0.01)


def test_steps_are_noised_again_to_the_next_time():
    times, noise = UniformTimes()(PROCESS, 3).times, NOISY
    drawn = jax.random.normal(jax.random.key(9), (3, *noise.shape))
    steps = {
        n: run_multistep(exact_consistency, noise, times, process=PROCESS, noise_fn=lambda i: drawn[i], steps=n)
        for n in (0, 1, 2)
    }
    np.testing.assert_array_equal(steps[0], noise)
    for number in (0, 1):
        data = exact_consistency(steps[number], times[number])
        expected = PROCESS.add_noise(data, drawn[number], times[number + 1])
        np.testing.assert_allclose(steps[number + 1], expected, rtol=1e-4, atol=1e-6)
    traced = jax.jit(
        lambda n: run_multistep(
            exact_consistency, noise, times, process=PROCESS, noise_fn=lambda i: jnp.asarray(drawn)[i], steps=n
        )
    )
    np.testing.assert_allclose(traced(2), steps[2], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_student_learns_to_sample_a_mixture_in_one_step():
    times = jnp.linspace(1.0, 0.0, 17)
    taught = make_estimator(stateless(mixture.denoise), mixture.PROCESS, mixture.PREDICTION)
    optimizer = optax.adam(optax.linear_schedule(3e-3, 0.0, 600))

    def f(params):
        return make_consistency_fn(stateless(mixture.make_student(params)), mixture.PROCESS, mixture.PREDICTION)

    def loss(params, average, key):
        index, time_index = jax.random.split(key)
        which = jax.random.randint(time_index, (256, 1), 0, 16)
        time, following = times[which], times[which + 1]
        noisy = mixture.PROCESS.add_noise(mixture.sample(index, 256), jax.random.normal(key, (256, 2)), time)
        reached = step_along_flow(taught, mixture.PROCESS, noisy, time, following)
        return consistency_loss(f(params), f(average), noisy, reached, time, following).mean()

    def step(carry, key):
        params, average, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, average, key), state)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda mean, new: 0.95 * mean + 0.05 * new, average, params)
        return (params, average, state), None

    first = mixture.init_student(jax.random.key(1))
    train = jax.jit(lambda params: jax.lax.scan(step, (params, params, optimizer.init(params)), keys)[0][1])
    keys = jax.random.split(jax.random.key(2), 600)
    noise, expected = jax.random.normal(jax.random.key(3), (800, 2)), mixture.sample(jax.random.key(4), 800)
    before, after = (
        mixture.energy_distance(f(params)(noise, jnp.ones((1, 1))), expected) for params in (first, train(first))
    )
    assert before > 0.5
    assert after < before / 8


# Dmd


MATCHED_PROCESS = RectifiedFlow()
SAMPLES = jax.random.normal(jax.random.key(0), (512, 1, 2)) - 1


def estimate(mean):
    """Estimate the data from noisy values, for data of a standard normal around `mean`."""

    def data(noisy, time):
        alpha, sigma = MATCHED_PROCESS.alpha(time), MATCHED_PROCESS.sigma(time)
        return mean + alpha / (alpha**2 + sigma**2) * (noisy - alpha * mean)

    return data


def gradient(samples, real, fake, key):
    time = jax.random.uniform(key, (len(samples), 1, 1), minval=0.02, maxval=0.98)
    noisy = MATCHED_PROCESS.add_noise(samples, jax.random.normal(key, samples.shape), time)
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
def test_a_student_that_matches_a_distribution_samples_it_in_one_step():
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
