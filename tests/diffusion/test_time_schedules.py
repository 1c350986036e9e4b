"""Times at which samplers stop, and the corresponding inputs of the model."""

import numpy as np
import pytest

from dit_video.core.config_json import from_json, to_json
from dit_video.core.errors import UserError
from dit_video.diffusion import (
    DiscreteSchedule,
    Edm,
    ExplicitTimes,
    ExponentialTimes,
    KarrasTimes,
    LcmSchedule,
    RectifiedFlow,
    ShiftedTimes,
    UniformTimes,
    VariancePreservingProcess,
)

DDPM, FLOW, EDM = VariancePreservingProcess(), RectifiedFlow(), Edm()


def get_steps(grid, steps, process=DDPM):
    """Return the model's inputs as steps counted from 0; the times are one more."""
    result = grid(process, steps)
    model_times = np.asarray(result.model_times[:-1]) * 1000
    np.testing.assert_allclose(np.asarray(result.times[:-1]) * 1000, model_times + 1, atol=1e-2)
    assert result.times.shape == result.model_times.shape == (steps + 1,)
    return model_times


def test_a_ddpm_model_gets_the_previous_step_index():
    np.testing.assert_allclose(get_steps(DiscreteSchedule(), 4), [999, 749, 499, 249], atol=1e-3)
    np.testing.assert_allclose(get_steps(DiscreteSchedule(spacing="leading"), 4), [750, 500, 250, 0], atol=1e-3)
    np.testing.assert_allclose(
        get_steps(DiscreteSchedule(spacing="leading", steps_offset=1), 4), [751, 501, 251, 1], atol=1e-3
    )
    np.testing.assert_allclose(get_steps(DiscreteSchedule(spacing="linspace"), 4), [999, 666, 333, 0], atol=1e-3)
    spare = DiscreteSchedule(spacing="linspace", has_extra_step=True, step_rounding="nearest")
    np.testing.assert_allclose(get_steps(spare, 4), [999, 749, 500, 250], atol=1e-3)
    np.testing.assert_allclose(get_steps(LcmSchedule(), 4), [999, 759, 499, 259], atol=1e-3)


@pytest.mark.parametrize(("last", "end"), [("data", 0.0), ("first step", 0.001)])
def test_the_last_time_follows_from_the_end_setting(last, end):
    assert DiscreteSchedule(end=last)(DDPM, 5).times[-1] == pytest.approx(end)


@pytest.mark.parametrize("process", [EDM, DDPM], ids=["edm", "vp"])
def test_karras_and_exponential_space_the_ratio_of_noise_to_data(process):
    def ratios(grid):
        times = np.asarray(grid(process, 9).times, np.float64)[:-1]
        return process.sigma(times) / process.alpha(times)

    most = float((process.sigma(np.ones(1)) / process.alpha(np.ones(1)))[0])
    karras, exponential = ratios(KarrasTimes(min_ratio=0.02)), ratios(ExponentialTimes(min_ratio=0.02))
    for result in (karras, exponential):
        np.testing.assert_allclose(result[[0, -1]], [most, 0.02], rtol=1e-3)
    np.testing.assert_allclose(np.diff(karras ** (1 / 7)), np.diff(karras ** (1 / 7)).mean(), rtol=1e-2)
    np.testing.assert_allclose(exponential[1:] / exponential[:-1], (0.02 / most) ** (1 / 8), rtol=1e-2)


def test_schedules_of_a_flow_start_at_the_configured_noise():
    result = KarrasTimes(min_ratio=0.01, max_ratio=99.0)(FLOW, 5).times
    np.testing.assert_allclose(result[np.asarray([0, -2, -1])], [0.99, 0.01 / 1.01, 0], atol=1e-5)


def test_shifted_and_explicit_times_are_returned():
    np.testing.assert_allclose(ShiftedTimes(shift=3.0)(RectifiedFlow(shift=8.0), 2).times, [1, 0.75, 0], atol=1e-6)
    result = ExplicitTimes(times=(1.0, 0.4, 0.1))(FLOW, 2)
    np.testing.assert_allclose(result.times, [1, 0.4, 0.1], atol=1e-6)
    np.testing.assert_array_equal(result.model_times, result.times)


@pytest.mark.parametrize(
    "grid",
    [
        ExplicitTimes(times=(1.0, 0.0)),
        ShiftedTimes(shift=2.0),
        KarrasTimes(max_ratio=9.0),
        DiscreteSchedule(spacing="leading", steps_offset=1),
        LcmSchedule(),
    ],
)
def test_a_schedule_is_the_same_after_json(grid):
    assert from_json(to_json(grid)) == grid


@pytest.mark.parametrize(
    "grid",
    [
        UniformTimes(),
        ShiftedTimes(shift=2.0),
        ExplicitTimes(times=(1.0, 0.0)),
        KarrasTimes(),
        ExponentialTimes(),
        DiscreteSchedule(),
        LcmSchedule(),
    ],
)
def test_less_than_one_step_is_refused(grid):
    with pytest.raises(UserError, match=r"steps=0 is invalid: .* Use steps=1"):
        grid(DDPM, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiscreteSchedule()(FLOW, 4), "RectifiedFlow has none. Use UniformTimes, ShiftedTimes, KarrasTimes or"),
        (lambda: LcmSchedule()(EDM, 4), "Edm has none"),
        (lambda: LcmSchedule()(DDPM, 51), "steps=51, distillation_steps=50 .* 1000 noise .* Use steps=50"),
        (lambda: DiscreteSchedule()(DDPM, 1001), "steps=1001 is invalid.* Use steps=1000"),
        (
            lambda: DiscreteSchedule(spacing="leading", steps_offset=1)(DDPM, 1000),
            "steps_offset=1 .* beyond the last of 1000",
        ),
        (lambda: DiscreteSchedule(steps_offset=-1), "steps_offset=-1 is invalid"),
        (lambda: KarrasTimes()(FLOW, 4), "is infinite. Use a finite max_ratio"),
        (lambda: KarrasTimes(max_ratio=1.0)(FLOW, 4), "sampling starts from noise"),
        (lambda: KarrasTimes(max_ratio=81.0)(EDM, 4), "max_ratio=81 .* ratio to the data in Edm is 80"),
        (lambda: KarrasTimes(max_ratio=40.0)(EDM, 4), "max_ratio=40 .* ratio to the data in Edm is 80"),
        (lambda: ExponentialTimes(min_ratio=0.0), "min_ratio=0.0.* must be positive"),
        (lambda: ShiftedTimes(shift=0.0), "shift=0.0 is invalid"),
        (lambda: ExplicitTimes(times=(0.5, 0.5)), r"times=\(0.5, 0.5\) is invalid"),
        (lambda: ExplicitTimes(times=(1.2, 0.5)), r"times=\(1.2, 0.5\) is invalid"),
        (lambda: ExplicitTimes(times=(1.0, 0.5))(FLOW, 2), "steps=2 is invalid: .* Use steps=1"),
    ],
)
def test_invalid_schedules_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
