"""Changes of a sampling: its guidance, steps, shift and times."""

import dataclasses

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.diffusion import (
    DiscreteSchedule,
    DpmFlowSchedule,
    ExplicitTimes,
    FlowMatchSchedule,
    Guidance,
    KarrasTimes,
    RectifiedFlow,
    ShiftedTimes,
    UniformTimes,
    UniPc,
    UniPcFlowSchedule,
    VariancePreservingProcess,
)
from dit_video.sampling import Sampling
from dit_video.sampling.sampling_config import make_guidance

FLOW = RectifiedFlow(shift=3.0)


def compute_times(own, process=FLOW, **overrides):
    return own.change(process, **overrides).make_times(process)


def test_a_number_is_the_scale_of_guidance_and_leaves_its_other_options():
    three = Guidance(scales={"text": 3.0})
    assert Sampling(guidance=3).guidance == Sampling(guidance=three).guidance == three
    own = Sampling(guidance=Guidance(scales={"text": 3.0}, rescale=0.5))
    assert own.change(FLOW, guidance=2).guidance == Guidance(scales={"text": 2.0}, rescale=0.5)
    assert own.change(FLOW, guidance=(4, 3.0)).guidance == Guidance(scales={"text": (4.0, 3.0)}, rescale=0.5)
    assert own.change(FLOW, guidance=Guidance(scales={"text": 2.0})).guidance == Guidance(scales={"text": 2.0})
    assert own.change(FLOW) == own


def test_a_mapping_has_the_scales_of_all_conditions_and_a_number_that_of_the_prompt():
    both = {"text": 5.0, "motion": 3.0}
    own = Sampling(guidance=Guidance(scales={"image": 2.0}, rescale=0.5)).change(FLOW, guidance=both)
    assert own.guidance == Guidance(scales=both, rescale=0.5)
    assert own.change(FLOW, guidance=4).guidance == Guidance(scales=both | {"text": 4.0}, rescale=0.5)
    assert own.guidance != dataclasses.replace(own.guidance, scales={"motion": 3.0, "text": 5.0})  # another order


@pytest.mark.wrong_types
@pytest.mark.parametrize("value", ["3", True, (1.0, 2.0, 3.0), (), ("4", "3"), None, {"text": "3"}])
def test_guidance_that_is_no_number_is_refused(value):
    with pytest.raises(UserError, match=r"guidance scales=.* are invalid: each must be a finite number .* or a pair"):
        make_guidance(value)


def test_scales_without_names_are_refused():
    with pytest.raises(UserError, match=r'guidance scales=5\.0 are invalid: they need the names .* Use {"text": 5}'):
        Guidance(scales=5.0)


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
    sampling = Sampling(steps=50, shift=7.0).change(FLOW, times=(1, 0.757, 0.522))
    assert (sampling.steps, sampling.shift) == (3, None)
    times = sampling.make_times(FLOW)
    np.testing.assert_allclose(times.times, [1, 0.757, 0.522, 0], atol=1e-6)
    np.testing.assert_array_equal(times.model_times, times.times)
    assert Sampling().change(FLOW, times=np.array([1, 0.5])) == Sampling().change(FLOW, times=[1, 0.5])


def test_times_are_shifted_by_an_explicit_shift_alone():
    """LightX2V's lists are shifted so: its [1000, 750, 500, 250] with shift 5 are these times."""
    times = compute_times(Sampling(), times=(1, 0.75, 0.5, 0.25), shift=5).times
    np.testing.assert_allclose(times, [1, 0.9375, 0.8333333, 0.625, 0], atol=1e-6)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"shift": 0}, r"shift=0.* is invalid: it must be positive"),
        ({"shift": -1.0, "times": (1.0,)}, r"shift=-1.0 is invalid"),
        ({"times": ()}, r"times=\(\) is invalid: .* Use times such as 1 0.75"),
        ({"times": (0.5, 0.5)}, r"times=\(0.5, 0.5\) is invalid: steps start at times that fall"),
        ({"times": (0.5, 0.8)}, r"times=\(0.5, 0.8\) is invalid"),
        ({"times": (1.0, 0.0)}, r"times=\(1.0, 0.0\) is invalid: .* in \(0, 1\]"),
        ({"times": 0.5}, r"times=0\.5 is invalid: it must be a list of numbers\. Use \[1, 0\.75, 0\.5\]"),
        ({"times": ["1"]}, r"times=\['1'\] is invalid: it must be a list of numbers"),
        ({"shift": "3"}, r"shift='3' is invalid: it must be a number\. Use shift=1"),
        ({"times": (1000, 750)}, r"times=\(1000, 750\) is invalid: .* divided by 1000"),
        ({"times": (1.0, 0.5), "steps": 3}, r"steps=3 is invalid: times are of 2 steps"),
        ({"steps": 2.5}, r"steps=2.5 is invalid: it must be a whole number"),
        ({"steps": True}, r"steps=True is invalid: it must be a whole number"),
        ({"steps": "4"}, r"steps='4' is invalid: it must be a whole number"),
        ({"solver": "plms"}, r"unknown solver 'plms'; use one of ddim"),
        ({"solver": 3}, r"solver=3 is invalid: .* Use 'euler'"),
    ],
)
def test_invalid_changes_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        Sampling().change(FLOW, **overrides)


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
        Sampling(steps=2, time_schedule=schedule).change(process, shift=5)


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
