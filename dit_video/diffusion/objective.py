"""Training objectives: what the network predicts (data, noise, velocity, …), and how its loss is weighted over time."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dit_video.core.errors import UserError
from dit_video.diffusion.processes import MIN_ALPHA, Edm, Estimate, Process, RectifiedFlow, Times, Values
from dit_video.diffusion.shift import ClipSize
from dit_video.diffusion.time_distributions import LogitNormal, TimeDistribution, Uniform

DenoiseFn = Callable[[Values, Times, Any], tuple[Values, Any]]
"""The function `denoise(noisy, time, state) -> (prediction, state)`: the only interface between diffusion and a model.

The state is a tree of arrays that a sampler carries from step to step unread: the momentum of guidance, or a model's
cache. It is None for a model without state; `stateless` makes such a function from `predict(noisy, time)`."""

Estimator = Callable[[Values, Times], Estimate]
"""The function `estimate(noisy, time)`, which gives solvers the data and noise that a model's prediction determines."""

QuantileFn = Callable[[Values, float], Values]
"""The function `compute_quantile(values, quantile)`: a quantile of each sample's values, which broadcasts to them."""


class Coefficients(NamedTuple):
    """The coefficients of a prediction `data * x_0 + noise * epsilon`."""

    data: Float[Array, "*time"]
    noise: Float[Array, "*time"]


class Prediction(ABC):
    """A linear combination of the data and the noise that a model predicts."""

    @abstractmethod
    def coefficients(self, process: Process, time: Times) -> Coefficients:
        """Return the coefficients at a time of a process."""

    def check(self, process: Process) -> None:  # noqa: B027 (most have nothing to check)
        """Check that a model of this process can make this prediction.

        Raises:
          UserError: If a model of this process can't make this prediction.
        """

    def target(self, process: Process, data: Values, noise: Values, time: Times) -> Values:
        """Return the value that the model should predict."""
        coefficients = self.coefficients(process, time)
        return coefficients.data * data + coefficients.noise * noise

    def with_quantile(self, compute_quantile: QuantileFn) -> "Prediction":
        """Return the prediction for arrays whose samples `compute_quantile` tells apart.

        This only matters to predictions that depend on the distribution of a sample's values, such as
        `ThresholdedPrediction`.
        """
        return self

    def extract_values(self, predicted: Float[Array, "*batch o"]) -> Float[Array, "*batch p"]:
        """Return the part of a model's output that is compared with the target."""
        return predicted

    def compute_other_loss(
        self,
        process: Process,
        data: Float[Array, "*batch p"],
        noisy: Float[Array, "*batch p"],
        predicted: Float[Array, "*batch o"],
        time: Float[Array, "*batch 1"],
    ) -> Float[Array, "*batch"] | None:
        """Return the loss of the other part of a model's output; None if there is no other part."""
        return None

    def data_error_scale(self, process: Process, time: Times) -> Float[Array, "*time"]:
        """Return the size of the error in the data that corresponds to an error of 1 in the prediction."""
        return jnp.abs(process.sigma(time) / self.determinant(process, time))

    def estimate(self, process: Process, noisy: Values, prediction: Values, time: Times) -> Estimate:
        """Return the data and the noise that a prediction determines."""
        coefficients, determinant = self.coefficients(process, time), self.determinant(process, time)
        return Estimate(
            (process.sigma(time) * prediction - coefficients.noise * noisy) / determinant,
            (coefficients.data * noisy - process.alpha(time) * prediction) / determinant,
        )

    def determinant(self, process: Process, time: Times) -> Float[Array, "*time"]:
        """Return (data coefficient) * sigma - (noise coefficient) * alpha, bounded away from 0."""
        coefficients = self.coefficients(process, time)
        value = coefficients.data * process.sigma(time) - coefficients.noise * process.alpha(time)
        return jnp.where(jnp.abs(value) < MIN_ALPHA, jnp.where(value < 0, -MIN_ALPHA, MIN_ALPHA), value)


@dataclass(frozen=True, kw_only=True)
class Epsilon(Prediction):
    """The noise (arXiv 2006.11239). Pure noise does not determine the data, which are then set to 0, their mean."""

    def coefficients(self, process: Process, time: Times) -> Coefficients:
        return Coefficients(jnp.zeros_like(time), jnp.ones_like(time))

    def estimate(self, process: Process, noisy: Values, prediction: Values, time: Times) -> Estimate:
        alpha = process.alpha(time)
        data = (noisy - process.sigma(time) * prediction) / jnp.maximum(alpha, MIN_ALPHA)
        return Estimate(jnp.where(alpha < MIN_ALPHA, 0.0, data), prediction)


@dataclass(frozen=True, kw_only=True)
class X0(Prediction):
    """The data themselves. At time 0 they do not determine the noise, which is then set to 0."""

    def coefficients(self, process: Process, time: Times) -> Coefficients:
        return Coefficients(jnp.ones_like(time), jnp.zeros_like(time))

    def estimate(self, process: Process, noisy: Values, prediction: Values, time: Times) -> Estimate:
        sigma = process.sigma(time)
        noise = (noisy - process.alpha(time) * prediction) / jnp.maximum(sigma, MIN_ALPHA)
        return Estimate(prediction, jnp.where(sigma < MIN_ALPHA, 0.0, noise))


