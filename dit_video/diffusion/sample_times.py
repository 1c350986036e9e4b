"""Where a sampler stops on its way, and what it says to the model there."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from dit_video.core.errors import UserError


class SampleTimes(NamedTuple):
    """One more time than there are steps, falling."""

    times: Float[Array, " times"]
    """where the solver stops"""
    told: Float[Array, " times"]
    """what the model is given as its time there"""


def check_steps(steps: int) -> None:
    """Refuse less than one step."""
    if steps < 1:
        raise UserError(f"sampling takes at least 1 step, not {steps}")


def on_device(values: np.ndarray) -> Float[Array, " times"]:
    """Times in float32, or in float64 if JAX has it. Other conversions compile a program for each number of steps."""
    return jax.device_put(values.astype(jax.dtypes.canonicalize_dtype(np.float64)))


def ending(times: np.ndarray, told: np.ndarray, last: float = 0.0) -> SampleTimes:
    """Times of the steps' starts, with a last one, of which the model is told 0."""

    def closed(values: np.ndarray, end: float) -> Float[Array, " times"]:
        return on_device(np.append(values, end))

    return SampleTimes(closed(times, last), closed(told, 0.0))
