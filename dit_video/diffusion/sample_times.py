"""The times of a sampler's steps, and the model times at them."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float


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
