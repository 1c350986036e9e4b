"""Guidance with momentum: its sum over earlier steps in the sampler's state, for every prediction and solver."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.diffusion import (
    X0,
    AdaptiveProjectedGuidance,
    Ddim,
    Epsilon,
    Euler,
    Guidance,
    Heun,
    RectifiedFlow,
    Remembering,
    TracedSampler,
    V,
    VariancePreservingProcess,
    Velocity,
    advance,
    apply_guidance,
    sample,
    sequential,
)

NOISE = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)
TIMES = jnp.linspace(1.0, 0.0, 6).at[0].set(0.98)
BETA = -0.6
STEP = 0.25
"""Difference of the branches' data, the same everywhere."""


def conditional(noisy, time):
    return jnp.tanh(noisy) + time


def unconditional(noisy, time):
    return jnp.cos(noisy) * time


def guide_with_momentum(guidance, *, branches=(conditional, unconditional), process=RectifiedFlow(), prediction=X0()):  # noqa: B008
    return apply_guidance(sequential(*branches), guidance.get_params(), process=process, prediction=prediction)


def make_guidance(scale=3.0, momentum=BETA, **options):
    return Guidance(
        scale=scale, projection=AdaptiveProjectedGuidance(parallel_weight=1.0, momentum=momentum), **options
    )


def test_momentum_accumulates_guidance_over_the_steps_of_sampling():
    process, x, average = RectifiedFlow(), np.asarray(NOISE), 0.0
    for time, following in itertools.pairwise(TIMES):
        c, u = (np.asarray(branch(x, time)) for branch in (conditional, unconditional))
        average = c - u + BETA * average
        data = c + 2.0 * average
        x = (1 - following) * data + following * (x - (1 - time) * data) / time
    run = {"process": process, "prediction": X0(), "solver": Remembering(solver=Euler())}
    result = sample(guide_with_momentum(make_guidance()), NOISE, TIMES, **run)
    np.testing.assert_allclose(result, x, rtol=1e-4, atol=1e-4)
    plain = apply_guidance(sequential(conditional, unconditional), Guidance(scale=3.0).get_params())
    without = sample(plain, NOISE, TIMES, process=process, prediction=X0(), solver=Euler())
    assert np.abs(result - without).max() > 0.1


@pytest.mark.parametrize("prediction", [Epsilon(), V(), Velocity()], ids=lambda kind: type(kind).__name__)
def test_momentum_accumulates_data_whatever_is_predicted(prediction):
    process = VariancePreservingProcess()

    def as_predicted(branch):
        def denoise(noisy, time):
            noise = (noisy - process.alpha(time) * branch(noisy, time)) / process.sigma(time)
            return prediction.target(process, branch(noisy, time), noise, time)

        return denoise

    def run(branches, kind):
        denoise = guide_with_momentum(make_guidance(), branches=branches, process=process, prediction=kind)
        solver = Remembering(solver=Ddim())
        return sample(denoise, NOISE, TIMES, process=process, prediction=kind, solver=solver)

    expected = run((conditional, unconditional), X0())
    result = run((as_predicted(conditional), as_predicted(unconditional)), prediction)
    np.testing.assert_allclose(result, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("solver", [Euler(), Heun()], ids=["euler", "heun"])
@pytest.mark.parametrize(("interval", "counted"), [(None, 5), ((0.3, 0.85), 3)])
def test_a_step_is_accumulated_once_and_only_where_there_is_guidance(solver, interval, counted):
    """The number of evaluations does not matter. Steps start at 0.98, 0.8, 0.6, 0.4 and 0.2."""
    branches = (lambda noisy, time: 0 * noisy + STEP, lambda noisy, time: 0 * noisy)
    denoise = guide_with_momentum(make_guidance(interval=interval), branches=branches)
    watched = TracedSampler(solver=Remembering(solver=solver))
    state = watched.init(NOISE, steps=5)
    for part in (TIMES[:3], TIMES[2:]):  # the past goes from one part of the way to the next
        state = advance(denoise, state, part, process=RectifiedFlow(), prediction=X0(), solver=watched)
    np.testing.assert_allclose(state.solver.past, STEP * (1 - BETA**counted) / (1 - BETA), rtol=1e-4)


def test_unsupported_uses_of_momentum_are_refused():
    with pytest.raises(UserError, match=r"sample it with Remembering\(solver=...\)"):
        sample(
            guide_with_momentum(make_guidance()), NOISE, TIMES, process=RectifiedFlow(), prediction=X0(), solver=Euler()
        )
    with pytest.raises(UserError, match=r"momentum=1\.0 is invalid: .* between -1 and 1"):
        AdaptiveProjectedGuidance(momentum=1.0)
    with pytest.raises(UserError, match="Use image_scale=1 or momentum=0"):
        make_guidance(image_scale=2.0)
    assert not make_guidance(scale=1.0).has_momentum
    assert not make_guidance(momentum=0.0).has_momentum
