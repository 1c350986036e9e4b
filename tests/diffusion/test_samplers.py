"""Solvers, compared with a known flow: that of normal data, N(m, s^2).

With x_t = (1 - t) x_0 + t e, x_t is normal of mean a(t) = (1 - t) m and variance b(t)^2 = (1 - t)^2 s^2 + t^2. The best
velocity is E[e - x_0 | x_t = x] = -m + (b'(t) / b(t)) (x - a(t)), for b b' = t - (1 - t) s^2 is the covariance of
e - x_0 with x_t. So (x - a) / b is constant along the flow, and the noise e at t = 1 becomes m + s e at t = 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dit_video.core.errors import UserError
from dit_video.diffusion import (
    SOLVERS,
    X0,
    ClippedPrediction,
    Ddim,
    Ddpm,
    DpmMultistep,
    Epsilon,
    Estimate,
    Euler,
    Heun,
    Lcm,
    RectifiedFlow,
    StepInterval,
    UniPc,
    VariancePreservingProcess,
    Velocity,
    get_solver,
    invert,
    make_estimator,
    make_noise_fn,
    make_uniform_times,
    sample,
    stateless,
    trace,
)
from support.marks import mark_slow_except

MEAN, STD = 2.0, 0.3
NOISE = jnp.asarray(np.random.default_rng(0).normal(size=(64, 4)), jnp.float32)


def denoise(noisy, time):
    variance = (1 - time) ** 2 * STD**2 + time**2
    return -MEAN + (time - (1 - time) * STD**2) / variance * (noisy - (1 - time) * MEAN)


def run(solver, steps, process=RectifiedFlow(), noise=NOISE, seed=0):  # noqa: B008
    keys = jax.random.split(jax.random.key(seed), len(noise))
    return jax.jit(
        lambda x, keys, times: sample(
            stateless(denoise), x, times, process=process, solver=solver, noise_fn=make_noise_fn(keys, x.shape[1:])
        )
    )(noise, keys, make_uniform_times(process, steps))


def error(solver, steps):
    return float(jnp.abs(run(solver, steps) - (MEAN + STD * NOISE)).mean())


@pytest.mark.parametrize(("solver", "order", "steps"), [(Euler(), 1, 40), (Heun(), 2, 20)], ids=["euler", "heun"])
def test_solvers_converge_at_their_order(solver, order, steps):
    errors = [error(solver, steps * 2**k) for k in range(3)]
    result = np.log2(np.asarray(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(result, order, atol=0.15)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "shift"), [(name, 1.0) for name in sorted(set(SOLVERS) - {"lcm"})] + [("euler", 3.0), ("unipc", 3.0)]
)
def test_samples_have_the_mean_and_deviation_of_the_data(name, shift):
    noise = jnp.asarray(stats.norm.ppf((np.arange(4000) + 0.5) / 4000), jnp.float32)
    result = run(get_solver(name), 100, RectifiedFlow(shift=shift), noise)
    exact = not get_solver(name).stochastic
    assert result.mean() == pytest.approx(MEAN, abs=0.01 if exact else 0.02)
    assert result.std() == pytest.approx(STD, rel=0.05)
    assert stats.kstest((result - MEAN) / STD, "norm").statistic < (0.02 if exact else 0.035)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_consistency_model_needs_few_steps(steps):
    """The model predicts the end of the flow, m + s (x - a) / b, as a velocity."""

    def consistent(noisy, time):
        spread = jnp.sqrt((1 - time) ** 2 * STD**2 + time**2)
        data = MEAN + STD / spread * (noisy - (1 - time) * MEAN)
        return (noisy - data) / time

    noise = jax.random.normal(jax.random.key(2), (4000, 1))
    draw = make_noise_fn(jax.random.split(jax.random.key(3), 4000), (1,))
    times = make_uniform_times(RectifiedFlow(), steps)
    result = sample(stateless(consistent), noise, times, process=RectifiedFlow(), solver=Lcm(), noise_fn=draw)
    assert stats.kstest((result[:, 0] - MEAN) / STD, "norm").statistic < 0.03


def test_ancestral_steps_of_ddpm_ddim_and_the_sde_are_equal():
    """For any process the steps of DDPM, of DDIM with eta 1 and of the SDE's first order are the same."""
    for process in (RectifiedFlow(), VariancePreservingProcess()):
        noise, result = NOISE[::-1] / 2, Estimate(NOISE / 3 + 1, NOISE)
        interval = StepInterval(jnp.asarray(0.7), jnp.asarray(0.4), noise)
        x = process.add_noise(result.data, result.noise, interval.time)
        ends = [
            solver.step(lambda x, time, result=result: result, process, solver.init(x, steps=3), interval).x
            for solver in (Ddim(eta=1.0), Ddpm(), DpmMultistep(eta=1.0, order=1))
        ]
        np.testing.assert_allclose(ends[1], ends[0], atol=1e-5)
        np.testing.assert_allclose(ends[2], ends[0], atol=1e-4)


