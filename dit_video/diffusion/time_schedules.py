"""Time schedules for sampling, from noise at 1 to data at 0.

A schedule also defines the model time at each of its times. For the schedules here it is the time itself; those of
`diffusers_schedules` are for models of other projects.
"""

from dataclasses import dataclass

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
from dit_video.diffusion.sample_times import SampleTimes, append_final_time, put_on_device


@dataclass(frozen=True, kw_only=True)
class UniformTimes:
    """Uniformly spaced times, shifted as in training."""

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """Return the times of `steps` steps.

        Raises:
          UserError: If there is less than one step.
        """
        times = make_uniform_times(process, steps)
        return SampleTimes(times, times)


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
class _RatioTimes:
    r"""Times at falling ratios $\sigma / \alpha$, followed by the data.

    Raises:
      UserError: If the ratios are not positive, or `min_ratio` is not below `max_ratio`.
    """

    min_ratio: float = 0.002
    """Last ratio before the data."""
    max_ratio: float | None = None
    """First ratio; None for the ratio of the process at time 1."""

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
        times = process.ratio_to_time(self.compute_ratios(max_ratio, steps))
        return append_final_time(times, times)

    def compute_ratios(self, max_ratio: float, steps: int) -> np.ndarray:
        """Return the falling ratios."""
        return max_ratio * (self.min_ratio / max_ratio) ** np.linspace(0.0, 1.0, steps)


@dataclass(frozen=True, kw_only=True)
class ExponentialTimes(_RatioTimes):
    r"""Times uniformly spaced in the log-SNR: $\sigma / \alpha$ falls by one factor in every step, and then to 0."""


@dataclass(frozen=True, kw_only=True)
class KarrasTimes(_RatioTimes):
    r"""Times with uniform $(\sigma / \alpha)^{1/\rho}$, $\rho$ = `exponent`, and then 0 (arXiv 2206.00364, eq. 5)."""

    exponent: float = 7.0

    def compute_ratios(self, max_ratio: float, steps: int) -> np.ndarray:
        """Return the falling ratios."""
        ends = max_ratio ** (1 / self.exponent), self.min_ratio ** (1 / self.exponent)
        return np.linspace(*ends, steps) ** self.exponent


TimeSchedule = (
    UniformTimes
    | ShiftedTimes
    | ExplicitTimes
    | KarrasTimes
    | ExponentialTimes
    | DiscreteSchedule
    | LcmSchedule
    | UniPcFlowSchedule
    | DpmFlowSchedule
    | FlowMatchSchedule
)


def make_uniform_times(process: Process, steps: int) -> Float[Array, " {steps}+1"]:
    """Return times from 1 (noise) to 0 (data), uniformly spaced and then shifted as in training.

    Raises:
      UserError: If there is less than one step.
    """
    check_at_least(1, steps=steps)
    return put_on_device(process.shift_time(np.linspace(1.0, 0.0, steps + 1)))
