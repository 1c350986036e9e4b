"""Time schedules of diffusers' schedulers, for models that were trained with their times.

DDPM counts noise steps from 0: the state after $n$ of $N$ steps has time $n / N$ here, and the model receives step
$n - 1$, that is $(n - 1) / N$ in units of time.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64

from dit_video.core.errors import UserError, check_at_least
from dit_video.diffusion.processes.process import Process
from dit_video.diffusion.processes.variance_preserving import VariancePreservingProcess
from dit_video.diffusion.sample_times import (
    SampleTimes,
    append_final_time,
    check_terminal_time,
    stretch_to_terminal_time,
)
from dit_video.diffusion.spacings import Spacing, space_values


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
    """Ratios of noise to data: those of the steps (`spaced`), or ratios from the first to the last of them (of all
    trained steps with `has_extra_step`) with the spacing of `KarrasTimes`, `ExponentialTimes` or `BetaTimes`."""
    terminal_ratio: float | None = None
    """Ratio of noise to data of the last trained step, from which sampling starts; None for that of the process. For
    `zero_terminal_snr`, whose own ratio is infinite, diffusers takes 4096 where a solver needs a finite one."""
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
          UserError: If there is less than one step, there are more than the model was trained on, the process has no
            steps, or its last ratio is infinite and `ratio_spacing` needs a finite one.
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
        # Interpolation returns a trained step only up to rounding: without the margin, `below` would miss it by one.
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
    """Number of the teacher's sampling steps, whose times are those of distillation."""

    def __post_init__(self):
        check_at_least(1, distillation_steps=self.distillation_steps)

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """Return the times of `steps` steps.

        Raises:
          UserError: If there is less than one step, there are more than the model was distilled on, or the process has
            no steps.
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

    Before the shift the times end at `1 / training_steps`, which is replaced by the data. The first time is a millionth
    below 1, where the log-SNR is finite. The model time is rounded down to multiples of `1 / training_steps`.

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
          UserError: If there is less than one step.
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
          UserError: If there is less than one step.
        """
        check_at_least(1, steps=steps)
        times = process.shift_time(1 - np.linspace(1.0, 1.0 / self.training_steps, steps + 1))[::-1][:-1]
        model_times = np.floor(times * self.training_steps) / self.training_steps
        return append_final_time(times, model_times)


@dataclass(frozen=True, kw_only=True)
class FlowMatchSchedule:
    """Times of diffusers' `FlowMatchEulerDiscreteScheduler`: from 1 to `1 / training_steps`, shifted.

    These are its own times. Pipelines that pass it `sigmas` of `linspace(1, 1 / steps, steps)`, such as those of Flux
    and LTX-Video, sample at `UniformTimes`.

    Raises:
      UserError: If `terminal_time` is not between 0 and 1.
    """

    training_steps: int = 1000
    """Number of noise steps in training."""
    is_end_shifted_twice: bool = True
    """Shifts `1 / training_steps` before the times are spaced, and with them again, as diffusers does unless the shift
    depends on the size of the clip."""
    terminal_time: float | None = None
    """Last time before the data, to which the shifted times are stretched; None to keep them."""
    spacing: Literal["uniform"] | Spacing = "uniform"
    """Spacing of the times before the shift, or that of `space_values` between the first and the last shifted time."""

    def __post_init__(self):
        check_terminal_time(self.terminal_time)

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """Return the times of `steps` steps, computed in float64.

        Raises:
          UserError: If there is less than one step.
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
