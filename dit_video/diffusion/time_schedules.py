"""Time schedules for sampling, from noise at 1 to data at 0.

A schedule also defines the model time at each of its times. For the schedules here it is the time itself; those of
`diffusers_schedules` are for models of other projects.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Array, Float

from dit_video.core.errors import UserError, check_at_least
from dit_video.diffusion.diffusers_schedules import (
    DiscreteSchedule,
    DpmFlowSchedule,
    FlowMatchSchedule,
    LcmSchedule,
    UniPcFlowSchedule,
)
from dit_video.diffusion.processes.process import Process
from dit_video.diffusion.processes.rectified_flow import RectifiedFlow
from dit_video.diffusion.sample_times import (
    SampleTimes,
    append_final_time,
    check_terminal_time,
    put_on_device,
    stretch_to_terminal_time,
)
from dit_video.diffusion.spacings import Spacing, space_values


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
    """Spacing between the first and the last of the shifted times: their own, or that of `space_values`."""

    def __post_init__(self):
        check_terminal_time(self.terminal_time)

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """Return the times of `steps` steps.

        Raises:
          UserError: If there is less than one step.
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
          UserError: If there is less than one step.
        """
        times = make_uniform_times(RectifiedFlow(shift=self.shift), steps)
        return SampleTimes(times, times)


@dataclass(frozen=True, kw_only=True)
class LinearQuadraticTimes:
    """Times whose first half of the steps falls slowly and linearly, the second half quadratically; then shifted.

    The fine steps near noise are those of a sampler with many more steps (Movie Gen, arXiv 2410.13720, section 3.4.2);
    LTX-Video samples so from version 0.9.5 on, without a shift.

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
          UserError: If there is less than one step.
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
          UserError: If `steps` is not the number of intervals between the times.
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
          UserError: If there is less than one step, or the first time is not pure noise.
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
        # Sampling starts from unit noise scaled by the process. The first time must have that total size (within 10 %).
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

    They are those of DPM-Solver (arXiv 2206.00927, section 3.4; `use_lu_lambdas` of diffusers).
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

    A factor of the process's shift that depends on a clip's size is dropped, too.

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
      UserError: If there is less than one step.
    """
    check_at_least(1, steps=steps)
    return put_on_device(process.shift_time(np.linspace(1.0, 0.0, steps + 1)))