def predicts_data(prediction: Prediction) -> bool:
    """Return whether a model predicts the data themselves, whatever else: their limits, or a variance."""
    while (inner := getattr(prediction, "prediction", None)) is not None:
        prediction = inner
    return isinstance(prediction, X0)


@dataclass(frozen=True, kw_only=True)
class V(Prediction):
    r"""The prediction $v = (\alpha \epsilon - \sigma x_0) / \sqrt{\alpha^2 + \sigma^2}$ (arXiv 2202.00512).

    Its size is the same at all times. The root is 1 in the paper, whose process preserves the variance.
    """

    def coefficients(self, process: Process, time: Times) -> Coefficients:
        alpha, sigma = process.alpha(time), process.sigma(time)
        size = jnp.sqrt(alpha**2 + sigma**2)
        return Coefficients(-sigma / size, alpha / size)


@dataclass(frozen=True, kw_only=True)
class Velocity(Prediction):
    r"""The velocity $dx_t / dt = \alpha' x_0 + \sigma' \epsilon$, for rectified flow $\epsilon - x_0$ (2209.03003)."""

    def coefficients(self, process: Process, time: Times) -> Coefficients:
        return Coefficients(*process.rates(time))

    def check(self, process: Process) -> None:
        if isinstance(process, Edm):
            raise UserError(
                "prediction=Velocity() is invalid: the velocity of Edm is the noise times a large factor. Predict "
                "Epsilon, V or Preconditioning."
            )


@dataclass(frozen=True, kw_only=True)
class Preconditioning(Prediction):
    r"""The value $(x_0 - c_{skip} x_t) / c_{out}$ with unit variance for data of standard deviation $s$ (EDM).

    $c_{skip} = \alpha s^2 / (\sigma^2 + \alpha^2 s^2)$ and $c_{out} = \sigma s / \sqrt{\sigma^2 + \alpha^2 s^2}$; in
    the paper (arXiv 2206.00364, eq. 8) alpha is 1.
    """

    data_std: float = 0.5
    """Standard deviation $s$ of the data."""

    def coefficients(self, process: Process, time: Times) -> Coefficients:
        alpha, sigma = process.alpha(time), process.sigma(time)
        size = jnp.sqrt(sigma**2 + (alpha * self.data_std) ** 2)
        return Coefficients(sigma / (size * self.data_std), -alpha * self.data_std / size)


def stateless(predict: Callable[[Values, Times], Values]) -> DenoiseFn:
    """Return the `denoise` of a function `predict(noisy, time) -> prediction`."""
    return lambda noisy, time, state: (predict(noisy, time), state)


def estimate_with_state(
    denoise: DenoiseFn, process: Process, prediction: Prediction, noisy: Values, time: Times, state: Any
) -> tuple[Estimate, Any]:
    """Return the data and the noise estimated in a noisy value, and the next state of `denoise`."""
    predicted, next_state = denoise(process.input_scale(time) * noisy, time, state)
    return prediction.estimate(process, noisy, predicted.astype(noisy.dtype), time), next_state


def make_estimator(denoise: DenoiseFn, process: Process, prediction: Prediction) -> Estimator:
    """Return the function that estimates the data and the noise in a noisy value, for a `denoise` without state."""
    return lambda noisy, time: estimate_with_state(denoise, process, prediction, noisy, time, None)[0]


class Weighting(ABC):
    """A weight of the squared error at each time."""

    @abstractmethod
    def scaled_weight(self, process: Process, time: Times) -> Float[Array, "*time"]:
        """Return a prediction's weight times the square of its determinant, which is the same for all predictions."""

    def __call__(self, process: Process, prediction: Prediction, time: Times) -> Float[Array, "*time"]:
        """Return the factor of a prediction's squared error."""
        return self.scaled_weight(process, time) / jnp.square(prediction.determinant(process, time))


@dataclass(frozen=True, kw_only=True)
class UniformWeighting(Weighting):
    """Weight 1 for the prediction's error at all times, so that the choice of prediction is the weighting."""

    def scaled_weight(self, process: Process, time: Times) -> Float[Array, "*time"]:
        """Return 1, which holds for a prediction with determinant 1."""
        return jnp.ones_like(time)

    def __call__(self, process: Process, prediction: Prediction, time: Times) -> Float[Array, "*time"]:
        return jnp.ones_like(time)


@dataclass(frozen=True, kw_only=True)
class MinSnr(Weighting):
    r"""The weight $\min(\alpha^2 / \sigma^2, \gamma)$ of errors of the data (arXiv 2303.09556, section 3.4).

    Errors of the noise then have the weight $\min(1, \gamma \sigma^2 / \alpha^2)$. If $\alpha^2 + \sigma^2 = 1$, errors
    of $v$ have $\min(\alpha^2, \gamma \sigma^2)$.

    Raises:
      UserError: If gamma is not positive.
    """

    gamma: float = 5.0

    def __post_init__(self):
        if not self.gamma > 0:
            raise UserError(f"gamma={self.gamma} is invalid: it must be positive. Use 5, as in the paper.")

    def scaled_weight(self, process: Process, time: Times) -> Float[Array, "*time"]:
        return jnp.minimum(jnp.square(process.alpha(time)), self.gamma * jnp.square(process.sigma(time)))


