"""Convergence of solvers on a mixture with a known score: ODE solvers at their order, stochastic ones to the data."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.diffusion import (
    Ddim,
    Ddpm,
    DpmMultistep,
    DpmSinglestep,
    Edm,
    Epsilon,
    Euler,
    Heun,
    KarrasTimes,
    Preconditioning,
    RectifiedFlow,
    StepInterval,
    UniformTimes,
    UniPc,
    V,
    VariancePreservingProcess,
    Velocity,
    invert,
    make_estimator,
    make_noise_fn,
    sample,
)
from support import gaussian_mixture as mixture
from support.marks import mark_slow_except

SETTINGS = {
    "flow": (RectifiedFlow(), Velocity(), (0.9, 0.1)),
    "vp": (VariancePreservingProcess(), V(), (0.8, 0.1)),
    "edm": (Edm(data_std=1.0), Preconditioning(data_std=1.0), (0.6, 0.25)),
}
ORDERS = {
    "euler": (Euler(), 1),
    "ddim": (Ddim(), 1),
    "heun": (Heun(), 2),
    "dpm++2m": (DpmMultistep(), 2),
    "dpm++2m-heun": (DpmMultistep(kind="heun"), 2),
    "dpm++2s": (DpmSinglestep(lower_order_final=False), 2),
    "dpm++2s-heun": (DpmSinglestep(lower_order_final=False, kind="heun"), 2),
    "unipc": (UniPc(lower_order_final=False), 3),
}
QUICK = (("euler", "flow"), ("unipc", "flow"), ("dpm++2m", "vp"), ("heun", "edm"))
"""Solvers and settings of the default suite."""


@functools.cache
def stepper(solver, setting):
    process, prediction, _ = SETTINGS[setting]
    estimate = make_estimator(mixture.make_denoise_fn(process, prediction), process, prediction)
    return jax.jit(lambda state, interval: solver.step(estimate, process, state, interval))


@functools.cache
def end(solver, setting, steps):
    """Solve the flow from 16 noisy values, in float64."""
    process, _, (first, last) = SETTINGS[setting]
    with jax.enable_x64(True):
        noise = jnp.asarray(np.random.default_rng(1).normal(size=(16, 2)))
        x = process.add_noise(jnp.asarray(mixture.sample(0, 16)), noise, jnp.asarray(first))
        state, times = solver.init(x, steps=steps), jnp.linspace(first, last, steps + 1)
        for time, following in itertools.pairwise(times):
            state = stepper(solver, setting)(state, StepInterval(time, following))
        return np.asarray(state.x)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        pytest.param(name, setting, marks=() if (name, setting) in QUICK else pytest.mark.slow)
        for name in ORDERS
        for setting in SETTINGS
        if setting == "flow" or "-heun" not in name
    ],
)
def test_solvers_converge_at_their_order(name, setting):
    solver, order = ORDERS[name]
    exact = end(UniPc(order=3, lower_order_final=False), setting, 640)
    errors = [np.abs(end(solver, setting, steps) - exact).mean() for steps in (60, 120)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)
    assert errors[1] < 0.05


COUNT = 1500
NOISE = jnp.asarray(np.random.default_rng(3).normal(size=(COUNT, 2)), jnp.float32)
KEYS = jax.random.split(jax.random.key(5), COUNT)
STOCHASTIC = {
    "ddim-half": (Ddim(eta=0.5), "vp"),
    "euler-ancestral": (Ddim(eta=1.0), "flow"),
    "euler-ancestral-edm": (Ddim(eta=1.0), "edm"),
    "ddpm": (Ddpm(), "vp"),
    "ddpm-flow": (Ddpm(), "flow"),
    "dpm++sde": (DpmMultistep(eta=1.0), "vp"),
    "dpm++sde-flow": (DpmMultistep(eta=1.0), "flow"),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", mark_slow_except(("ddpm", "euler-ancestral-edm", "dpm++sde-flow"), STOCHASTIC))
def test_stochastic_solvers_sample_the_mixture(name):
    solver, setting = STOCHASTIC[name]
    process, prediction, _ = SETTINGS[setting]
    denoise, grid = mixture.make_denoise_fn(process, prediction), KarrasTimes() if setting == "edm" else UniformTimes()
    run = jax.jit(
        lambda times: sample(
            denoise,
            NOISE,
            times,
            process=process,
            solver=solver,
            prediction=prediction,
            noise_fn=make_noise_fn(KEYS, (2,)),
        )
    )
    exact = mixture.sample(7, COUNT)
    few, many = (np.asarray(run(grid(process, steps).times)) for steps in (6, 60))
    distance = mixture.energy_distance(many, exact)
    assert distance < 0.01
    assert distance < mixture.energy_distance(few, exact) / 2
    np.testing.assert_allclose(many.mean(axis=0), mixture.MEAN, atol=0.1)
    np.testing.assert_allclose(np.cov(many.T), mixture.COVARIANCE, atol=0.1)


@pytest.mark.nightly
@pytest.mark.parametrize(("setting", "solver", "order"), [("flow", Euler(), 1), ("flow", Heun(), 2), ("vp", Ddim(), 1)])
def test_inversion_recovers_the_data_better_with_more_steps(setting, solver, order):
    process, _, _ = SETTINGS[setting]
    prediction = Velocity() if setting == "flow" else Epsilon()
    run = jax.jit(
        lambda data, times: invert(
            mixture.make_denoise_fn(process, prediction),
            data,
            times,
            process=process,
            solver=solver,
            prediction=prediction,
        )
    )
    data = jnp.asarray(mixture.sample(0, 64), jnp.float32)
    errors = []
    for steps in (20, 40, 80):
        result = run(data, UniformTimes()(process, steps).times[::-1])
        np.testing.assert_allclose(result.error, np.sqrt(np.square(result.data - data).mean(axis=1)), rtol=1e-4)
        errors.append(float(result.error.mean()))
    assert np.log2(errors[0] / errors[2]) / 2 == pytest.approx(order, abs=0.4)
    # What is found is noise: standard normal over the mixture, and not the data themselves.
    np.testing.assert_allclose(result.noise.mean(axis=0), 0, atol=0.35)
    np.testing.assert_allclose(result.noise.std(axis=0), 1, atol=0.25)
