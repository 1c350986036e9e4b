"""Times at which samplers stop, and the corresponding inputs of the model."""

import numpy as np
import pytest

from dit_video.core.config_json import from_json, to_json
from dit_video.core.errors import UserError
from dit_video.diffusion import (
    BetaTimes,
    DiscreteSchedule,
    Edm,
    ExplicitTimes,
    ExponentialTimes,
    FlowMatchSchedule,
    KarrasTimes,
    LcmSchedule,
    LinearQuadraticTimes,
    RectifiedFlow,
    ShiftedTimes,
    UniformTimes,
    UniPcFlowSchedule,
    VariancePreservingProcess,
    override_shift,
)
from dit_video.diffusion.time_schedules import space_values

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


def test_linear_quadratic_times_have_one_slope_where_the_halves_meet():
    times = np.asarray(LinearQuadraticTimes(threshold=0.04)(FLOW, 9).times, np.float64)
    np.testing.assert_allclose(times[:5], 1 - np.asarray([0, 0.01, 0.02, 0.03, 0.04]), atol=1e-6)
    falls = -np.diff(times[4:])
    np.testing.assert_allclose(np.diff(falls), np.diff(falls)[0], atol=1e-6)
    np.testing.assert_allclose(falls[0] - np.diff(falls)[0] / 2, 0.01, atol=1e-6)
    assert times[-1] == 0
    np.testing.assert_array_equal(LinearQuadraticTimes()(FLOW, 1).times, [1, 0])
    with pytest.raises(UserError, match=r"threshold=1.0 is invalid: .* Use 0.025"):
        LinearQuadraticTimes(threshold=1.0)


def test_linear_quadratic_times_are_shifted():
    """The model gets the shifted times, too."""
    plain = np.asarray(LinearQuadraticTimes()(FLOW, 6).times, np.float64)
    schedule, process = override_shift(LinearQuadraticTimes(), FLOW, 3.0)
    times, model_times = schedule(process, 6)
    np.testing.assert_allclose(times, 3 * plain / (1 + 2 * plain), atol=1e-6)
    np.testing.assert_array_equal(times, model_times)


