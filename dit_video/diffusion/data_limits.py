r"""Predictions whose estimated data are limited to the range of data, for every solver.

Guidance and the model's errors at noisy times push the estimated data beyond the range of real data. The estimate can
be limited to that range value by value (arXiv 2006.11239, the authors' code), or relative to the sample's own largest
values (arXiv 2205.11487, section 2.3). Both serve models of pixels, whose range is known; the range of latents rarely
is.
"""

from abc import abstractmethod
from dataclasses import dataclass, field, replace

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.diffusion.learned_variance import LearnedVariance
from dit_video.diffusion.objective import Coefficients, Epsilon, Prediction, QuantileFn
from dit_video.diffusion.processes import MIN_ALPHA, Estimate, Process, Times, Values


@dataclass(frozen=True, kw_only=True)
class _LimitedPrediction(Prediction):
    """A prediction whose estimated data are limited.

    Raises:
      UserError: If `prediction` is a `LearnedVariance`.
    """

    prediction: Prediction = field(default_factory=Epsilon)
    """The prediction of the model."""
    recompute_noise: bool = False
    """Recomputes the noise so that the noisy value still consists of data and noise, instead of keeping the model's
    noise. This matters to solvers that use both; DDPM and DPM-Solver++ use the data alone."""

    def __post_init__(self):
        if isinstance(self.prediction, LearnedVariance):
            name = type(self).__name__
            raise UserError(
                f"prediction={self.prediction} is invalid: a variance is learned besides limited data. Use "
                f"LearnedVariance(prediction={name}(prediction=...))."
            )

    def coefficients(self, process: Process, time: Times) -> Coefficients:
        return self.prediction.coefficients(process, time)

    def check(self, process: Process) -> None:
        self.prediction.check(process)

    def estimate(self, process: Process, noisy: Values, prediction: Values, time: Times) -> Estimate:
        """Return the limited data, and the noise."""
        estimate = self.prediction.estimate(process, noisy, prediction, time)
        data = self.limit(estimate.data)
        if not self.recompute_noise:
            return estimate._replace(data=data)
        sigma = process.sigma(time)
        noise = (noisy - process.alpha(time) * data) / jnp.maximum(sigma, MIN_ALPHA)
        return estimate._replace(data=data, noise=jnp.where(sigma < MIN_ALPHA, estimate.noise, noise))

    @abstractmethod
    def limit(self, data: Values) -> Values:
        """Return data within the limits."""


@dataclass(frozen=True, kw_only=True)
class ClippedPrediction(_LimitedPrediction):
    """A prediction whose estimated data are clipped: `clip_sample` of diffusers.

    Raises:
      UserError: If `max_value` is not positive, or `prediction` is a `LearnedVariance`.
    """

    max_value: float = 1.0
    """Largest absolute value of the data."""

    def __post_init__(self):
        super().__post_init__()
        if not self.max_value > 0:
            raise UserError(f"max_value={self.max_value} is invalid: it must be positive. Use 1 for pixels in [-1, 1].")

    def limit(self, data: Values) -> Values:
        return jnp.clip(data, -self.max_value, self.max_value)


@dataclass(frozen=True, kw_only=True)
class ThresholdedPrediction(_LimitedPrediction):
    """A prediction with dynamic thresholding: `thresholding` of diffusers (arXiv 2205.11487, section 2.3).

    The threshold is the quantile of a sample's absolute values, within 1 and `max_threshold`. The data are clipped to
    it and divided by it, so that they lie in [-1, 1].

    Raises:
      UserError: If `quantile` is not in (0, 1], `max_threshold` is below 1, or `prediction` is a `LearnedVariance`.
    """

    quantile: float = 0.995
    """Quantile of the absolute values of a sample."""
    max_threshold: float = 1.0
    """Upper bound of the threshold; with 1 the data are clipped to [-1, 1]."""
    compute_quantile: QuantileFn | None = None
    """Function that computes each sample's quantile; None if the first axis enumerates the samples. The sampler of
    packed rows, in which a row holds several samples, sets it (`with_quantile`)."""

    def __post_init__(self):
        super().__post_init__()
        if not (0 < self.quantile <= 1 and self.max_threshold >= 1):
            raise UserError(
                f"quantile={self.quantile}, max_threshold={self.max_threshold} is invalid: a quantile is in (0, 1] and "
                "the threshold at least 1. Use quantile=0.995, max_threshold=1.5."
            )

    def with_quantile(self, compute_quantile: QuantileFn) -> Prediction:
        return replace(self, compute_quantile=compute_quantile)

    def limit(self, data: Values) -> Values:
        compute_quantile = self.compute_quantile or _compute_quantile_per_sample
        threshold = jnp.clip(compute_quantile(jnp.abs(data), self.quantile), 1.0, self.max_threshold)
        return jnp.clip(data, -threshold, threshold) / threshold


def _compute_quantile_per_sample(values: Float[Array, "B *shape"], quantile: float) -> Float[Array, "B *ones"]:
    """Return the quantile over all axes but the first, interpolated linearly."""
    return jnp.quantile(values, quantile, axis=tuple(range(1, values.ndim)), keepdims=True)