@dataclass(frozen=True, kw_only=True)
class EdmWeight(Weighting):
    r"""The weight $(\sigma^2 + \alpha^2 s^2) / (\sigma s)^2$ of errors of the data, with $s$ their standard deviation.

    It is the weight of arXiv 2206.00364, table 1. For `Preconditioning` with the same deviation it is 1.

    Raises:
      UserError: If the standard deviation is not positive.
    """

    data_std: float = 0.5

    def __post_init__(self):
        if not self.data_std > 0:
            raise UserError(f"data_std={self.data_std} is invalid: it must be positive. Use 1 for normalised latents.")

    def scaled_weight(self, process: Process, time: Times) -> Float[Array, "*time"]:
        return jnp.square(process.sigma(time) / self.data_std) + jnp.square(process.alpha(time))


@dataclass(frozen=True, kw_only=True)
class SigmoidWeight(Weighting):
    r"""The weight $\mathrm{sigmoid}(b - 2\lambda)$ of errors of the noise (arXiv 2303.00848; 2410.19324).

    The papers' loss is the mean over uniform log-SNRs $2\lambda$. For uniform times the weight is multiplied by
    $-2 \lambda'(t)$, which is included here: use it with `Uniform` times. With
    $\lambda' = (\alpha' \sigma - \sigma' \alpha) / (\alpha \sigma)$, the scaled weight is

    $$W = \frac{2 \alpha \sigma (\sigma' \alpha - \alpha' \sigma)}{\sigma^2 + e^{-b} \alpha^2}$$

    Raises:
      UserError: If the bias is not finite.
    """

    bias: float = 0.0
    """Log-SNR below which errors count most; lower for larger images, -3 for ImageNet at 512 pixels (SiD2)."""

    def __post_init__(self):
        if not math.isfinite(self.bias):
            raise UserError(f"bias={self.bias} is invalid: it must be a finite number. Use 0.")

    def scaled_weight(self, process: Process, time: Times) -> Float[Array, "*time"]:
        alpha, sigma = process.alpha(time), process.sigma(time)
        alpha_rate, sigma_rate = process.rates(time)
        change = sigma_rate * alpha - alpha_rate * sigma
        return 2 * alpha * sigma * change / (jnp.square(sigma) + math.exp(-self.bias) * jnp.square(alpha))


@dataclass(frozen=True, kw_only=True)
class Objective:
    r"""The loss $w(t)$ times the mean square of $p_\theta(x_t, t) - p$, at times drawn from `times`.

    $p$ is the prediction's target.

    Raises:
      UserError: If a model of this process can't make this prediction.
    """

    process: Process
    prediction: Prediction
    times: TimeDistribution = field(default_factory=Uniform)
    weighting: Weighting = field(default_factory=UniformWeighting)

    def __post_init__(self):
        self.prediction.check(self.process)

    def compute_time(self, u: Float[Array, "*shape"], size: ClipSize | None = None) -> Float[Array, "*shape"]:
        """Return training times of clips from uniform numbers in [0, 1)."""
        return self.times(self.process, u, size)

    def loss(
        self,
        denoise: DenoiseFn,
        data: Float[Array, "*batch N p"],
        noise: Float[Array, "*batch N p"],
        time: Float[Array, "*batch N"],
        *,
        cond_mask: Bool[Array, "*batch N"] | None = None,
    ) -> Float[Array, "*batch N"]:
        """Return the squared error of every token, averaged over its values, in float32.

        The model gets tokens where `cond_mask` is True without noise, at time 0. They have no loss.
        """
        token_time = time[..., None]
        noisy, model_time = self.process.add_noise(data, noise, token_time), time
        if cond_mask is not None:
            noisy, model_time = jnp.where(cond_mask[..., None], data, noisy), jnp.where(cond_mask, 0, time)
        predicted, _ = denoise(self.process.input_scale(model_time[..., None]) * noisy, model_time, None)
        target = self.prediction.target(self.process, data, noise, token_time)
        error = self.prediction.extract_values(predicted) - target
        weight = self.weighting(self.process, self.prediction, time)
        loss = weight * jnp.square(error.astype(jnp.float32)).mean(axis=-1)
        other = self.prediction.compute_other_loss(self.process, data, noisy, predicted, token_time)
        loss = loss if other is None else loss + other
        return loss if cond_mask is None else jnp.where(cond_mask, 0, loss)


@dataclass(frozen=True, kw_only=True)
class FlowMatching(Objective):
    """The velocity of rectified flow (arXiv 2210.02747), at logit-normal times."""

    process: Process = field(default_factory=RectifiedFlow)
    prediction: Prediction = field(default_factory=Velocity)
    times: TimeDistribution = LogitNormal()
