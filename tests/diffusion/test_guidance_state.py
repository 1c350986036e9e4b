"""The state of guidance: momentum over the steps of sampling, and the states of the branches."""

import itertools
from dataclasses import replace

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
    GuidanceState,
    Heun,
    RectifiedFlow,
    V,
    VariancePreservingProcess,
    Velocity,
    advance,
    alone,
    apply_guidance,
    batched,
    init_sampling,
    sample,
    sequential,
    stateless,
)
from support.predictions import convert_prediction

NOISE = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)
TIMES = jnp.linspace(1.0, 0.0, 6).at[0].set(0.98)
STEP_TIMES = np.asarray(TIMES)
BETA = -0.6
START = GuidanceState(method=jnp.zeros_like(NOISE))
STEP = 0.25
"""Difference of the branches' data, the same everywhere."""


def conditional(noisy, time):
    return jnp.tanh(noisy) + time


def unconditional(noisy, time):
    return jnp.cos(noisy) * time


def guide_with_momentum(guidance, *, branches=(conditional, unconditional), process=RectifiedFlow(), prediction=X0()):  # noqa: B008
    params = guidance.get_params(STEP_TIMES)
    return apply_guidance(sequential(*map(stateless, branches)), params, process=process, prediction=prediction)


def make_guidance(scale=3.0, momentum=BETA, **options):
    return Guidance(
        scales={"text": scale}, method=AdaptiveProjectedGuidance(parallel_weight=1.0, momentum=momentum), **options
    )


def test_momentum_accumulates_guidance_over_the_steps_of_sampling():
    process, x, average = RectifiedFlow(), np.asarray(NOISE), 0.0
    for time, following in itertools.pairwise(TIMES):
        c, u = (np.asarray(branch(x, time)) for branch in (conditional, unconditional))
        average = c - u + BETA * average
        data = c + 2.0 * average
        x = (1 - following) * data + following * (x - (1 - time) * data) / time
    run = {"process": process, "prediction": X0(), "solver": Euler()}
    result = sample(guide_with_momentum(make_guidance()), NOISE, TIMES, state=START, **run)
    np.testing.assert_allclose(result, x, rtol=1e-4, atol=1e-4)
    plain = apply_guidance(
        sequential(stateless(conditional), stateless(unconditional)),
        Guidance(scales={"text": 3.0}).get_params(STEP_TIMES),
    )
    without = sample(plain, NOISE, TIMES, process=process, prediction=X0(), solver=Euler())
    assert np.abs(result - without).max() > 0.1


