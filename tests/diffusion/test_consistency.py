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
    Preconditioning,
    RectifiedFlow,
    UniformTimes,
    V,
    VariancePreservingProcess,
    Velocity,
    consistency_loss,
    make_consistency_fn,
    make_estimator,
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
