"""Distributions of training times, and their draws for a batch."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Integer

from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray
from dit_video.diffusion.processes import Process
from dit_video.diffusion.shift import ClipSize

_GOLDEN_RATIO = 0.6180339887498949
_MARGIN = 1e-5
"""Distance from the ends of the unit interval, where some times and some targets are infinite."""


def draw_low_discrepancy(offset: Float[Array, ""], ranks: Integer[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """Return numbers that cover [0, 1) evenly over consecutive ranks: `frac(offset + rank * golden ratio)`.

    An example's number depends on its rank in the plan and not on its row, so it is the same on every mesh. The
    variance of a batch's loss is lower than with independent draws (arXiv 2107.00630 stratifies for the same reason).
    """
    # The product is reduced modulo 1 in integers, since in float32 it would lose its fraction at large ranks.
    step = jnp.uint32(int(_GOLDEN_RATIO * 2**32))
    return (offset + (ranks.astype(jnp.uint32) * step).astype(jnp.float32) / 2.0**32) % 1.0


class TimeDistribution(ABC):
    """A distribution of training times, with the shift of the process."""

    @abstractmethod
    def quantile(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Return the number below which a fraction `u` of the distribution lies."""

    def __call__(
        self, process: Process, u: Float[Array, "*shape"], size: ClipSize | None = None
    ) -> Float[Array, "*shape"]:
        """Return training times of clips from uniform numbers in [0, 1), with the same shift as sampling."""
        return process.shift_time(self.quantile(u), size)


@dataclass(frozen=True, kw_only=True)
class Uniform(TimeDistribution):
    """The uniform distribution, except for the ends."""

    def quantile(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return _clip_to_margin(u)


@dataclass(frozen=True, kw_only=True)
class LogitNormal(TimeDistribution):
    """The distribution of `sigmoid(mean + std * normal)`, which favours the hard middle times (2403.03206, eq. 19).

    Raises:
      UserError: If the standard deviation is not positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        if not self.std > 0:
            raise UserError(f"std={self.std} is invalid: the standard deviation must be positive. Use 1.")

    def quantile(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return 1 / (1 + jnp.exp(-(self.mean + self.std * norm.ppf(_clip_to_margin(u)))))


@dataclass(frozen=True, kw_only=True)
class Mode(TimeDistribution):
    r"""A heavy-tailed distribution around the middle or, for a negative scale, both ends (2403.03206, eq. 20).

    $t = u + s\,\big(u - \sin^2(\frac\pi2 u)\big)$, which is the paper's formula with $1 - u$ for $u$.

    Raises:
      UserError: If times would not rise with $u$ at this scale $s$.
    """

    scale: float = 1.29

    def __post_init__(self):
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise UserError(f"scale={self.scale} is invalid: it must lie between -1 and 1.75. Use 0 for uniform times.")

    def quantile(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        clipped = _clip_to_margin(u)
        return clipped + self.scale * (clipped - jnp.square(jnp.sin(math.pi / 2 * clipped)))


@dataclass(frozen=True, kw_only=True)
class LogNormalSigma(TimeDistribution):
    r"""The distribution with $\sigma / \alpha$ = `exp(mean + std * normal)`, unshifted (arXiv 2206.00364, table 1).

    Raises:
      UserError: If the standard deviation is not positive.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self):
        if not self.std > 0:
            raise UserError(f"std={self.std} is invalid: the standard deviation must be positive. Use 1.2.")

    def quantile(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Return quantiles of the ratio of noise to data."""
        return jnp.exp(self.mean + self.std * norm.ppf(_clip_to_margin(u)))

    def __call__(
        self, process: Process, u: Float[Array, "*shape"], size: ClipSize | None = None
    ) -> Float[Array, "*shape"]:
        return jnp.minimum(process.ratio_to_time(self.quantile(u)), 1.0)


def _clip_to_margin(u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.clip(u, _MARGIN, 1 - _MARGIN)


class SampleTimes(NamedTuple):
    """Falling times, one more than there are steps."""

    times: Float[Array, " times"]
    """Times of the solver's steps."""
    model_times: Float[Array, " times"]
    """Time that the model receives at each of them."""


def put_on_device(values: np.ndarray) -> Float[Array, " times"]:
    """Return times on the device, in float32, or in float64 if JAX has it.

    Other conversions would compile one program for each number of steps.
    """
    return jax.device_put(values.astype(jax.dtypes.canonicalize_dtype(np.float64)))


def append_final_time(times: np.ndarray, model_times: np.ndarray, final_time: float = 0.0) -> SampleTimes:
    """Return times: the steps' starts, followed by a last time whose model time is 0."""

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
    r"""Return times with distances $1 - t$ to noise scaled such that the last time is `terminal_time`.

    A single step starts at noise and keeps its time. None keeps all times (LTX-Video, arXiv 2501.00103;
    `shift_terminal` of diffusers).
    """
    if terminal_time is None or times[-1] == 1:
        return times
    return 1 - (1 - times) * (1 - terminal_time) / (1 - times[-1])
