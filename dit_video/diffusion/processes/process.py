"""What holds for every process that turns data into noise.

The package's docstring derives the equations; a process says how much of the data and of the noise there is.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.core.typing import SameArray
from dit_video.diffusion.shift import ClipSize

LEAST_ALPHA = 1e-6
"""Of pure noise the log-SNR would be infinite."""


class Estimate(NamedTuple):
    """What a model says of a noisy value: its two parts."""

    data: Float[Array, "*shape"]
    noise: Float[Array, "*shape"]
    variance: Float[Array, "*shape"] | None = None
    """where the model predicts one: how far between the posterior's two bounds, from 0 to 1, in logarithms; see
    `LearnedVariance`"""
    past: Float[Array, "*shape"] | None = None
    """where the model remembers: what it is to be given in the next step; see `Remembering`"""


class Normal(NamedTuple):
    """A normal distribution of independent values."""

    mean: Float[Array, "*shape"]
    variance: Float[Array, "*scale"]


class Path(NamedTuple):
    """In which coordinates the probability flow is solved: $d(x / scale) = slope \\; d(clock)$."""

    scale: Float[Array, "*shape"]
    clock: Float[Array, "*shape"]


class Process(ABC):
    r"""$x_t = \alpha(t)\,x_0 + \sigma(t)\,\epsilon$ for time from 0 (data) to 1 (noise).

    Times broadcast against values wherever both are given.
    """

    @abstractmethod
    def alpha(self, time: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        """How much of the data is in $x_t$."""

    @abstractmethod
    def sigma(self, time: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        """How much of the noise is in $x_t$."""

    @abstractmethod
    def time_at(self, ratio: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        r"""The time at which noise and data are in a ratio: the inverse of $\sigma / \alpha$."""

    def shifted(self, time: Float[SameArray, "*shape"], size: ClipSize | None = None) -> Float[SameArray, "*shape"]:
        """Evenly spaced times as this process wants them spaced, in training and in sampling alike.

        Where that depends on the size of a clip, `size` is that of each clip whose times they are.
        """
        return time

    def for_size(self, size: ClipSize) -> "Process":
        """The process of clips of one size."""
        return self

    def input_scale(self, time: Float[Array, "*time"]) -> Float[Array, "*time"] | float:
        """What a noisy value is multiplied by before a model is given it."""
        return 1.0

    def start(self, noise: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        """Where sampling starts, at time 1, from standard normal noise."""
        return noise

    def add_noise(
        self, data: Float[Array, "*shape"], noise: Float[Array, "*shape"], time: Float[Array, "*time"]
    ) -> Float[Array, "*shape"]:
        """$x_t$."""
        return self.alpha(time) * data + self.sigma(time) * noise

    def half_log_snr(self, time: Float[Array, "*time"]) -> Float[Array, "*time"]:
        r"""$\lambda = \log(\alpha / \sigma)$."""
        return jnp.log(jnp.maximum(self.alpha(time), LEAST_ALPHA)) - jnp.log(self.sigma(time))

    def rates(self, time: Float[Array, "*time"]) -> tuple[Float[Array, "*time"], Float[Array, "*time"]]:
        r"""$\alpha'(t)$ and $\sigma'(t)$."""
        time = jnp.asarray(time)
        one = jnp.ones_like(time)
        return jax.jvp(self.alpha, (time,), (one,))[1], jax.jvp(self.sigma, (time,), (one,))[1]

    def velocity(self, estimate: Estimate, time: Float[Array, "*time"]) -> Float[Array, "*shape"]:
        r"""$dx_t/dt = \alpha' \hat x_0 + \sigma' \hat\epsilon$ along the probability flow."""
        alpha_rate, sigma_rate = self.rates(time)
        return alpha_rate * estimate.data + sigma_rate * estimate.noise

    def score(self, noise: Float[Array, "*shape"], time: Float[Array, "*time"]) -> Float[Array, "*shape"]:
        r"""$\nabla_x \log p_t(x) = -\hat\epsilon / \sigma$."""
        return -noise / self.sigma(time)

    def drift_and_diffusion(self, time: Float[Array, "*time"]) -> tuple[Float[Array, "*time"], Float[Array, "*time"]]:
        r"""$f = \alpha' / \alpha$ and $g^2 = 2 \sigma (\sigma' - f \sigma)$ of $dx = f x\,dt + g\,dw$."""
        alpha_rate, sigma_rate = self.rates(time)
        drift = alpha_rate / jnp.maximum(self.alpha(time), LEAST_ALPHA)
        sigma = self.sigma(time)
        return drift, 2 * sigma * (sigma_rate - drift * sigma)

    def posterior(
        self,
        noisy: Float[Array, "*shape"],
        data: Float[Array, "*shape"],
        time: Float[Array, "*time"],
        following: Float[Array, "*time"],
    ) -> Normal:
        r"""$q(x_s \mid x_t, x_0)$ at a time $s$ = `following` before $t$ = `time`.

        With $\alpha_{t|s} = \alpha_t/\alpha_s$ and $\sigma^2_{t|s} = \sigma_t^2 - \alpha_{t|s}^2 \sigma_s^2$ its mean
        is $(\alpha_{t|s} \sigma_s^2\,x_t + \alpha_s \sigma^2_{t|s}\,x_0)/\sigma_t^2$ and its variance
        $\sigma^2_{t|s} \sigma_s^2 / \sigma_t^2$ (arXiv 2107.00630, appendix A).
        """
        alpha, sigma, before = self.alpha(following), self.sigma(following), self.sigma(time)
        kept, added = self.alpha(time) / alpha, self.added_variance(time, following)
        mean = (kept * sigma**2 * noisy + alpha * added * data) / before**2
        return Normal(mean, added * sigma**2 / before**2)

    def added_variance(self, time: Float[Array, "*time"], following: Float[Array, "*time"]) -> Float[Array, "*time"]:
        r"""$\sigma^2_{t|s}$ of `posterior`: of the noise that comes between `following` and `time` (DDPM's beta)."""
        kept = self.alpha(time) / self.alpha(following)
        return jnp.maximum(self.sigma(time) ** 2 - (kept * self.sigma(following)) ** 2, 0.0)

    def path(self, time: Float[Array, "*time"]) -> Path:
        r"""$x/\alpha$ moves with $\sigma/\alpha$, its slope being $\epsilon$ (arXiv 2206.00364, eq. 1)."""
        alpha = self.alpha(time)
        return Path(alpha, self.sigma(time) / alpha)

    def slope(self, estimate: Estimate) -> Float[Array, "*shape"]:
        """Of `path`."""
        return estimate.noise
