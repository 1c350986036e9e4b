"""Time grids as diffusers' schedulers have them, for models that were trained with their times.

DDPM counts its steps of noise from 0: after $n$ of $N$ steps it is time $n / N$ here, and the model is told step
$n - 1$, which is $(n - 1) / N$ in units of time.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64

from dit_video.core.errors import UserError
from dit_video.diffusion.processes.process import Process
from dit_video.diffusion.processes.variance_preserving import VariancePreserving
from dit_video.diffusion.sample_times import SampleTimes, check_steps, ending


@dataclass(frozen=True, kw_only=True)
class StepGrid:
    """Some of the steps of noise that a model was trained on, spaced as in table 2 of arXiv 2305.08891.

    By default they are those of `DDIMScheduler` and its like with trailing steps. Between steps, sigma / alpha is a
    straight line, as diffusers has it.

    Raises:
      UserError: an offset below 0.
    """

    spacing: Literal["leading", "trailing", "linspace"] = "trailing"
    offset: int = 0
    """of leading steps: how far they are moved towards noise"""
    spare: bool = False
    """whether one step more is spaced out, and the last left out, as for solvers of higher order"""
    ratios: Literal["spaced", "karras", "exponential"] = "spaced"
    """of noise to data: those of the steps; or between the first and the last of them (of all steps, with `spare`) with
    seventh roots, or logarithms, evenly spaced (`Karras`, `Exponential`)"""
    told: Literal["between", "nearest", "below"] = "between"
    """which step the model is told where a time lies between two"""
    last: Literal["data", "first step"] = "data"
    """where it ends: `first step` is after one step of noise"""

    def __post_init__(self):
        if self.offset < 0:
            raise UserError(f"an offset of steps is a whole number from 0 on, not {self.offset}")

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """The times of so many steps, computed in float64.

        Raises:
          UserError: less than one step, more than the model was trained on, or a process without steps.
        """
        check_steps(steps)
        trained = _trained_steps(process, self)
        if steps + self.spare > trained:
            raise UserError(f"{steps} steps of sampling are more than this grid has in {trained} steps of noise")
        table = process.sigma(np.arange(1, trained + 1) / trained) / process.alpha(np.arange(1, trained + 1) / trained)
        chosen = self._chosen(trained, steps)
        if chosen[0] > trained - 1:
            raise UserError(
                f"{steps} steps with offset {self.offset} start beyond the last of {trained} steps of noise"
            )
        ratios: np.ndarray = np.interp(chosen, np.arange(trained), table)
        if self.ratios != "spaced":
            most, least = (table[-1], table[0]) if self.spare else (ratios[0], ratios[-1])
            ratios = _between(self.ratios, most, least, steps)
            chosen = np.interp(np.log(ratios), np.log(table), np.arange(trained))
        # A ratio that is a step's own gives the step to within rounding, which a step below would be told of.
        told = {"between": chosen, "nearest": np.round(chosen), "below": np.floor(chosen + 1e-9)}[self.told]
        return ending(process.time_at(ratios), told / trained, 0.0 if self.last == "data" else 1 / trained)

    def _chosen(self, trained: int, steps: int) -> Float64[np.ndarray, " {steps}"]:
        """The steps, counted from 0, falling."""
        count = steps + self.spare
        if self.spacing == "linspace":
            chosen: np.ndarray = np.linspace(0.0, trained - 1.0, count)[::-1]
        elif self.spacing == "leading":
            chosen = np.arange(count)[::-1] * float(trained // count) + self.offset
        else:
            count = steps  # ends before the data in any case
            chosen = np.round(trained - np.arange(count) * (trained / count)) - 1
        chosen = chosen if self.told == "between" else np.round(chosen)
        return chosen[:steps]


@dataclass(frozen=True, kw_only=True)
class LcmGrid:
    """Of a latent consistency model, as `LCMScheduler` has them: some of the steps that it was distilled on.

    Raises:
      UserError: no steps of distillation.
    """

    distilled: int = 50
    """steps of the teacher's sampler, of which each has its own time in distillation"""

    def __post_init__(self):
        if self.distilled < 1:
            raise UserError(f"a model is distilled on at least 1 step, not {self.distilled}")

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """The times of so many steps.

        Raises:
          UserError: less than one step, more than the model was distilled on, or a process without steps.
        """
        check_steps(steps)
        trained = _trained_steps(process, self)
        if not steps <= self.distilled <= trained:
            raise UserError(
                f"{steps} steps of sampling, {self.distilled} of distillation and {trained} of noise must rise"
            )
        origin = np.arange(1, self.distilled + 1) * (trained // self.distilled) - 1.0
        chosen = origin[::-1][np.floor(np.arange(steps) * (self.distilled / steps)).astype(int)]
        return ending((chosen + 1) / trained, chosen / trained)


@dataclass(frozen=True, kw_only=True)
class UniPcGrid:
    """As diffusers' `UniPCMultistepScheduler` with `use_flow_sigmas` has them.

    The times before the shift end at `1 / training_steps` with the (left out) last one, the data. The first lies a
    millionth below 1, where the log-SNR is finite. The model is told whole thousandths, rounded down.
    """

    training_steps: int = 1000

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """The times of so many steps, computed in float64.

        Raises:
          UserError: less than one step.
        """
        check_steps(steps)
        times = process.shifted(np.linspace(1.0, 1.0 / self.training_steps, steps + 1)[:-1])
        if abs(times[0] - 1) < 1e-6:
            times[0] -= 1e-6
        told = np.floor(times * self.training_steps) / self.training_steps
        return ending(times, told)


@dataclass(frozen=True, kw_only=True)
class DpmFlowGrid:
    """As diffusers' DPM-Solvers with `use_flow_sigmas` have them: from `1 - 1 / training_steps`, shifted, to the data.

    The model is told whole thousandths, rounded down.
    """

    training_steps: int = 1000

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """The times of so many steps, computed in float64.

        Raises:
          UserError: less than one step.
        """
        check_steps(steps)
        times = process.shifted(1 - np.linspace(1.0, 1.0 / self.training_steps, steps + 1))[::-1][:-1]
        told = np.floor(times * self.training_steps) / self.training_steps
        return ending(times, told)


@dataclass(frozen=True, kw_only=True)
class FlowMatchGrid:
    """As diffusers' `FlowMatchEulerDiscreteScheduler` has them: from 1 to the shifted `1 / training_steps`, shifted.

    So the shift is applied twice to the last time before the data.
    """

    training_steps: int = 1000

    def __call__(self, process: Process, steps: int) -> SampleTimes:
        """The times of so many steps, computed in float64.

        Raises:
          UserError: less than one step.
        """
        check_steps(steps)
        first, last = process.shifted(np.asarray([1.0, 1.0 / self.training_steps]))
        times = process.shifted(np.linspace(first, last, steps))
        return ending(times, times)


def _trained_steps(process: Process, grid: object) -> int:
    if not isinstance(process, VariancePreserving):
        raise UserError(
            f"{type(grid).__name__} counts steps of noise, which {type(process).__name__} has none of; "
            "use Even, Shifted, Karras or Given"
        )
    return process.steps


def _between(kind: str, most: float, least: float, steps: int) -> Float64[np.ndarray, " {steps}"]:
    """Falling ratios."""
    if kind == "karras":
        return np.linspace(most ** (1 / 7), least ** (1 / 7), steps) ** 7
    return np.exp(np.linspace(np.log(most), np.log(least), steps))