@pytest.mark.parametrize(("share", "name"), [(0.0, "small"), (1.0, "large"), (0.5, None)])
def test_a_learned_variance_lies_between_the_two_in_logarithms(share, name):
    process, interval = (
        VariancePreservingProcess(),
        StepInterval(jnp.asarray(0.5), jnp.asarray(0.45), jnp.ones_like(NOISE)),
    )

    def spread(variance, solver):
        state = solver.init(jnp.zeros_like(NOISE), steps=2)
        result = Estimate(jnp.zeros_like(NOISE), jnp.zeros_like(NOISE), variance)
        return solver.step(lambda x, time: result, process, state, interval).x

    learned = spread(jnp.full_like(NOISE, share), Ddpm())
    fixed = [spread(None, Ddpm(variance=kind)) for kind in ("small", "large")]
    expected = jnp.sqrt(fixed[0] * fixed[1]) if name is None else fixed[name == "large"]
    assert (fixed[0] < fixed[1]).all()
    np.testing.assert_allclose(learned, expected, rtol=1e-4)


@pytest.mark.parametrize("solver", [Euler(), Heun()], ids=["euler", "heun"])
def test_a_constant_velocity_is_followed_exactly_in_one_step(solver):
    data = 3 * NOISE + 1
    process = RectifiedFlow()
    result = sample(
        stateless(lambda x, t: NOISE - data), NOISE, make_uniform_times(process, 1), process=process, solver=solver
    )
    np.testing.assert_allclose(result, data, atol=1e-5)


def test_solvers_evaluate_the_model_at_the_expected_times():
    times = []

    def recorded(noisy, time):
        times.append(float(time))
        return denoise(noisy, time)

    with jax.disable_jit():
        for solver in (Euler(), Heun()):
            sample(
                stateless(recorded),
                NOISE[:1],
                make_uniform_times(RectifiedFlow(), 2),
                process=RectifiedFlow(),
                solver=solver,
            )
    # The model is never asked what the noise is in data without any.
    assert times == [1.0, 0.5, 1.0, 0.5, 0.5]


@pytest.mark.parametrize("name", mark_slow_except(["ddpm", "dpm++2m", "unipc"], sorted(SOLVERS)))
def test_a_trace_has_the_intermediate_values_of_a_sample(name):
    times, draw = (
        make_uniform_times(RectifiedFlow(), 4),
        make_noise_fn(jax.random.split(jax.random.key(0), len(NOISE)), (4,)),
    )
    rest = {"process": RectifiedFlow(), "solver": get_solver(name), "noise_fn": draw}
    result = trace(stateless(denoise), NOISE, times, **rest)
    assert result.x.shape == result.data.shape == (4, *NOISE.shape)
    np.testing.assert_allclose(result.x[-1], sample(stateless(denoise), NOISE, times, **rest), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.data[0], NOISE - denoise(NOISE, 1.0), atol=1e-5)
    np.testing.assert_allclose(result.data[2], result.x[1] - 0.5 * denoise(result.x[1], 0.5), atol=1e-5)


@pytest.mark.parametrize("name", sorted(name for name in SOLVERS if get_solver(name).stochastic))
def test_the_noise_of_a_sample_does_not_depend_on_the_others(name):
    keys = jax.random.split(jax.random.key(1), len(NOISE))

    def drawn(noise, keys):
        times = make_uniform_times(RectifiedFlow(), 4)
        return sample(
            stateless(denoise),
            noise,
            times,
            process=RectifiedFlow(),
            solver=get_solver(name),
            noise_fn=make_noise_fn(keys, noise.shape[1:]),
        )

    together = drawn(NOISE, keys)
    np.testing.assert_array_equal(together, drawn(NOISE, keys))
    # Neither the others nor the place in the batch matter; another key does.
    np.testing.assert_allclose(drawn(NOISE[5:2:-1], keys[5:2:-1]), together[5:2:-1], rtol=1e-5, atol=1e-6)
    assert (jnp.abs(drawn(NOISE, keys[::-1]) - together) > 1e-4).any(axis=1).all()


def test_one_program_serves_all_times_of_one_length():
    traced = []

    @jax.jit
    def program(noise, times):
        traced.append(times.shape)
        return sample(stateless(denoise), noise, times, process=RectifiedFlow(), solver=DpmMultistep())

    for shift in (1.0, 2.0, 5.0):
        program(NOISE, make_uniform_times(RectifiedFlow(shift=shift), 4))
    assert traced == [(5,)]


