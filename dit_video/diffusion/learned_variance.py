r"""Models that also predict the variance of a sampling step (arXiv 2102.09672, section 3).

The step from $t$ to $s$ samples around the posterior's mean at the estimated data. Its variance lies between two
bounds: the variance of the posterior, $\tilde\beta$, and that of the noise added in between, $\beta$. The model
interpolates: $\log v = \nu \log \beta + (1 - \nu) \log \tilde\beta$ (eq. 15), separately for each value, where $\nu$ is
`Estimate.variance`. `Ddpm` samples with it.
"""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.diffusion.objective import Coefficients, Epsilon, Prediction, QuantileFn
from dit_video.diffusion.processes import Estimate, Process, Times, Values


class _StepBounds(NamedTuple):
    """The next time, and the logarithms of the bounds on a step's variance."""

    next_time: Times
    lower: Float[Array, "*time"]
    upper: Float[Array, "*time"]


@dataclass(frozen=True, kw_only=True)
class LearnedVariance(Prediction):
    r"""A prediction with its variance: `[prediction, variance]` along the last axis.

    The model's values from -1 to 1 map to $\nu$ from 0 to 1. The loss is the hybrid one: the loss of the prediction
    plus a multiple of the variational bound, whose gradient reaches the variance alone (eq. 16).

    Raises:
      UserError: If `prediction` is itself a `LearnedVariance`, there are fewer than two steps, or `bound_weight` is
        negative.
    """

    prediction: Prediction = field(default_factory=Epsilon)
    """The prediction besides the variance."""
    steps: int = 1000
    """Number of steps of the reverse process."""
    bound_weight: float = 0.001
    """Weight of the variational bound, which is a sum over all steps in bits per value."""

    def __post_init__(self):
        if isinstance(self.prediction, LearnedVariance):
            raise UserError("prediction=LearnedVariance(...) is invalid: it learns the variance itself. Use Epsilon().")
        if self.steps < 2 or self.bound_weight < 0:
            raise UserError(f"{self} is invalid: use 2 steps or more, and a bound_weight of 0 or more.")

    def coefficients(self, process: Process, time: Times) -> Coefficients:
        return self.prediction.coefficients(process, time)

    def check(self, process: Process) -> None:
        self.prediction.check(process)

    def with_quantile(self, compute_quantile: QuantileFn) -> Prediction:
        return replace(self, prediction=self.prediction.with_quantile(compute_quantile))

    def extract_values(self, predicted: Float[Array, "*batch two"]) -> Float[Array, "*batch p"]:
        return jnp.split(predicted, 2, axis=-1)[0]

    def estimate(
        self, process: Process, noisy: Values, prediction: Float[Array, "*batch two"], time: Times
    ) -> Estimate:
        """Return the estimate of the prediction with the variance."""
        values, variance = jnp.split(prediction, 2, axis=-1)
        return self.prediction.estimate(process, noisy, values, time)._replace(variance=(variance + 1) / 2)

    def compute_other_loss(
        self,
        process: Process,
        data: Float[Array, "*batch p"],
        noisy: Float[Array, "*batch p"],
        predicted: Float[Array, "*batch two"],
        time: Float[Array, "*batch 1"],
    ) -> Float[Array, "*batch"]:
        r"""Return the weighted bound: per step, the divergence of the model's distribution from the posterior, in bits.

        The first step instead counts the bits of the data under the model's normal distribution. These are bits of a
        density, since latents have no levels; for pixels with 256 levels in [-1, 1] add $\log_2(127.5)$.
        """
        values, variance = jnp.split(predicted.astype(jnp.float32), 2, axis=-1)
        # The bound trains the variance alone, so that the prediction keeps the time weighting of its own loss.
        fixed = jnp.concatenate([jax.lax.stop_gradient(values), variance], axis=-1)
        estimate = self.estimate(process, noisy, fixed, time)
        assert estimate.variance is not None
        step = self._compute_bounds(process, time)
        mean = process.posterior(noisy, estimate.data, time, step.next_time).mean
        posterior = process.posterior(noisy, data, time, step.next_time)
        log_variance = estimate.variance * step.upper + (1 - estimate.variance) * step.lower
        divergence = log_variance - step.lower - 1 + jnp.exp(step.lower - log_variance)
        divergence = divergence + jnp.square(posterior.mean - mean) * jnp.exp(-log_variance)
        surprise = log_variance + math.log(2 * math.pi) + jnp.square(data - mean) * jnp.exp(-log_variance)
        nats = jnp.where(step.next_time == 0, surprise, divergence).mean(axis=-1) / 2
        return self.bound_weight * self.steps / math.log(2) * nats

    def _compute_bounds(self, process: Process, time: Times) -> _StepBounds:
        """Return the step back from a time.

        The posterior of the first step has no variance, so its lower bound is taken from the second step.
        """
        length = 1.0 / self.steps
        next_time = jnp.where(time < 1.5 * length, 0.0, time - length)
        lower_time = jnp.maximum(time, 2 * length)
        lower = process.posterior(jnp.zeros_like(time), jnp.zeros_like(time), lower_time, lower_time - length).variance
        return _StepBounds(next_time, jnp.log(lower), jnp.log(process.added_variance(time, next_time)))
