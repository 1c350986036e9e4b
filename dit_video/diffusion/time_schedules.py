"""Time schedules of samplers: the diffusion times at which a solver steps from noise to data."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Array, Float, Float64

from dit_video.core.errors import UserError, check_at_least
from dit_video.diffusion.processes import Process, RectifiedFlow, VariancePreservingProcess
from dit_video.diffusion.time_distributions import (
    SampleTimes,
    append_final_time,
    check_terminal_time,
    put_on_device,
    stretch_to_terminal_time,
)

Spacing = Literal["karras", "exponential", "beta"]


def space_values(
    spacing: Spacing, first: float, last: float, count: int, *, exponent: float = 7.0, concentration: float = 0.6
) -> Float64[np.ndarray, " {count}"]:
    r"""Return `count` values from `first` to `last`.

    Args:
      spacing: Uniform in the root of order `exponent` (`karras`, arXiv 2206.00364, eq. 5), in the logarithm
        (`exponential`), or at quantiles of the symmetric beta distribution (`beta`, arXiv 2407.12173), which are dense
        at both ends.
      first: First value.
      last: Last value.
      count: Number of values.
      exponent: Order of the root, for `karras`.
      concentration: Both parameters of the distribution, for `beta`.
    """
    if spacing == "karras":
        return np.linspace(first ** (1 / exponent), last ** (1 / exponent), count) ** exponent
    if spacing == "exponential":
        return np.exp(np.linspace(np.log(first), np.log(last), count))
    from scipy.stats import beta  # slow to import, and rarely needed

    quantiles: np.ndarray = beta.ppf(1 - np.linspace(0.0, 1.0, count), concentration, concentration)
    return last + quantiles * (first - last)


@dataclass(frozen=True, kw_only=True)
class DiscreteSchedule:
    """A subset of the noise steps that a model was trained on, spaced as in table 2 of arXiv 2305.08891.

    The defaults are those of `DDIMScheduler` and similar ones with trailing steps. Between steps, sigma / alpha is
    interpolated linearly, as in diffusers.

    Raises:
      UserError: If `steps_offset` is negative, or `terminal_ratio` is not positive.
    """

    spacing: Literal["leading", "trailing", "linspace"] = "trailing"
    """Spacing of the steps: `timestep_spacing` of diffusers."""
    steps_offset: int = 0
    """Number of steps by which leading steps are moved towards noise."""
    has_extra_step: bool = False
    """Adds a step to the spacing and then drops the last one, as for solvers of higher order."""
    ratio_spacing: Literal["spaced"] | Spacing = "spaced"
    """Ratios of noise to data: `spaced` keeps the steps' own ratios. Other values space ratios like `KarrasTimes`,
    `ExponentialTimes` or `BetaTimes`, from the first to the last step (of all trained steps with `has_extra_step`)."""
    terminal_ratio: float | None = None
    """Ratio of noise to data at the last trained step, from which sampling starts; None for the process's own. With
    `zero_terminal_snr` that ratio is infinite, and diffusers takes 4096 if a solver needs a finite one."""
    step_rounding: Literal["between", "nearest", "below"] = "between"
    """The step that the model receives for a time between two steps."""
    end: Literal["data", "first step"] = "data"
    """End of the schedule: the data, or the state after the first noise step."""

    def __post_init__(self):
        check_at_least(0, steps_offset=self.steps_offset)
        if self.terminal_ratio is not None and not self.terminal_ratio > 0:
            raise UserError(f"terminal_ratio={self.terminal_ratio} is invalid: it must be positive. Use 4096.")

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """Return the times of `steps` steps, computed in float64.

        Raises:
          UserError: If `steps` is below 1 or exceeds the model's training steps, the process has no steps, or its last
            ratio is infinite and `ratio_spacing` needs a finite one.
        """
        check_at_least(1, steps=steps)
        total = _count_trained_steps(process, self)
        if steps + self.has_extra_step > total:
            raise UserError(
                f"steps={steps} is invalid: the schedule has {total - self.has_extra_step} of {total} noise steps. "
                f"Use steps={total - self.has_extra_step} or less."
            )
        step_ratios = self._compute_step_ratios(process, total)
        model_steps = self._select_steps(total, steps)
        if model_steps[0] > total - 1:
            raise UserError(
                f"steps={steps}, steps_offset={self.steps_offset} is invalid: the first step is beyond the last of "
                f"{total} noise steps. Use fewer steps or steps_offset=0."
            )
        ratios: np.ndarray = np.interp(model_steps, np.arange(total), step_ratios)
        if self.ratio_spacing != "spaced":
            max_ratio, min_ratio = (step_ratios[-1], step_ratios[0]) if self.has_extra_step else (ratios[0], ratios[-1])
            ratios = space_values(self.ratio_spacing, max_ratio, min_ratio, steps)
            model_steps = np.interp(np.log(ratios), np.log(step_ratios), np.arange(total))
        # Interpolation returns a trained step only up to rounding; without the margin, `below` would miss it by one.
        roundings = {"between": model_steps, "nearest": np.round(model_steps), "below": np.floor(model_steps + 1e-9)}
        end = 0.0 if self.end == "data" else 1 / total
        return append_final_time(process.ratio_to_time(ratios), roundings[self.step_rounding] / total, end)

    def _compute_step_ratios(self, process: Process, trained_steps: int) -> Float64[np.ndarray, " {trained_steps}"]:
        """Return the ratios of noise to data after each step."""
        times = np.arange(1, trained_steps + 1) / trained_steps
        with np.errstate(divide="ignore"):
            ratios = process.sigma(times) / process.alpha(times)
        if self.terminal_ratio is not None:
            ratios[-1] = self.terminal_ratio
        if self.ratio_spacing != "spaced" and not np.isfinite(ratios[-1]):
            raise UserError(
                f"ratio_spacing={self.ratio_spacing!r} is invalid: the ratio of noise to data after the last step is "
                "infinite. Use terminal_ratio=4096."
            )
        return ratios

    def _select_steps(self, trained_steps: int, steps: int) -> Float64[np.ndarray, " {steps}"]:
        """Return the falling steps, counted from 0."""
        count = steps + self.has_extra_step
        if self.spacing == "linspace":
            selected: np.ndarray = np.linspace(0.0, trained_steps - 1.0, count)[::-1]
        elif self.spacing == "leading":
            selected = np.arange(count)[::-1] * float(trained_steps // count) + self.steps_offset
        else:
            count = steps  # Trailing steps never include the data.
            selected = np.round(trained_steps - np.arange(count) * (trained_steps / count)) - 1
        selected = selected if self.step_rounding == "between" else np.round(selected)
        return selected[:steps]


@dataclass(frozen=True, kw_only=True)
class LcmSchedule:
    """Times of a latent consistency model, a subset of its distillation steps, as in `LCMScheduler`.

    Raises:
      UserError: If there are no distillation steps.
    """

    distillation_steps: int = 50
    """Number of the teacher's sampling steps, at whose times the model was distilled."""

    def __post_init__(self):
        check_at_least(1, distillation_steps=self.distillation_steps)

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """Return the times of `steps` steps.

        Raises:
          UserError: If `steps` is below 1 or exceeds the distillation steps, or the process has no steps.
        """
        check_at_least(1, steps=steps)
        total = _count_trained_steps(process, self)
        if not steps <= self.distillation_steps <= total:
            raise UserError(
                f"steps={steps}, distillation_steps={self.distillation_steps} is invalid: they and the {total} noise "
                f"steps must not fall. Use steps={min(self.distillation_steps, total)} or less."
            )
        distilled_steps = np.arange(1, self.distillation_steps + 1) * (total // self.distillation_steps) - 1.0
        model_steps = distilled_steps[::-1][np.floor(np.arange(steps) * (self.distillation_steps / steps)).astype(int)]
        return append_final_time((model_steps + 1) / total, model_steps / total)


@dataclass(frozen=True, kw_only=True)
class UniPcFlowSchedule:
    """Times of diffusers' `UniPCMultistepScheduler` with `use_flow_sigmas`.

    Before the shift, the times end at `1 / training_steps`, and the data replace this last time. The first time is a
    millionth below 1, where the log-SNR is finite. The model time is rounded down to multiples of `1 / training_steps`.

    Raises:
      UserError: If `terminal_time` is not between 0 and 1.
    """

    training_steps: int = 1000
    """Number of noise steps in training."""
    terminal_time: float | None = None
    """Last time before the data, to which the shifted times are stretched; None to keep them."""

    def __post_init__(self):
        check_terminal_time(self.terminal_time)

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """Return the times of `steps` steps, computed in float64.

        Raises:
          UserError: If `steps` is below 1.
        """
        check_at_least(1, steps=steps)
        times = process.shift_time(np.linspace(1.0, 1.0 / self.training_steps, steps + 1)[:-1])
        times = stretch_to_terminal_time(times, self.terminal_time)
        if abs(times[0] - 1) < 1e-6:
            times[0] -= 1e-6
        model_times = np.floor(times * self.training_steps) / self.training_steps
        return append_final_time(times, model_times)


@dataclass(frozen=True, kw_only=True)
class DpmFlowSchedule:
    """Times of diffusers' DPM-Solvers with `use_flow_sigmas`: from `1 - 1 / training_steps`, shifted, to the data.

    The model time is rounded down to multiples of `1 / training_steps`.
    """

    training_steps: int = 1000
    """Number of noise steps in training."""

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """Return the times of `steps` steps, computed in float64.

        Raises:
          UserError: If `steps` is below 1.
        """
        check_at_least(1, steps=steps)
        times = process.shift_time(1 - np.linspace(1.0, 1.0 / self.training_steps, steps + 1))[::-1][:-1]
        model_times = np.floor(times * self.training_steps) / self.training_steps
        return append_final_time(times, model_times)


@dataclass(frozen=True, kw_only=True)
class FlowMatchSchedule:
    """Times of diffusers' `FlowMatchEulerDiscreteScheduler`: from 1 to `1 / training_steps`, shifted.

    These are the scheduler's own times. Pipelines that pass it `sigmas` of `linspace(1, 1 / steps, steps)`, such as
    Flux's and LTX-Video's, sample at `UniformTimes`.

    Raises:
      UserError: If `terminal_time` is not between 0 and 1.
    """

    training_steps: int = 1000
    """Number of noise steps in training."""
    is_end_shifted_twice: bool = True
    """Shifts `1 / training_steps` before the times are spaced, and again with the times, as diffusers does unless the
    shift depends on the clip's size."""
    terminal_time: float | None = None
    """Last time before the data, to which the shifted times are stretched; None to keep them."""
    spacing: Literal["uniform"] | Spacing = "uniform"
    """Spacing of the times: uniform before the shift, or as in `space_values` between the shifted ends."""

    def __post_init__(self):
        check_terminal_time(self.terminal_time)

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """Return the times of `steps` steps, computed in float64.

        Raises:
          UserError: If `steps` is below 1.
        """
        check_at_least(1, steps=steps)
        ends = np.asarray([1.0, 1.0 / self.training_steps])
        first, last = process.shift_time(ends) if self.is_end_shifted_twice else ends
        times = stretch_to_terminal_time(process.shift_time(np.linspace(first, last, steps)), self.terminal_time)
        if self.spacing != "uniform":
            times = space_values(self.spacing, times[0], times[-1], steps)
        return append_final_time(times, times)


def _count_trained_steps(process: Process, schedule: object) -> int:
    if not isinstance(process, VariancePreservingProcess):
        raise UserError(
            f"{type(schedule).__name__} is invalid: it counts noise steps, and {type(process).__name__} has none. "
            "Use UniformTimes, ShiftedTimes, KarrasTimes or ExplicitTimes."
        )
    return process.steps


@dataclass(frozen=True, kw_only=True)
class UniformTimes:
    """Uniformly spaced times, shifted as in training.

    `terminal_time` and `spacing` change them afterwards, as diffusers' `FlowMatchEulerDiscreteScheduler` changes times
    that a pipeline passes to it.

    Raises:
      UserError: If `terminal_time` is not between 0 and 1.
    """

    terminal_time: float | None = None
    """Last time before the data, to which the shifted times are stretched; None to keep them (LTX-Video has 0.1)."""
    spacing: Literal["uniform"] | Spacing = "uniform"
    """Spacing between the first and the last shifted time: the times' own, or as in `space_values`."""

    def __post_init__(self):
        check_terminal_time(self.terminal_time)

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """Return the times of `steps` steps.

        Raises:
          UserError: If `steps` is below 1.
        """
        check_at_least(1, steps=steps)
        times = process.shift_time(np.linspace(1.0, 0.0, steps + 1))
        times[:-1] = stretch_to_terminal_time(times[:-1], self.terminal_time)
        if self.spacing != "uniform":
            times[:-1] = space_values(self.spacing, times[0], times[-2], steps)
        return SampleTimes(put_on_device(times), put_on_device(times))


@dataclass(frozen=True, kw_only=True)
class ShiftedTimes:
    """Uniformly spaced times, shifted by `shift` (see `RectifiedFlow`) instead of the shift of training.

    Raises:
      UserError: If the shift is not positive.
    """

    shift: float

    def __post_init__(self):
        RectifiedFlow(shift=self.shift)

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """Return the times of `steps` steps.

        Raises:
          UserError: If `steps` is below 1.
        """
        times = make_uniform_times(RectifiedFlow(shift=self.shift), steps)
        return SampleTimes(times, times)


@dataclass(frozen=True, kw_only=True)
class LinearQuadraticTimes:
    """Times that fall slowly and linearly in the first half of the steps, then quadratically; a shift follows.

    The fine steps near noise match a sampler with many more steps (Movie Gen, arXiv 2410.13720, section 3.4.2).
    LTX-Video samples this way from version 0.9.5 on, without a shift.

    Raises:
      UserError: If the threshold is not between 0 and 1.
    """

    threshold: float = 0.025
    """Distance from noise at which the linear half ends, before the shift."""

    def __post_init__(self):
        if not 0 < self.threshold < 1:
            raise UserError(f"threshold={self.threshold} is invalid: it must be between 0 and 1. Use 0.025.")

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """Return the times of `steps` steps.

        Raises:
          UserError: If `steps` is below 1.
        """
        check_at_least(1, steps=steps)
        linear, quadratic = steps // 2, steps - steps // 2
        start = self.threshold if linear else 0.0
        slope = start / max(linear, 1)
        further = np.arange(quadratic + 1)
        curvature = (1 - start - slope * quadratic) / quadratic**2
        distances = np.concatenate([slope * np.arange(linear), start + slope * further + curvature * further**2])
        distances[-1] = 1  # without rounding
        times = put_on_device(process.shift_time(1 - distances))
        return SampleTimes(times, times)


@dataclass(frozen=True, kw_only=True)
class ExplicitTimes:
    """Explicitly listed times.

    Raises:
      UserError: If there are fewer than two times, or they do not fall from at most 1 to at least 0.
    """

    times: tuple[float, ...]

    def __post_init__(self):
        is_falling = all(time > next_time for time, next_time in zip(self.times, self.times[1:], strict=False))
        if len(self.times) < 2 or not is_falling or not 0 <= self.times[-1] < self.times[0] <= 1:
            raise UserError(f"times={self.times} is invalid: must fall, from at most 1 to at least 0. Use two or more.")

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """Return the times.

        Raises:
          UserError: If `steps` differs from the number of intervals between the times.
        """
        intervals = len(self.times) - 1
        if steps != intervals:
            raise UserError(f"steps={steps} is invalid: the explicit times make {intervals}. Use steps={intervals}.")
        times = put_on_device(np.asarray(self.times))
        return SampleTimes(times, times)


@dataclass(frozen=True, kw_only=True)
class _RatioTimes(ABC):
    r"""Times at falling ratios $\sigma / \alpha$, followed by the data.

    Raises:
      UserError: If the ratios are not positive, or `min_ratio` is not below `max_ratio`.
    """

    min_ratio: float = 0.002
    """Last ratio before the data."""
    max_ratio: float | None = None
    """First ratio; None for the ratio of the process at time 1."""
    log_ratio_scale: float | None = None
    """Factor of the ratio's logarithm in the model time, 0.25 for models of EDM ($c_{noise}$, arXiv 2206.00364, table
    1); None if the model receives the time."""

    def __post_init__(self):
        if not 0 < self.min_ratio < (float("inf") if self.max_ratio is None else self.max_ratio):
            raise UserError(f"{self} is invalid: noise-to-data ratios must be positive. Use min_ratio below max_ratio.")

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """Return the times of `steps` steps.

        Raises:
          UserError: If `steps` is below 1, or the first time is not pure noise.
        """
        check_at_least(1, steps=steps)
        one = np.ones(1)
        with np.errstate(divide="ignore"):
            process_ratio = (process.sigma(one) / process.alpha(one)).item()
        max_ratio = process_ratio if self.max_ratio is None else self.max_ratio
        kind = type(process).__name__
        if not np.isfinite(max_ratio):
            raise UserError(f"max_ratio=None is invalid: that of {kind} at noise is infinite. Use a finite max_ratio.")
        first = process.ratio_to_time(np.asarray([max_ratio], np.float64))
        size = np.hypot(process.alpha(first), process.sigma(first)) / process.scale_initial_noise(one)
        # Sampling starts from unit noise scaled by the process, so the first time must have that total size (within 10
        # %).
        if max_ratio > process_ratio * (1 + 1e-6) or abs(size.item() - 1) > 0.1:
            raise UserError(
                f"max_ratio={max_ratio:g} is invalid: sampling starts from noise, whose ratio to the data in {kind} is "
                f"{process_ratio:g}. Use max_ratio={process_ratio:g}."
            )
        ratios = self.compute_ratios(max_ratio, steps)
        times = process.ratio_to_time(ratios)
        model_times = times if self.log_ratio_scale is None else self.log_ratio_scale * np.log(ratios)
        return append_final_time(times, model_times)

    @abstractmethod
    def compute_ratios(self, max_ratio: float, steps: int) -> np.ndarray:
        """Return the falling ratios."""


@dataclass(frozen=True, kw_only=True)
class ExponentialTimes(_RatioTimes):
    r"""Times uniformly spaced in the log-SNR: $\sigma / \alpha$ falls by one factor in every step, and then to 0.

    DPM-Solver uses these times (arXiv 2206.00927, section 3.4; `use_lu_lambdas` of diffusers).
    """

    def compute_ratios(self, max_ratio: float, steps: int) -> np.ndarray:
        """Return the falling ratios."""
        return space_values("exponential", max_ratio, self.min_ratio, steps)


@dataclass(frozen=True, kw_only=True)
class BetaTimes(_RatioTimes):
    r"""Times with $\sigma / \alpha$ at quantiles of a symmetric beta distribution, and then 0 (arXiv 2407.12173)."""

    concentration: float = 0.6
    """Both parameters of the distribution; smaller ones move more steps to both ends."""

    def __post_init__(self):
        super().__post_init__()
        if not self.concentration > 0:
            raise UserError(f"concentration={self.concentration} is invalid: it must be positive. Use 0.6.")

    def compute_ratios(self, max_ratio: float, steps: int) -> np.ndarray:
        """Return the falling ratios."""
        return space_values("beta", max_ratio, self.min_ratio, steps, concentration=self.concentration)


@dataclass(frozen=True, kw_only=True)
class KarrasTimes(_RatioTimes):
    r"""Times with uniform $(\sigma / \alpha)^{1/\rho}$, $\rho$ = `exponent`, and then 0 (arXiv 2206.00364, eq. 5)."""

    exponent: float = 7.0

    def compute_ratios(self, max_ratio: float, steps: int) -> np.ndarray:
        """Return the falling ratios."""
        return space_values("karras", max_ratio, self.min_ratio, steps, exponent=self.exponent)


TimeSchedule = (
    UniformTimes
    | ShiftedTimes
    | LinearQuadraticTimes
    | ExplicitTimes
    | KarrasTimes
    | ExponentialTimes
    | BetaTimes
    | DiscreteSchedule
    | LcmSchedule
    | UniPcFlowSchedule
    | DpmFlowSchedule
    | FlowMatchSchedule
)


def override_shift(schedule: TimeSchedule, process: Process, shift: float | int) -> tuple[TimeSchedule, Process]:
    """Return a schedule and a process for its times, which are shifted by `shift` instead of the shift of training.

    This also drops a factor of the process's shift that depends on a clip's size.

    Raises:
      UserError: If the shift is not positive, or does not move the times of this schedule or process.
    """
    if isinstance(schedule, ShiftedTimes):
        return ShiftedTimes(shift=float(shift)), process
    shifted = RectifiedFlow(shift=float(shift))
    if not isinstance(process, RectifiedFlow) or isinstance(schedule, ExplicitTimes | _RatioTimes):
        kind = f"{type(schedule).__name__} of {type(process).__name__}"
        raise UserError(f"shift={shift:g} is invalid: it does not move the times of {kind}. Use times=, or no shift.")
    return schedule, shifted


def make_uniform_times(process: Process, steps: int) -> Float[Array, " {steps}+1"]:
    """Return times from 1 (noise) to 0 (data), uniformly spaced and then shifted as in training.

    Raises:
      UserError: If `steps` is below 1.
    """
    check_at_least(1, steps=steps)
    return put_on_device(process.shift_time(np.linspace(1.0, 0.0, steps + 1)))
