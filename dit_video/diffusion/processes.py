"""Forward processes: how data and noise are mixed at a time."""

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from dit_video.core.errors import UserError, check_at_least
from dit_video.core.typing import SameArray
from dit_video.diffusion.shift import ClipSize, ExponentialShift, LinearShift

Values = Float[Array, "*shape"]
"""Data, noise or noisy values of any shape."""
Times = Float[Array, "*time"]
"""Diffusion times, which broadcast against the values."""

MIN_ALPHA = 1e-6
"""Lower bound of alpha in divisions and logarithms; alpha is 0 at pure noise."""


class Estimate(NamedTuple):
    """The data and the noise that a model estimates in a noisy value."""

    data: Values
    noise: Values
    variance: Values | None = None
    """Position of the log variance between the posterior's two bounds, from 0 to 1, for models that predict it; see
    `LearnedVariance`."""


class Normal(NamedTuple):
    """A normal distribution of independent values."""

    mean: Values
    variance: Float[Array, "*scale"]


class FlowCoordinates(NamedTuple):
    r"""The positions in which the probability flow is solved: $d(x / scale) = slope \; d(integration\_time)$."""

    scale: Float[Array, "*shape"]
    integration_time: Float[Array, "*shape"]


class Process(ABC):
    r"""A process $x_t = \alpha(t)\,x_0 + \sigma(t)\,\epsilon$ for time from 0 (data) to 1 (noise).

    Times broadcast against values in all methods that take both.
    """

    @abstractmethod
    def alpha(self, time: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        """Return the coefficient of the data in $x_t$."""

    @abstractmethod
    def sigma(self, time: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        """Return the coefficient of the noise in $x_t$."""

    @abstractmethod
    def ratio_to_time(self, ratio: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        r"""Return the time at which noise and data have this ratio: the inverse of $\sigma / \alpha$."""

    def shift_time(self, time: Float[SameArray, "*shape"], size: ClipSize | None = None) -> Float[SameArray, "*shape"]:
        """Return uniformly spaced times with this process's spacing, which training and sampling share.

        If the shift depends on the size of a clip, `size` is the size of each clip that has these times.
        """
        return time

    def specialize(self, size: ClipSize) -> "Process":
        """Return the process for clips of one size."""
        return self

    def input_scale(self, time: Times) -> Float[Array, "*time"] | float:
        """Return the factor of the noisy value in a model's input."""
        return 1.0

    def scale_initial_noise(self, noise: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        """Return the start of sampling, at time 1, from standard normal noise."""
        return noise

    def add_noise(self, data: Values, noise: Values, time: Times) -> Values:
        """Return $x_t$."""
        return self.alpha(time) * data + self.sigma(time) * noise

    def half_log_snr(self, time: Times) -> Float[Array, "*time"]:
        r"""Return $\lambda = \log(\alpha / \sigma)$."""
        return jnp.log(jnp.maximum(self.alpha(time), MIN_ALPHA)) - jnp.log(self.sigma(time))

    def rates(self, time: Times) -> tuple[Float[Array, "*time"], Float[Array, "*time"]]:
        r"""Return $\alpha'(t)$ and $\sigma'(t)$."""
        time = jnp.asarray(time)
        one = jnp.ones_like(time)
        return jax.jvp(self.alpha, (time,), (one,))[1], jax.jvp(self.sigma, (time,), (one,))[1]

    def velocity(self, estimate: Estimate, time: Times) -> Values:
        r"""Return $dx_t/dt = \alpha' \hat x_0 + \sigma' \hat\epsilon$ along the probability flow."""
        alpha_rate, sigma_rate = self.rates(time)
        return alpha_rate * estimate.data + sigma_rate * estimate.noise

    def score(self, noise: Values, time: Times) -> Values:
        r"""Return $\nabla_x \log p_t(x) = -\hat\epsilon / \sigma$."""
        return -noise / self.sigma(time)

    def posterior(self, noisy: Values, data: Values, time: Times, next_time: Times) -> Normal:
        r"""Return $q(x_s \mid x_t, x_0)$ at a time $s$ = `next_time` before $t$ = `time`.

        With $\alpha_{t|s} = \alpha_t/\alpha_s$ and $\sigma^2_{t|s} = \sigma_t^2 - \alpha_{t|s}^2 \sigma_s^2$ its mean
        is $(\alpha_{t|s} \sigma_s^2\,x_t + \alpha_s \sigma^2_{t|s}\,x_0)/\sigma_t^2$ and its variance
        $\sigma^2_{t|s} \sigma_s^2 / \sigma_t^2$ (arXiv 2107.00630, appendix A).
        """
        alpha, sigma, current_sigma = self.alpha(next_time), self.sigma(next_time), self.sigma(time)
        alpha_ratio, added_variance = self.alpha(time) / alpha, self.added_variance(time, next_time)
        mean = (alpha_ratio * sigma**2 * noisy + alpha * added_variance * data) / current_sigma**2
        return Normal(mean, added_variance * sigma**2 / current_sigma**2)

    def added_variance(self, time: Times, next_time: Times) -> Float[Array, "*time"]:
        r"""Return $\sigma^2_{t|s}$ of `posterior`: the noise added from `next_time` to `time` (DDPM's beta)."""
        alpha_ratio = self.alpha(time) / self.alpha(next_time)
        return jnp.maximum(self.sigma(time) ** 2 - (alpha_ratio * self.sigma(next_time)) ** 2, 0.0)

    def flow_coordinates(self, time: Times) -> FlowCoordinates:
        r"""Return $x/\alpha$ as a function of $\sigma/\alpha$, which has slope $\epsilon$ (arXiv 2206.00364, eq. 1)."""
        alpha = self.alpha(time)
        return FlowCoordinates(alpha, self.sigma(time) / alpha)

    def flow_slope(self, estimate: Estimate) -> Values:
        """Return the slope in the positions of `flow_coordinates`."""
        return estimate.noise

    def follow(self, x: Values, slope: Values, time: Times, next_time: Times) -> Values:
        """Return the sample at `next_time` that a constant slope of `flow_coordinates` leads to from `x` at `time`."""
        start, end = self.flow_coordinates(time), self.flow_coordinates(next_time)
        return end.scale * (x / start.scale + (end.integration_time - start.integration_time) * slope)


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow(Process):
    r"""Straight paths between data and noise (arXiv 2209.03003; 2210.02747).

    $x_t = (1 - t)\,x_0 + t\,\epsilon$ for time $t$ from 0 (data) to 1 (noise). The velocity is
    $v = dx_t/dt = \epsilon - x_0$, so that $x_0 = x_t - t\,v$ and $\epsilon = x_t + (1 - t)\,v$.

    The `shift` $s$ moves times towards noise, $t' = s t / (1 + (s - 1) t)$ (arXiv 2403.03206, eq. 23), both in training
    and in sampling.

    Raises:
      UserError: If the shift is not positive.
    """

    shift: float = 1.0
    size_shift: LinearShift | ExponentialShift | None = None
    """Factor of the shift that depends on a clip's size; each clip then has its own times."""

    def __post_init__(self):
        if not self.shift > 0:
            raise UserError(f"shift={self.shift} is invalid: it must be positive. Use 1 for unshifted times.")

    def shift_time(self, time: Float[SameArray, "*shape"], size: ClipSize | None = None) -> Float[SameArray, "*shape"]:
        """Return $t'$ of the class docstring.

        Raises:
          UserError: If the shift depends on the size, and no size is passed.
        """
        shift: Any = self.shift
        if self.size_shift is not None:
            if size is None:
                raise UserError("size=None is invalid: the shift depends on a clip's size. Use specialize(size).")
            shift = shift * self.size_shift(size)
        return shift * time / (1 + (shift - 1) * time)

    def specialize(self, size: ClipSize) -> "RectifiedFlow":
        if self.size_shift is None:
            return self
        return RectifiedFlow(shift=float(self.shift * self.size_shift(size)))

    def alpha(self, time: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        return 1 - time

    def sigma(self, time: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        return time

    def ratio_to_time(self, ratio: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        return ratio / (1 + ratio)

    def velocity(self, estimate: Estimate, time: Times) -> Values:
        return estimate.noise - estimate.data

    def flow_coordinates(self, time: Times) -> FlowCoordinates:
        """Return the flow itself: dividing by alpha, as other processes do, would divide by 0 at pure noise."""
        return FlowCoordinates(jnp.ones_like(time), time)

    def flow_slope(self, estimate: Estimate) -> Values:
        return estimate.noise - estimate.data


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
      UserError: If there are no steps, there are fewer than two with `zero_terminal_snr`, or `snr_shift` is not
        positive.
    """

    betas: BetaSchedule = LinearBetas()
    """Variances of the noise steps."""
    steps: int = 1000
    """Number of noise steps."""
    snr_shift: float = 1.0
    r"""Divisor of the signal-to-noise ratio $\alpha^2 / \sigma^2$ that the betas define; above 1 it adds noise
    (CogVideoX, arXiv 2408.06072; `snr_shift_scale` of diffusers)."""
    zero_terminal_snr: bool = False
    r"""Pure noise after the last step: the last step's $\alpha$ is subtracted from all $\alpha$, which are then scaled
    to keep the first one (arXiv 2305.08891, algorithm 1; `rescale_betas_zero_snr` of diffusers)."""

    def __post_init__(self):
        check_at_least(2 if self.zero_terminal_snr else 1, steps=self.steps)
        if not 0 < self.snr_shift < float("inf"):
            raise UserError(f"snr_shift={self.snr_shift} is invalid: it must be positive. Use 1 for that of the betas.")

    @functools.cached_property
    def log_alpha_squared(self) -> Float64[np.ndarray, " steps"]:
        r"""Return $\log \alpha^2$ after 0, 1, 2, ... steps; pure noise has that of `MIN_ALPHA`."""
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


@dataclass(frozen=True, kw_only=True)
class Edm(Process):
    r"""The variance exploding process $x_t = x_0 + \sigma(t)\,\epsilon$ with $\sigma = \sigma_{max}\,t^\rho$.

    It is the process of arXiv 2206.00364. In this time the schedule of Karras et al. (eq. 5 there) is uniform except
    for its smallest sigma, and time 0 is the data. The model's input is $x_t / \sqrt{\sigma^2 + \sigma_{data}^2}$.

    Raises:
      UserError: If a value is not positive.
    """

    sigma_max: float = 80.0
    exponent: float = 7.0
    data_std: float = 0.5
    """Standard deviation of the data; normalised latents have 1."""

    def __post_init__(self):
        if not min(self.sigma_max, self.exponent, self.data_std) > 0:
            raise UserError(f"{self} is invalid: all must be positive. Use the defaults 80, 7 and 0.5.")

    def alpha(self, time: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        return time * 0 + 1

    def sigma(self, time: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        return self.sigma_max * time**self.exponent

    def ratio_to_time(self, ratio: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        return (ratio / self.sigma_max) ** (1 / self.exponent)

    def input_scale(self, time: Times) -> Float[Array, "*time"] | float:
        return 1 / jnp.sqrt(self.sigma(time) ** 2 + self.data_std**2)

    def scale_initial_noise(self, noise: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        return self.sigma_max * noise
