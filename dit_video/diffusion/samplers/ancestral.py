r"""One-step solvers that add fresh noise.

All of them move the estimated data and a part of the estimated noise to the next time $s$, and add fresh noise of
variance $v$:

$$x_s = \alpha_s \hat x_0 + \sqrt{\sigma_s^2 - v}\,\hat\epsilon + \sqrt v\,z, \qquad z \sim N(0, 1)$$

If $v$ is the variance of the posterior (`Process.posterior`), this is a step of DDPM; in terms of $x / \alpha$ it is
the Euler ancestral step of k-diffusion. With $v = \sigma_s^2$ it is the sampler of consistency models.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from dit_video.core.errors import UserError
from dit_video.diffusion.predictions import Estimator
from dit_video.diffusion.processes.process import Process, Values
from dit_video.diffusion.samplers.solvers import OneStepSolver, SolverState, StepInterval

_MIN_VARIANCE = 1e-20
"""Lower bound of variances before their logarithm is taken."""


@dataclass(frozen=True, kw_only=True)
class Ddim(OneStepSolver):
    """DDIM; the fresh noise has `eta` times the standard deviation of the posterior (arXiv 2010.02502, eq. 12, 16).

    With `eta` 0 it is Euler's method, with 1 ancestral sampling. A larger eta adds more noise than DDPM; it is limited
    to the noise level at $s$, where all noise is fresh.

    Raises:
      UserError: If eta is negative.
    """

    eta: float = 0.0

    def __post_init__(self):
        if not 0 <= self.eta < float("inf"):
            raise UserError(f"eta={self.eta} is invalid: must be finite and >= 0. Use 0 for no noise, 1 for DDPM's.")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(self, estimate: Estimator, process: Process, state: SolverState, interval: StepInterval) -> SolverState:
        """Take the step described in the module docstring."""
        prediction = estimate(state.x, interval.time)
        if not self.stochastic:
            return SolverState(process.add_noise(prediction.data, prediction.noise, interval.next_time))
        sigma = process.sigma(interval.next_time)
        variance = process.posterior(state.x, prediction.data, interval.time, interval.next_time).variance
        fresh = jnp.minimum(self.eta * jnp.sqrt(variance), sigma)
        remaining = jnp.sqrt(jnp.maximum(sigma**2 - fresh**2, 0.0))
        alpha = process.alpha(interval.next_time)
        return SolverState(alpha * prediction.data + remaining * prediction.noise + fresh * _get_noise(interval))


@dataclass(frozen=True, kw_only=True)
class Ddpm(OneStepSolver):
    """A sample from the posterior at the estimated data (arXiv 2006.11239, algorithm 2).

    Its variance is the posterior's (`small`, exact if the data are a single point), or that of the noise added between
    the two times (`large`, exact if the data are standard normal). A model that predicts the variance interpolates
    between the two in logarithms (arXiv 2102.09672, eq. 15). The last step, to the data, adds no noise.
    """

    variance: Literal["small", "large"] = "small"

    @property
    def stochastic(self) -> bool:
        return True

    def step(self, estimate: Estimator, process: Process, state: SolverState, interval: StepInterval) -> SolverState:
        """Take the step described in the module docstring."""
        time, next_time, _ = interval
        prediction = estimate(state.x, time)
        mean, small = process.posterior(state.x, prediction.data, time, next_time)
        large = process.added_variance(time, next_time)
        if prediction.variance is not None:
            low, high = (jnp.log(jnp.maximum(bound, _MIN_VARIANCE)) for bound in (small, large))
            variance = jnp.exp(prediction.variance * high + (1 - prediction.variance) * low)
        else:
            variance = small if self.variance == "small" else large
        return SolverState(mean + jnp.where(next_time == 0, 0.0, jnp.sqrt(variance)) * _get_noise(interval))


@dataclass(frozen=True, kw_only=True)
class Lcm(OneStepSolver):
    r"""The sampler of a consistency model: jumps to the data, then returns to the next time with fresh noise only.

    The data are $c_{skip} x + c_{out} \hat x_0$ with $c_{skip} = d^2 / (u^2 + d^2)$ and
    $c_{out} = u / \sqrt{u^2 + d^2}$, where $d$ is `data_std` and $u$ is `scaling` times the time, so that at time 0
    they are $x$ itself (arXiv 2303.01469, algorithm 1; 2310.04378, algorithm 3). With `scaling` None they are
    $\hat x_0$, as for a distilled flow (`stochastic_sampling` of diffusers). For a model that was not distilled it is a
    poor sampler.

    Raises:
      UserError: If `scaling` or `data_std` is not positive.
    """

    scaling: float | None = 10_000.0
    data_std: float = 0.5

    def __post_init__(self):
        if not min(1 if self.scaling is None else self.scaling, self.data_std) > 0:
            raise UserError(f"{self} is invalid: both must be positive. Use the defaults 10000 and 0.5.")

    @property
    def stochastic(self) -> bool:
        return True

    def step(self, estimate: Estimator, process: Process, state: SolverState, interval: StepInterval) -> SolverState:
        """Estimate the data and add fresh noise for the next time."""
        data = estimate(state.x, interval.time).data
        if self.scaling is not None:
            scaled = self.scaling * interval.time
            size = scaled**2 + self.data_std**2
            data = self.data_std**2 / size * state.x + scaled / jnp.sqrt(size) * data
        return SolverState(process.add_noise(data, _get_noise(interval), interval.next_time))


def _get_noise(interval: StepInterval) -> Values:
    assert interval.noise is not None, "the sampling loop passes noise to stochastic solvers"
    return interval.noise
