"""At which times a model is sampled: from noise at 1 to data at 0.

A grid says what the model is told at each time as well. The grids here tell it the time; those of `scheduler_grids` are
for models of other projects.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.diffusion.diffusers_schedules import DpmFlowGrid, FlowMatchGrid, LcmGrid, StepGrid, UniPcGrid
from dit_video.diffusion.processes.process import Process
from dit_video.diffusion.processes.rectified_flow import RectifiedFlow
from dit_video.diffusion.sample_times import SampleTimes, check_steps, ending, on_device


@dataclass(frozen=True, kw_only=True)
class Even:
    """Evenly spaced, then shifted as in training."""

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """The times of so many steps.

        Raises:
          UserError: less than one step.
        """
        times = time_grid(process, steps)
        return SampleTimes(times, times)


@dataclass(frozen=True, kw_only=True)
class Shifted:
    """Evenly spaced, then shifted by `shift` (see `RectifiedFlow`), whatever the shift of training was.

    Raises:
      UserError: a shift that is not positive.
    """

    shift: float

    def __post_init__(self):
        RectifiedFlow(shift=self.shift)

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """The times of so many steps.

        Raises:
          UserError: less than one step.
        """
        times = time_grid(RectifiedFlow(shift=self.shift), steps)
        return SampleTimes(times, times)


@dataclass(frozen=True, kw_only=True)
class Given:
    """The times themselves.

    Raises:
      UserError: fewer than two, or times that do not fall from at most 1 to at least 0.
    """

    times: tuple[float, ...]

    def __post_init__(self):
        falling = all(time > following for time, following in zip(self.times, self.times[1:], strict=False))
        if len(self.times) < 2 or not falling or not 0 <= self.times[-1] < self.times[0] <= 1:
            raise UserError(f"times fall from at most 1 to at least 0, two of them or more; got {self.times}")

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """The times.

        Raises:
          UserError: another number of steps than there are between the times.
        """
        if steps != len(self.times) - 1:
            raise UserError(f"the given times make {len(self.times) - 1} steps, {steps} are asked for")
        times = on_device(np.asarray(self.times))
        return SampleTimes(times, times)


@dataclass(frozen=True, kw_only=True)
class _Ratios:
    r"""Times of given ratios $\sigma / \alpha$, and at last the data.

    Raises:
      UserError: ratios that do not rise from above 0.
    """

    least: float = 0.002
    most: float | None = None
    """the first ratio; of the process's noise if None"""

    def __post_init__(self):
        if not 0 < self.least < (float("inf") if self.most is None else self.most):
            raise UserError(f"ratios of noise to data rise from above 0; got least={self.least}, most={self.most}")

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """The times of so many steps.

        Raises:
          UserError: less than one step, or a first time that is none of noise alone.
        """
        check_steps(steps)
        one = np.ones(1)
        with np.errstate(divide="ignore"):
            end = (process.sigma(one) / process.alpha(one)).item()
        most = end if self.most is None else self.most
        kind = type(process).__name__
        if not np.isfinite(most):
            raise UserError(f"the noise of {kind} is without data, so that their ratio is infinite; give `most`")
        first = process.time_at(np.asarray([most], np.float64))
        size = np.hypot(process.alpha(first), process.sigma(first)) / process.start(one)
        if most > end * (1 + 1e-6) or abs(size.item() - 1) > 0.1:
            raise UserError(f"sampling starts from noise, whose ratio to the data in {kind} is {end:g}, not {most:g}")
        times = process.time_at(self.ratios(most, steps))
        return ending(times, times)

    def ratios(self, most: float, steps: int) -> np.ndarray:
        """The falling ratios."""
        return most * (self.least / most) ** np.linspace(0.0, 1.0, steps)


@dataclass(frozen=True, kw_only=True)
class Exponential(_Ratios):
    r"""Evenly spaced in the log-SNR: $\sigma / \alpha$ falls by the same factor in every step, and then to 0."""


@dataclass(frozen=True, kw_only=True)
class Karras(_Ratios):
    r"""$(\sigma / \alpha)^{1/\rho}$ evenly spaced for an `exponent` $\rho$, and then 0 (arXiv 2206.00364, eq. 5)."""

    exponent: float = 7.0

    def ratios(self, most: float, steps: int) -> np.ndarray:
        """The falling ratios."""
        ends = most ** (1 / self.exponent), self.least ** (1 / self.exponent)
        return np.linspace(*ends, steps) ** self.exponent


TimeGrid = Even | Shifted | Given | Karras | Exponential | StepGrid | LcmGrid | UniPcGrid | DpmFlowGrid | FlowMatchGrid


def time_grid(process: Process, steps: int) -> Float[Array, " {steps}+1"]:
    """Times from 1 (noise) to 0 (data), evenly spaced and then shifted as in training.

    Raises:
      UserError: less than one step.
    """
    check_steps(steps)
    return on_device(process.shifted(np.linspace(1.0, 0.0, steps + 1)))