@pytest.mark.parametrize(
    "grid",
    [
        UniformTimes(terminal_time=0.1, spacing="beta"),
        ExplicitTimes(times=(1.0, 0.0)),
        ShiftedTimes(shift=2.0),
        LinearQuadraticTimes(threshold=0.1),
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
        LinearQuadraticTimes(),
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


@pytest.mark.parametrize("schedule", [UniformTimes, FlowMatchSchedule, UniPcFlowSchedule])
def test_times_are_stretched_to_a_terminal_time(schedule):
    """Distances to noise are scaled by one factor, so that the order and the start of the times are kept."""
    plain, stretched = (
        np.asarray(schedule(terminal_time=time)(RectifiedFlow(shift=3.0), 7).times) for time in (None, 0.1)
    )
    assert stretched[-2] == pytest.approx(0.1, abs=1e-6)
    assert stretched[-1] == plain[-1] == 0
    assert stretched[0] == plain[0]
    np.testing.assert_allclose((1 - stretched[1:-1]) / (1 - plain[1:-1]), 0.9 / (1 - plain[-2]), rtol=1e-5)


def test_the_only_step_is_not_stretched():
    np.testing.assert_array_equal(UniformTimes(terminal_time=0.1)(FLOW, 1).times, [1, 0])


def test_uniform_times_are_spaced_anew_between_their_ends():
    """The logarithms are uniform, and the last time before the data stays where the shift and the stretch put it."""
    times = UniformTimes(terminal_time=0.1, spacing="exponential")(RectifiedFlow(shift=3.0), 5).times
    np.testing.assert_allclose(times, [*10.0 ** np.linspace(0, -1, 5), 0], atol=1e-6)


@pytest.mark.parametrize("time", [0.0, 1.0, -0.1])
def test_an_invalid_terminal_time_is_refused(time):
    with pytest.raises(UserError, match=r"terminal_time=.* above 0 and below 1\. Use None"):
        UniformTimes(terminal_time=time)


def test_beta_times_are_dense_at_both_ends():
    """The ratios are symmetric about their middle, and the more concentrated at the ends the smaller the parameter."""
    times = np.asarray(BetaTimes(min_ratio=0.5)(EDM, 11).times, np.float64)[:-1]
    ratios = EDM.sigma(times)
    np.testing.assert_allclose(ratios[[0, -1]], [80, 0.5], rtol=1e-3)
    np.testing.assert_allclose(ratios + ratios[::-1], 80.5, rtol=1e-3)
    steps = -np.diff(ratios)
    assert steps[0] < steps[1] < steps[4]
    denser = EDM.sigma(np.asarray(BetaTimes(min_ratio=0.5, concentration=0.4)(EDM, 11).times, np.float64))[:-1]
    assert denser[0] - denser[1] < steps[0]
    with pytest.raises(UserError, match=r"concentration=0\.0 is invalid.* Use 0\.6"):
        BetaTimes(concentration=0.0)


@pytest.mark.parametrize("kind", [KarrasTimes, ExponentialTimes, BetaTimes])
def test_a_model_of_continuous_sigmas_receives_their_logarithm(kind):
    process = Edm(sigma_max=700.0, data_std=1.0)
    times, model_times = kind(min_ratio=0.002, max_ratio=700.0, log_ratio_scale=0.25)(process, 5)
    assert model_times[0] == pytest.approx(np.log(700) / 4)
    assert model_times[-2] == pytest.approx(np.log(0.002) / 4)
    np.testing.assert_allclose(
        model_times[:-1], np.log(process.sigma(np.asarray(times[:-1], np.float64))) / 4, atol=1e-5
    )


def test_steps_start_at_pure_noise_with_zero_terminal_snr():
    process = VariancePreservingProcess(zero_terminal_snr=True)
    assert DiscreteSchedule()(process, 10).times[0] == 1
    bounded = DiscreteSchedule(terminal_ratio=4096.0)(process, 10)
    time = np.asarray(bounded.times[:1], np.float64)
    assert 0.99 < time[0] < 1
    assert process.sigma(time) / process.alpha(time) == pytest.approx(4096, rel=1e-2)
    np.testing.assert_array_equal(bounded.times[1:], DiscreteSchedule()(process, 10).times[1:])
    with pytest.raises(UserError, match=r"ratio_spacing='karras' is invalid.* Use terminal_ratio=4096"):
        DiscreteSchedule(ratio_spacing="karras")(process, 10)
    with pytest.raises(UserError, match=r"terminal_ratio=0\.0 is invalid.* positive"):
        DiscreteSchedule(terminal_ratio=0.0)


# Spacings


SPACINGS = ("karras", "exponential", "beta")


@pytest.mark.parametrize("spacing", SPACINGS)
def test_values_fall_between_the_ends(spacing):
    result = space_values(spacing, 14.6, 0.03, 12)
    np.testing.assert_allclose(result[[0, -1]], [14.6, 0.03])
    assert (np.diff(result) < 0).all()
    np.testing.assert_allclose(space_values(spacing, 14.6, 0.03, 1), [14.6])


def test_the_root_the_logarithm_and_the_quantile_are_uniform():
    stats = pytest.importorskip("scipy.stats")
    transforms = (
        lambda x: x ** (1 / 7),
        np.log,
        lambda x: stats.beta.cdf((x - 0.03) / (14.6 - 0.03), 0.6, 0.6),
    )
    for spacing, transform in zip(SPACINGS, transforms, strict=True):
        steps = np.diff(transform(space_values(spacing, 14.6, 0.03, 12)))
        np.testing.assert_allclose(steps, steps.mean(), rtol=1e-6)
