"""At which times a flow is sampled: from noise at 1 to data at 0."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from dit_video.diffusion.process import Process
from dit_video.errors import UserError


class SampleTimes(NamedTuple):
    """One more time than there are steps, falling."""

    times: Float[Array, " times"]
    """where the solver stops"""
    told: Float[Array, " times"]
    """what the model is given as its time there"""


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
        _check(steps)
        times = process.shifted(np.linspace(1.0, 1.0 / self.training_steps, steps + 1)[:-1])
        if abs(times[0] - 1) < 1e-6:
            times[0] -= 1e-6
        told = np.floor(times * self.training_steps) / self.training_steps
        return _ended(times, told)


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
        _check(steps)
        first, last = process.shifted(np.asarray([1.0, 1.0 / self.training_steps]))
        times = process.shifted(np.linspace(first, last, steps))
        return _ended(times, times)


TimeGrid = Even | UniPcGrid | FlowMatchGrid


def time_grid(process: Process, steps: int) -> Float[Array, " {steps}+1"]:
    """Times from 1 (noise) to 0 (data), evenly spaced and then shifted as in training.

    Raises:
      UserError: less than one step.
    """
    _check(steps)
    return process.shifted(jnp.linspace(1.0, 0.0, steps + 1))


def _check(steps: int) -> None:
    if steps < 1:
        raise UserError(f"sampling takes at least 1 step, not {steps}")


def _ended(times: np.ndarray, told: np.ndarray) -> SampleTimes:
    """With the data at the end."""

    def closed(values: np.ndarray) -> Float32[Array, " times"]:
        return jnp.asarray(np.append(values, 0.0), jnp.float32)

    return SampleTimes(closed(times), closed(told))
