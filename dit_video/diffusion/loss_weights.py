r"""Loss weightings over time: functions of the process, the prediction and the time, never of the batch.

An error $e$ of a prediction is an error of $\sigma e / d$ in the data and of $\alpha e / d$ in the noise
(`predictions`). So a weight $w_x$ of squared errors of the data and a weight $w_\epsilon$ of those of the noise are
equivalent if

$$w_x \sigma^2 = w_\epsilon \alpha^2 =: W$$

and the weight of any prediction is $W / d^2$. **A weighting is defined once, by $W$**, which is finite where the other
two may not be. It weighs errors of $d \cdot p$: of the velocity of rectified flow, and of $v$ for a process that
preserves the variance.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.diffusion.predictions import Prediction
from dit_video.diffusion.processes.process import Process, Times


class Weighting(ABC):
    """A weight of the squared error at each time."""

    @abstractmethod
    def scaled_weight(self, process: Process, time: Times) -> Float[Array, "*time"]:
        """Return $W$ of the module docstring."""

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

    The weight of errors of the noise is then $\min(1, \gamma \sigma^2 / \alpha^2)$, and that of $v$ is $\alpha^2$ times
    this.

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

    The papers' loss is the mean over uniform log-SNRs $2\lambda$. Over uniform times that is the weight times
    $-2 \lambda'(t)$, which is included: use it with `Uniform` times. With
    $\lambda' = (\alpha' \sigma - \sigma' \alpha) / (\alpha \sigma)$,

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