@pytest.mark.nightly
@pytest.mark.parametrize("prediction", [Epsilon(), V(), Velocity()], ids=lambda kind: type(kind).__name__)
def test_momentum_accumulates_data_whatever_is_predicted(prediction):
    process = VariancePreservingProcess()

    def run(branches, kind):
        denoise = guide_with_momentum(make_guidance(), branches=branches, process=process, prediction=kind)
        return sample(denoise, NOISE, TIMES, process=process, prediction=kind, solver=Ddim(), state=START)

    expected = run((conditional, unconditional), X0())
    result = run(
        [convert_prediction(branch, process, prediction) for branch in (conditional, unconditional)], prediction
    )
    np.testing.assert_allclose(result, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("solver", [Euler(), Heun()], ids=["euler", "heun"])
@pytest.mark.parametrize(("interval", "counted"), [(None, 5), ((0.3, 0.85), 3)])
def test_a_step_is_accumulated_once_and_only_where_there_is_guidance(solver, interval, counted):
    """The number of evaluations does not matter. Steps start at 0.98, 0.8, 0.6, 0.4 and 0.2."""
    branches = (lambda noisy, time: 0 * noisy + STEP, lambda noisy, time: 0 * noisy)
    denoise = guide_with_momentum(make_guidance(interval=interval), branches=branches)
    state = init_sampling(solver, NOISE, steps=5, denoiser=START)
    for part in (TIMES[:3], TIMES[2:]):  # the momentum goes from one part of the way to the next
        state = advance(denoise, state, part, process=RectifiedFlow(), prediction=X0(), solver=solver)
    np.testing.assert_allclose(state.denoiser.method, STEP * (1 - BETA**counted) / (1 - BETA), rtol=1e-4)


def test_unsupported_uses_of_momentum_are_refused():
    with pytest.raises(UserError, match=r"state=guidance.init_state\(noise\)"):
        sample(
            guide_with_momentum(make_guidance()), NOISE, TIMES, process=RectifiedFlow(), prediction=X0(), solver=Euler()
        )
    with pytest.raises(UserError, match=r"momentum=1\.0 is invalid: .* between -1 and 1"):
        AdaptiveProjectedGuidance(momentum=1.0)
    with pytest.raises(UserError, match=r"momentum=-0\.6 is invalid with .* Use momentum=0, or one scale"):
        replace(make_guidance(), scales={"text": 3.0, "image": 2.0})


def test_guidance_without_momentum_or_without_a_difference_has_no_state():
    for guidance, has_state in (
        (make_guidance(), True),
        (make_guidance(1.0), False),
        (make_guidance(momentum=0.0), False),
    ):
        assert guidance.has_state == has_state == (guidance.init_state(NOISE) is not None)
    np.testing.assert_array_equal(make_guidance().init_state(NOISE).method, 0 * NOISE)


def count_calls(noisy, time, state):
    """Predict from the number of calls before this one, which is the state."""
    return jnp.tanh(noisy) + time + state, state + 1


def test_every_branch_has_a_state_of_its_own():
    """Outside of the interval the first branch alone goes on, if it is evaluated alone; otherwise all of them do."""
    params = Guidance(scales={"text": 3.0}, interval=(0.3, 0.85)).get_params(STEP_TIMES)
    branches = sequential(count_calls, lambda noisy, time, state: (jnp.cos(noisy) * time, state + 10))
    zero = jnp.zeros(())
    for conditional, expected in ((None, (5, 50)), (alone(count_calls, is_batched=False), (5, 30))):
        denoise = apply_guidance(branches, params, conditional=conditional)
        start = GuidanceState(branches=(zero, zero))
        state = init_sampling(Heun(), NOISE, steps=5, denoiser=start)
        end = advance(denoise, state, TIMES, process=RectifiedFlow(), solver=Heun()).denoiser
        assert tuple(map(int, end.branches)) == expected


def count_rows(noisy, time, state):
    """Predict from the number of calls before this one, which each row counts."""
    return jnp.tanh(noisy) + time + state[:, None], state + 1


def test_batched_branches_have_the_states_of_branches_apart():
    """A batch of branches has the state of each in its rows, also where the first branch is evaluated alone."""
    params = Guidance(scales={"text": 3.0}, interval=(0.3, 0.85)).get_params(STEP_TIMES)
    kinds = (
        (sequential(count_rows, count_rows), False, (jnp.zeros(2), jnp.zeros(2))),
        (batched(count_rows, 2), True, jnp.zeros(4)),
    )
    ends = []
    for branches, is_batched, start in kinds:
        denoise = apply_guidance(branches, params, conditional=alone(count_rows, is_batched=is_batched))
        state = init_sampling(Heun(), NOISE, steps=5, denoiser=GuidanceState(branches=start))
        ends.append(advance(denoise, state, TIMES, process=RectifiedFlow(), solver=Heun()))
    np.testing.assert_allclose(ends[0].x, ends[1].x, rtol=1e-6)
    np.testing.assert_array_equal(ends[1].denoiser.branches, [5, 5, 3, 3])


def test_batched_branches_share_a_state():
    together = apply_guidance(batched(count_calls, 2), Guidance(scales={"text": 3.0}).get_params(STEP_TIMES))
    apart = apply_guidance(sequential(count_calls, count_calls), Guidance(scales={"text": 3.0}).get_params(STEP_TIMES))
    zero = jnp.zeros(())
    result, state = together(NOISE, TIMES[1], GuidanceState(branches=zero))
    expected, _ = apart(NOISE, TIMES[1], GuidanceState(branches=(zero, zero)))
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    assert int(state.branches) == 1
