"""Guidance, shift and times that replace those of a pipeline's own sampling."""

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.diffusion import (
    AdaptiveProjectedGuidance,
    DiscreteSchedule,
    DpmFlowSchedule,
    ExplicitTimes,
    FlowMatchSchedule,
    Guidance,
    KarrasTimes,
    RectifiedFlow,
    ShiftedTimes,
    SkipLayerGuidance,
    UniformTimes,
    UniPc,
    UniPcFlowSchedule,
    VariancePreservingProcess,
    ZeroStarGuidance,
)
from dit_video.sampling import Sampling
from dit_video.sampling.sampling_config import override_sampling

FLOW = RectifiedFlow(shift=3.0)


def compute_times(own, process=FLOW, **overrides):
    return override_sampling(own, process, **overrides).make_times(process)


def test_options_of_guidance_are_set_and_removed_one_by_one():
    own = Sampling(guidance=Guidance(scale=3.0, rescale=0.5, zero_star=ZeroStarGuidance(zero_steps=2)))
    assert own.override_guidance() == own.guidance
    changed = own.override_guidance(scale=2.0, skip_layers=(1, 2), zero_star=False, projected=True)
    assert changed == Guidance(
        scale=2.0,
        rescale=0.5,
        projection=AdaptiveProjectedGuidance(),
        skip_layers=SkipLayerGuidance(layers=(1, 2)),
    )
    assert own.override_guidance(zero_star=True).zero_star == ZeroStarGuidance()
    within = own.override_guidance(interval=(0.1, 1.0), rescale=0.7)
    assert (within.interval, within.rescale, within.scale) == ((0.1, 1.0), 0.7, 3.0)


@pytest.mark.parametrize(
    "schedule", [UniformTimes(), ShiftedTimes(shift=2.0), UniPcFlowSchedule(), FlowMatchSchedule()]
)
def test_a_shift_replaces_that_of_training_and_of_the_schedule(schedule):
    result = compute_times(Sampling(steps=4, time_schedule=schedule), shift=5)
    own = ShiftedTimes(shift=5.0) if isinstance(schedule, ShiftedTimes) else schedule
    for actual, expected in zip(result, own(RectifiedFlow(shift=5.0), 4), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert np.abs(result.times - schedule(FLOW, 4).times).max() > 0.05


def test_times_are_taken_as_they_are_and_set_the_number_of_steps():
    sampling = override_sampling(Sampling(steps=50, shift=7.0), FLOW, times=(1, 0.757, 0.522))
    assert (sampling.steps, sampling.shift) == (3, None)
    times = sampling.make_times(FLOW)
    np.testing.assert_allclose(times.times, [1, 0.757, 0.522, 0], atol=1e-6)
    np.testing.assert_array_equal(times.model_times, times.times)


def test_times_are_shifted_by_an_explicit_shift_alone():
    """LightX2V's lists are shifted so: its [1000, 750, 500, 250] with shift 5 are these times."""
    times = compute_times(Sampling(), times=(1, 0.75, 0.5, 0.25), shift=5).times
    np.testing.assert_allclose(times, [1, 0.9375, 0.8333333, 0.625, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"shift": 0}, r"shift=0.* is invalid: it must be positive"),
        ({"shift": -1.0, "times": (1.0,)}, r"shift=-1.0 is invalid"),
        ({"times": ()}, r"times=\(\) is invalid: .* Use times such as 1 0.75"),
        ({"times": (0.5, 0.5)}, r"times=\(0.5, 0.5\) is invalid: steps start at times that fall"),
        ({"times": (0.5, 0.8)}, r"times=\(0.5, 0.8\) is invalid"),
        ({"times": (1.0, 0.0)}, r"times=\(1.0, 0.0\) is invalid: .* in \(0, 1\]"),
        ({"times": (1000, 750)}, r"times=\(1000, 750\) is invalid: .* divided by 1000"),
        ({"times": (1.0, 0.5), "steps": 3}, r"steps=3 is invalid: times are of 2 steps"),
    ],
)
def test_an_invalid_shift_and_times_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        override_sampling(Sampling(), FLOW, **overrides)


@pytest.mark.parametrize(
    ("schedule", "process"),
    [
        (ExplicitTimes(times=(1.0, 0.5, 0.0)), FLOW),
        (KarrasTimes(max_ratio=9.0), FLOW),
        (DiscreteSchedule(), VariancePreservingProcess()),
    ],
)
def test_a_shift_that_would_change_nothing_is_refused(schedule, process):
    with pytest.raises(UserError, match=r"shift=5 is invalid: .* does not move .* Use times=, or no shift"):
        override_sampling(Sampling(steps=2, time_schedule=schedule), process, shift=5)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "settings", "schedule"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 5.0}, FlowMatchSchedule()),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 5.0}, UniPcFlowSchedule()),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 5.0}, DpmFlowSchedule()),
    ],
)
def test_four_steps_with_a_shift_have_the_times_of_diffusers(kind, settings, schedule):
    diffusers = pytest.importorskip("diffusers")
    if kind != "FlowMatchEulerDiscreteScheduler":
        settings = settings | {"prediction_type": "flow_prediction"}
    scheduler = getattr(diffusers, kind)(**settings)
    scheduler.set_timesteps(4)
    times = compute_times(Sampling(steps=50, solver=UniPc(), time_schedule=schedule), steps=4, shift=5)
    np.testing.assert_allclose(times.times, scheduler.sigmas, atol=2e-6)
    np.testing.assert_allclose(1000 * np.asarray(times.model_times)[:-1], scheduler.timesteps, atol=1e-3)
