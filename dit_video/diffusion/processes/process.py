"""The interface of processes that turn data into noise, and everything that follows from it.

The package docstring derives the equations. A process defines the proportions of data and noise.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.core.typing import SameArray
from dit_video.diffusion.shift import ClipSize

Values = Float[Array, "*shape"]
"""Data, noise or noisy values of any shape."""
Times = Float[Array, "*time"]
"""Diffusion times, which broadcast against the values."""

MIN_ALPHA = 1e-6
"""Lower bound of alpha in divisions and logarithms; at pure noise it is 0."""


class Estimate(NamedTuple):
    """The data and the noise that a model estimates in a noisy value."""

    data: Values
    noise: Values
    variance: Values | None = None
    """Position between the posterior's two bounds, from 0 to 1, in logarithms, of models that predict it; see
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
        r"""Return the time at which noise and data have a ratio: the inverse of $\sigma / \alpha$."""

    def shift_time(self, time: Float[SameArray, "*shape"], size: ClipSize | None = None) -> Float[SameArray, "*shape"]:
        """Return uniformly spaced times with the spacing of this process, the same in training and in sampling.

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
