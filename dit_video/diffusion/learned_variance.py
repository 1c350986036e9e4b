r"""A model that predicts, beside the data, how certain it is of a step back (arXiv 2102.09672, section 3).

The step from $t$ to $s$ is a draw around the posterior's mean at the estimated data. Its variance lies between two
bounds: that of the posterior, $\tilde\beta$, and that of the noise which came in between, $\beta$. The model says
where: $\log v = \nu \log \beta + (1 - \nu) \log \tilde\beta$ (eq. 15), each value for itself, and $\nu$ is what
`Estimate.variance` holds. `Ddpm` draws with it.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.diffusion.predictions import Coefficients, Epsilon, Prediction
from dit_video.diffusion.processes.process import Estimate, Process


class _Step(NamedTuple):
    """What is known of a step back, in logarithms of variances."""

    following: Float[Array, "*time"]
    lower: Float[Array, "*time"]
    upper: Float[Array, "*time"]


@dataclass(frozen=True, kw_only=True)
class LearnedVariance(Prediction):
    r"""Another prediction, with the variance beside it: `[prediction, variance]` along the last axis.

    The model's values from -1 to 1 are $\nu$ from 0 to 1. The loss is the hybrid one, the prediction's and a share of
    the variational bound, whose gradient goes to the variance alone (eq. 16).

    Raises:
      UserError: a variance of a variance, less than two steps, or a negative share.
    """

    prediction: Prediction = field(default_factory=Epsilon)
    steps: int = 1000
    """in which the process goes back"""
    share: float = 0.001
    """of the bound, which is the sum over all steps, in bits for each value"""

    def __post_init__(self):
        if isinstance(self.prediction, LearnedVariance):
            raise UserError("a learned variance stands beside a prediction, not beside another learned variance")
        if self.steps < 2 or self.share < 0:
            raise UserError(
                f"a learned variance needs 2 steps or more and a share of 0 or more, not {self.steps} and {self.share}"
            )

    def coefficients(self, process: Process, time: Float[Array, "*time"]) -> Coefficients:
        return self.prediction.coefficients(process, time)

    def check(self, process: Process) -> None:
        self.prediction.check(process)

    def values(self, predicted: Float[Array, "*batch two"]) -> Float[Array, "*batch p"]:
        return jnp.split(predicted, 2, axis=-1)[0]

    def estimate(
        self,
        process: Process,
        noisy: Float[Array, "*shape"],
        prediction: Float[Array, "*batch two"],
        time: Float[Array, "*time"],
    ) -> Estimate:
        """With the variance."""
        values, variance = jnp.split(prediction, 2, axis=-1)
        return self.prediction.estimate(process, noisy, values, time)._replace(variance=(variance + 1) / 2)

    def further_loss(
        self,
        process: Process,
        data: Float[Array, "*batch p"],
        noisy: Float[Array, "*batch p"],
        predicted: Float[Array, "*batch two"],
        time: Float[Array, "*batch 1"],
    ) -> Float[Array, "*batch"]:
        r"""The share of the bound: of each step the divergence of the model's draw from the posterior, in bits.

        Of the first step it is the bits of the data, to be drawn from the model's normal. They are those of a density,
        as latents have no levels; those of pixels are $\log_2(127.5)$ more for 256 levels in [-1, 1].
        """
        values, variance = jnp.split(predicted.astype(jnp.float32), 2, axis=-1)
        found = self.estimate(process, noisy, jnp.concatenate([jax.lax.stop_gradient(values), variance], axis=-1), time)
        assert found.variance is not None
        step = self._step(process, time)
        mean = process.posterior(noisy, found.data, time, step.following).mean
        true = process.posterior(noisy, data, time, step.following)
        own = found.variance * step.upper + (1 - found.variance) * step.lower
        divergence = own - step.lower - 1 + jnp.exp(step.lower - own) + jnp.square(true.mean - mean) * jnp.exp(-own)
        surprise = own + math.log(2 * math.pi) + jnp.square(data - mean) * jnp.exp(-own)
        nats = jnp.where(step.following == 0, surprise, divergence).mean(axis=-1) / 2
        return self.share * self.steps / math.log(2) * nats

    def _step(self, process: Process, time: Float[Array, "*time"]) -> _Step:
        """From a time to the one before. As the first's posterior has no variance, its lower bound is the second's."""
        one = 1.0 / self.steps
        following = jnp.where(time < 1.5 * one, 0.0, time - one)
        at = jnp.maximum(time, 2 * one)
        lower = process.posterior(jnp.zeros_like(time), jnp.zeros_like(time), at, at - one).variance
        return _Step(following, jnp.log(lower), jnp.log(process.added_variance(time, following)))
