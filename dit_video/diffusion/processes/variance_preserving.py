"""The process of DDPM: data and noise in proportions that preserve the variance."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from dit_video.core.errors import UserError, check_at_least
from dit_video.core.typing import SameArray
from dit_video.diffusion.processes.process import MIN_ALPHA, Process


@dataclass(frozen=True, kw_only=True)
class LinearBetas:
    """Betas with uniform steps from the first to the last (arXiv 2006.11239, section 4)."""

    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self):
        _check_ends(self.beta_start, self.beta_end)

    def __call__(self, steps: int) -> Float64[np.ndarray, " steps"]:
        """Return the betas of `steps` noise steps."""
        return np.linspace(self.beta_start, self.beta_end, steps)


@dataclass(frozen=True, kw_only=True)
class ScaledLinearBetas:
    """Betas with uniformly spaced square roots, as in Stable Diffusion (arXiv 2112.10752)."""

    beta_start: float = 0.00085
    beta_end: float = 0.012

    def __post_init__(self):
        _check_ends(self.beta_start, self.beta_end)

    def __call__(self, steps: int) -> Float64[np.ndarray, " steps"]:
        """Return the betas of `steps` noise steps."""
        return np.linspace(math.sqrt(self.beta_start), math.sqrt(self.beta_end), steps) ** 2


@dataclass(frozen=True, kw_only=True)
class CosineBetas:
    r"""Betas with $\alpha^2 \approx \cos^2\big(\frac{t + s}{1 + s}\frac\pi2\big)$ (arXiv 2102.09672, eq. 17)."""

    offset: float = 0.008
    """Offset $s$ of the cosine."""
    max_beta: float = 0.999
    """Largest beta."""

    def __call__(self, steps: int) -> Float64[np.ndarray, " steps"]:
        """Return the betas of `steps` noise steps."""
        angles = (np.arange(steps + 1) / steps + self.offset) / (1 + self.offset) * math.pi / 2
        alpha_squared = np.cos(angles) ** 2
        return np.minimum(1 - alpha_squared[1:] / alpha_squared[:-1], self.max_beta)


BetaSchedule = LinearBetas | ScaledLinearBetas | CosineBetas


def _check_ends(beta_start: float, beta_end: float) -> None:
    if not 0 < beta_start <= beta_end < 1:
        raise UserError(
            f"beta_start={beta_start}, beta_end={beta_end} is invalid: betas must rise, from above 0 to below 1. Use "
            "0 < beta_start <= beta_end < 1."
        )


@dataclass(frozen=True, kw_only=True)
class VariancePreservingProcess(Process):
    r"""DDPM's process: $\alpha^2 + \sigma^2 = 1$, and $\alpha^2 = \prod_{i \le n} (1 - \beta_i)$ after $n$ steps.

    The time after $n$ of $N$ steps is $n / N$, while DDPM's papers count from 0 and call it step $n - 1$. Between two
    steps $\log \alpha$ is interpolated linearly (arXiv 2006.11239).

    Raises:
      UserError: If there are no steps, fewer than two with `zero_terminal_snr`, or `snr_shift` is not positive.
    """

    betas: BetaSchedule = LinearBetas()
    """Variances of the noise steps."""
    steps: int = 1000
    """Number of noise steps."""
    snr_shift: float = 1.0
    r"""Divisor of the signal-to-noise ratio $\alpha^2 / \sigma^2$ that the betas define: above 1 more noise
    (CogVideoX, arXiv 2408.06072; `snr_shift_scale` of diffusers)."""
    zero_terminal_snr: bool = False
    r"""Pure noise after the last step: all $\alpha$ are moved down by that of the last step and scaled such that the
    first one is kept (arXiv 2305.08891, algorithm 1; `rescale_betas_zero_snr` of diffusers)."""

    def __post_init__(self):
        check_at_least(2 if self.zero_terminal_snr else 1, steps=self.steps)
        if not 0 < self.snr_shift < float("inf"):
            raise UserError(f"snr_shift={self.snr_shift} is invalid: it must be positive. Use 1 for that of the betas.")

    @functools.cached_property
    def log_alpha_squared(self) -> Float64[np.ndarray, " steps"]:
        r"""Return $\log \alpha^2$ after 0, 1, 2, ... steps; for pure noise that of `MIN_ALPHA`."""
        values = np.cumsum(np.log1p(-self.betas(self.steps)))
        values = values - np.log(self.snr_shift + (1 - self.snr_shift) * np.exp(values))
        if self.zero_terminal_snr:
            alphas = np.exp(values / 2)
            alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
            values = 2 * np.log(np.maximum(alphas, MIN_ALPHA))
        return np.concatenate([[0.0], values])

    def alpha(self, time: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        xp = _get_array_module(time)
        alpha = xp.exp(self._interpolate_log_alpha_squared(time) / 2)
        return xp.where(time >= 1, 0.0, alpha).astype(alpha.dtype) if self.zero_terminal_snr else alpha

    def sigma(self, time: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        xp = _get_array_module(time)
        return xp.sqrt(-xp.expm1(self._interpolate_log_alpha_squared(time)))

    def ratio_to_time(self, ratio: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        xp = _get_array_module(ratio)
        rising = -self.log_alpha_squared
        return xp.interp(xp.log1p(ratio**2), xp.asarray(rising), xp.linspace(0.0, 1.0, self.steps + 1))

    def _interpolate_log_alpha_squared(self, time: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        xp = _get_array_module(time)
        return xp.interp(time, xp.linspace(0.0, 1.0, self.steps + 1), xp.asarray(self.log_alpha_squared))


def _get_array_module(value: Array | np.ndarray) -> Any:
    return np if isinstance(value, np.ndarray) else jnp
