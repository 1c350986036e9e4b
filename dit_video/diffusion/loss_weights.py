r"""How much an error counts at each time: a function of the process, the prediction and the time, never of the batch.

An error $e$ of a prediction is one of $\sigma e / d$ in the data and of $\alpha e / d$ in the noise (`predictions`). So
a weight $w_x$ of squared errors of the data and a weight $w_\epsilon$ of those of the noise are one weighting if

$$w_x \sigma^2 = w_\epsilon \alpha^2 =: W$$

and of any prediction it is $W / d^2$. **A weighting is defined once, by $W$**, which is finite where the other two need
not be: what counts is an error of $d \cdot p$, the velocity of rectified flow and $v$ of a process that keeps the
variance.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.diffusion.predictions import Prediction
from dit_video.diffusion.processes.process import Process


class Weighting(ABC):
    """One of the weightings."""

    @abstractmethod
    def scaled(self, process: Process, time: Float[Array, "*time"]) -> Float[Array, "*time"]:
        """$W$ of the module's docstring."""

    def __call__(self, process: Process, prediction: Prediction, time: Float[Array, "*time"]) -> Float[Array, "*time"]:
        """What the squared error of a prediction is multiplied by."""
        return self.scaled(process, time) / jnp.square(prediction.determinant(process, time))


@dataclass(frozen=True, kw_only=True)
class AsPredicted(Weighting):
    """Uniform: an error of the prediction counts as it is, at all times, so that the prediction is the weighting."""

    def scaled(self, process: Process, time: Float[Array, "*time"]) -> Float[Array, "*time"]:
        """Of a prediction of determinant 1."""
        return jnp.ones_like(time)

    def __call__(self, process: Process, prediction: Prediction, time: Float[Array, "*time"]) -> Float[Array, "*time"]:
        return jnp.ones_like(time)


@dataclass(frozen=True, kw_only=True)
class MinSnr(Weighting):
    r"""$\min(\alpha^2 / \sigma^2, \gamma)$ of the data (arXiv 2303.09556, section 3.4).

    So of noise it is $\min(1, \gamma \sigma^2 / \alpha^2)$, and of $v$ the same times $\alpha^2$.

    Raises:
      UserError: a gamma that is not positive.
    """

    gamma: float = 5.0

    def __post_init__(self):
        if not self.gamma > 0:
            raise UserError(f"gamma={self.gamma} of min-SNR must be positive; the paper's is 5")

    def scaled(self, process: Process, time: Float[Array, "*time"]) -> Float[Array, "*time"]:
        return jnp.minimum(jnp.square(process.alpha(time)), self.gamma * jnp.square(process.sigma(time)))


@dataclass(frozen=True, kw_only=True)
class EdmWeight(Weighting):
    r"""$(\sigma^2 + \alpha^2 s^2) / (\sigma s)^2$ of the data, $s$ being their deviation (arXiv 2206.00364, table 1).

    Of `Preconditioned` with the same deviation it is 1.

    Raises:
      UserError: a deviation that is not positive.
    """

    data_std: float = 0.5

    def __post_init__(self):
        if not self.data_std > 0:
            raise UserError(f"the data's deviation {self.data_std} must be positive; of normalised latents it is 1")

    def scaled(self, process: Process, time: Float[Array, "*time"]) -> Float[Array, "*time"]:
        return jnp.square(process.sigma(time) / self.data_std) + jnp.square(process.alpha(time))


@dataclass(frozen=True, kw_only=True)
class SigmoidWeight(Weighting):
    r"""$\mathrm{sigmoid}(b - 2\lambda)$ of the noise, over the log-SNR $2\lambda$ (arXiv 2303.00848; 2410.19324).

    The papers' loss is the mean over even log-SNRs; over even times that is the weight times $-2 \lambda'(t)$, which is
    included: it is for `Uniform` times. With $\lambda' = (\alpha' \sigma - \sigma' \alpha) / (\alpha \sigma)$,

    $$W = \frac{2 \alpha \sigma (\sigma' \alpha - \alpha' \sigma)}{\sigma^2 + e^{-b} \alpha^2}$$

    Raises:
      UserError: a bias that is no number.
    """

    bias: float = 0.0
    """the log-SNR below which errors count most; lower for larger images, -3 for ImageNet at 512 pixels (SiD2)"""

    def __post_init__(self):
        if not math.isfinite(self.bias):
            raise UserError(f"bias={self.bias} of the sigmoid weighting must be a finite number")

    def scaled(self, process: Process, time: Float[Array, "*time"]) -> Float[Array, "*time"]:
        alpha, sigma = process.alpha(time), process.sigma(time)
        alpha_rate, sigma_rate = process.rates(time)
        change = sigma_rate * alpha - alpha_rate * sigma
        return 2 * alpha * sigma * change / (jnp.square(sigma) + math.exp(-self.bias) * jnp.square(alpha))
