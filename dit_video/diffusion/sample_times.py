"""The times of a sampler's steps, and the model times at them."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from dit_video.core.errors import UserError


class SampleTimes(NamedTuple):
    """Falling times, one more than there are steps."""

    times: Float[Array, " times"]
    """Times of the solver's steps."""
    model_times: Float[Array, " times"]
    """Time that the model receives at each of them."""


def put_on_device(values: np.ndarray) -> Float[Array, " times"]:
    """Return times on the device, in float32, or in float64 if JAX has it.

    Other conversions would compile a program for every number of steps.
    """
    return jax.device_put(values.astype(jax.dtypes.canonicalize_dtype(np.float64)))


def append_final_time(times: np.ndarray, model_times: np.ndarray, final_time: float = 0.0) -> SampleTimes:
    """Return times with the steps' starts followed by a last one, whose model time is 0."""

    def append(values: np.ndarray, end: float) -> Float[Array, " times"]:
        return put_on_device(np.append(values, end))

    return SampleTimes(append(times, final_time), append(model_times, 0.0))


def check_terminal_time(terminal_time: float | None) -> None:
    """Check that a schedule can end at a time.

    Raises:
      UserError: If the time is not between 0 and 1.
    """
    if terminal_time is not None and not 0 < terminal_time < 1:
        raise UserError(
            f"terminal_time={terminal_time} is invalid: the last time before the data is above 0 and below 1. Use None "
            "for the time that follows from the number of steps."
        )


def stretch_to_terminal_time(times: np.ndarray, terminal_time: float | None) -> np.ndarray:
    r"""Return times whose distances $1 - t$ to noise are scaled such that the last one is `terminal_time`.

    Of a single step, which starts at noise, the time is kept. None keeps all of them (LTX-Video, arXiv 2501.00103;
    `shift_terminal` of diffusers).
    """
    if terminal_time is None or times[-1] == 1:
        return times
    return 1 - (1 - times) * (1 - terminal_time) / (1 - times[-1])