def test_samples_of_a_batch_do_not_depend_on_each_other():
    together = run(Heun(), 8)
    np.testing.assert_allclose(run(Heun(), 8, noise=NOISE[:3]), together[:3], rtol=1e-6)
    changed = run(Heun(), 8, noise=NOISE.at[3:].mul(100.0))
    np.testing.assert_array_equal(changed[:3], together[:3])


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.7])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_grid_falls_from_noise_to_data(steps, shift):
    times = np.asarray(make_uniform_times(RectifiedFlow(shift=shift), steps))
    assert times.shape == (steps + 1,)
    assert times[0] == pytest.approx(1, abs=1e-6)
    assert times[-1] == 0
    assert (np.diff(times) < 0).all()


def test_the_grid_has_the_shift_of_training():
    # 3 t / (1 + 2 t) at 1, 1/2 and 0.
    np.testing.assert_allclose(make_uniform_times(RectifiedFlow(shift=3.0), 2), [1, 0.75, 0], atol=1e-6)


@pytest.mark.parametrize("steps", [0, -3])
def test_less_than_one_step_is_refused(steps):
    with pytest.raises(UserError, match=f"steps={steps} is invalid: it must be at least 1"):
        make_uniform_times(RectifiedFlow(), steps)


def test_samplers_are_found_by_name():
    assert get_solver("euler") == Euler()
    assert get_solver("euler-ancestral") == Ddim(eta=1.0)
    assert get_solver("dpm++sde") == DpmMultistep(eta=1.0)
    with pytest.raises(UserError, match=r"unknown solver 'plms'; use one of ddim, ddpm, dpm.*2m, "):
        get_solver("plms")


class WithoutDataAtItsNoise(VariancePreservingProcess):
    """A process without signal at its end, as in arXiv 2305.08891."""

    def alpha(self, time):
        return 1 - time


@pytest.mark.parametrize("name", sorted(name for name in SOLVERS if get_solver(name).stochastic))
def test_a_stochastic_solver_without_noise_is_refused(name):
    with pytest.raises(UserError, match=r"draws noise\. Use make_noise_fn"):
        sample(
            stateless(denoise),
            NOISE,
            make_uniform_times(RectifiedFlow(), 2),
            process=RectifiedFlow(),
            solver=get_solver(name),
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ddim(eta=-0.1), "eta=-0.1 is invalid"),
        (lambda: DpmMultistep(eta=float("nan")), "eta=nan is invalid"),
        (lambda: Lcm(scaling=0.0), "scaling=0.0.* must be positive"),
        (lambda: Heun().check(WithoutDataAtItsNoise()), r"alpha is 0 at its noise\. Use euler, ddim"),
        (lambda: inverted(UniPc()), r"can't be run towards noise\. Use euler, heun or ddim"),
        (lambda: inverted(Ddim(eta=1.0)), "can't be run towards noise"),
        (lambda: inverted(Euler(), X0()), r"X0\(\) is invalid: .* Use a model with another prediction"),
        (lambda: inverted(Euler(), ClippedPrediction(prediction=X0())), "does not determine the noise"),
    ],
)
def test_impossible_combinations_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def inverted(solver, prediction=Epsilon()):  # noqa: B008
    times = make_uniform_times(RectifiedFlow(), 2)[::-1]
    return invert(stateless(denoise), NOISE, times, process=RectifiedFlow(), solver=solver, prediction=prediction)


# Sampling a rectified flow equals diffusers', step by step


@pytest.mark.parity
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_euler_equals_flow_match_euler(shift, steps):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps))
    process = RectifiedFlow(shift=shift)
    times = make_uniform_times(process, steps)
    np.testing.assert_allclose(np.asarray(times), scheduler.sigmas.numpy(), atol=1e-6)

    def velocity(x, time):
        return np.sin(3 * x) + time * x

    ours = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    theirs = torch.from_numpy(ours.copy())
    state = Euler().init(jnp.asarray(ours), steps=steps)
    for index, timestep in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[index])
        prediction = torch.from_numpy(velocity(theirs.numpy(), sigma).astype(np.float32))
        theirs = scheduler.step(prediction, timestep, theirs).prev_sample
        estimate = make_estimator(
            stateless(lambda x, time: jnp.asarray(velocity(np.asarray(x), float(time)))), process, Velocity()
        )
        state = Euler().step(estimate, process, state, StepInterval(times[index], times[index + 1]))
        np.testing.assert_allclose(np.asarray(state.x), theirs.numpy(), rtol=1e-5, atol=1e-5)
