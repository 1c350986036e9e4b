r"""Solvers of one step that draw noise anew.

All take the estimated data and a part of the estimated noise on to the following time $s$, and fill up with fresh
noise of variance $v$:

$$x_s = \alpha_s \hat x_0 + \sqrt{\sigma_s^2 - v}\,\hat\epsilon + \sqrt v\,z, \qquad z \sim N(0, 1)$$

With $v$ the variance of the posterior (`Process.posterior`) this is a step of DDPM; in $x / \alpha$ it is the Euler
ancestral step of k-diffusion, and with $v = \sigma_s^2$ the sampler of consistency models.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.diffusion.predictions import Estimator
from dit_video.diffusion.processes.process import Process
from dit_video.diffusion.samplers.solvers import Interval, OneStep, SolverState

_LEAST_VARIANCE = 1e-20
"""What a logarithm is taken of."""


@dataclass(frozen=True, kw_only=True)
class Ddim(OneStep):
    r"""$\sqrt v$ is `eta` times the posterior's deviation: 0 is Euler, 1 ancestral (arXiv 2010.02502, eq. 12, 16).

    An eta above 1 adds more noise than DDPM does; where that would be more than there is at $s$, all of it is fresh.

    Raises:
      UserError: an eta below 0.
    """

    eta: float = 0.0

    def __post_init__(self):
        if not 0 <= self.eta < float("inf"):
            raise UserError(f"eta {self.eta} is out of range; 0 draws no noise, 1 as much as DDPM")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(self, estimate: Estimator, process: Process, state: SolverState, interval: Interval) -> SolverState:
        """The step of the module's docstring."""
        found = estimate(state.x, interval.time)
        if not self.stochastic:
            return SolverState(process.add_noise(found.data, found.noise, interval.following))
        sigma = process.sigma(interval.following)
        variance = process.posterior(state.x, found.data, interval.time, interval.following).variance
        fresh = jnp.minimum(self.eta * jnp.sqrt(variance), sigma)
        kept = jnp.sqrt(jnp.maximum(sigma**2 - fresh**2, 0.0))
        return SolverState(
            process.alpha(interval.following) * found.data + kept * found.noise + fresh * _noise(interval)
        )


@dataclass(frozen=True, kw_only=True)
class Ddpm(OneStep):
    r"""A draw from the posterior at the estimated data (arXiv 2006.11239, algorithm 2).

    Its variance is the posterior's (`small`, right where the data are one point) or that of the noise which came
    between the two times (`large`, right where the data are standard normal); or, where the model predicts it, one
    between the two in logarithms (arXiv 2102.09672, eq. 15). No noise is added in the step to the data.
    """

    variance: Literal["small", "large"] = "small"

    @property
    def stochastic(self) -> bool:
        return True

    def step(self, estimate: Estimator, process: Process, state: SolverState, interval: Interval) -> SolverState:
        """The step of the module's docstring."""
        time, following, _ = interval
        found = estimate(state.x, time)
        mean, small = process.posterior(state.x, found.data, time, following)
        large = process.added_variance(time, following)
        if found.variance is not None:
            low, high = (jnp.log(jnp.maximum(bound, _LEAST_VARIANCE)) for bound in (small, large))
            variance = jnp.exp(found.variance * high + (1 - found.variance) * low)
        else:
            variance = small if self.variance == "small" else large
        return SolverState(mean + jnp.where(following == 0, 0.0, jnp.sqrt(variance)) * _noise(interval))


@dataclass(frozen=True, kw_only=True)
class Lcm(OneStep):
    r"""Of a consistency model: to the data at once, and back to the following time with fresh noise throughout.

    The data are $c_{skip} x + c_{out} \hat x_0$ with $c_{skip} = d^2 / (u^2 + d^2)$ and
    $c_{out} = u / \sqrt{u^2 + d^2}$ for $u$ = `scaling` times the time, so that at time 0 they are $x$ itself
    (arXiv 2303.01469, algorithm 1; 2310.04378, algorithm 3). Of a model that was not distilled it is a poor sampler.

    Raises:
      UserError: a scaling or a deviation that is not positive.
    """

    scaling: float = 10_000.0
    data_std: float = 0.5

    def __post_init__(self):
        if not min(self.scaling, self.data_std) > 0:
            raise UserError(f"scaling and data_std are positive; got {self.scaling} and {self.data_std}")

    @property
    def stochastic(self) -> bool:
        return True

    def step(self, estimate: Estimator, process: Process, state: SolverState, interval: Interval) -> SolverState:
        """To the data and back."""
        scaled = self.scaling * interval.time
        size = scaled**2 + self.data_std**2
        found = estimate(state.x, interval.time).data
        data = self.data_std**2 / size * state.x + scaled / jnp.sqrt(size) * found
        return SolverState(process.add_noise(data, _noise(interval), interval.following))


def _noise(interval: Interval) -> Float[Array, "*shape"]:
    assert interval.noise is not None, "of a stochastic solver the loop sees to it"
    return interval.noise
