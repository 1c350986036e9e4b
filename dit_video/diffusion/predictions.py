r"""What a model predicts: a sum of the data and of the noise, $p = a\,x_0 + b\,\epsilon$.

With $x_t = \alpha x_0 + \sigma \epsilon$ that gives both, for the determinant $d = a \sigma - b \alpha$:

$$x_0 = (\sigma p - b x_t) / d, \qquad \epsilon = (a x_t - \alpha p) / d$$

so any prediction becomes any other, and an error $e$ of it is one of $\sigma e / d$ in the data and of
$\alpha e / d$, of the other sign, in the noise.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.diffusion.processes.edm import Edm
from dit_video.diffusion.processes.process import LEAST_ALPHA, Estimate, Process

Denoise = Callable[[Float[Array, "*shape"], Float[Array, "*time"]], Float[Array, "*shape"]]
"""`denoise(noisy, time) -> prediction`: all that diffusion knows of a model."""

Estimator = Callable[..., Estimate]
"""`estimate(noisy, time)`: a `denoise` whose prediction was taken apart, of which solvers are made. That of a `denoise`
which remembers has the past as a third argument; see `Remembering`."""


class Coefficients(NamedTuple):
    """Of a prediction: `data * x_0 + noise * epsilon`."""

    data: Float[Array, "*time"]
    noise: Float[Array, "*time"]


class Prediction(ABC):
    """One of the sums."""

    @abstractmethod
    def coefficients(self, process: Process, time: Float[Array, "*time"]) -> Coefficients:
        """At a time of a process."""

    def check(self, process: Process) -> None:  # noqa: B027 (most have nothing to check)
        """Whether a model of this process can predict it.

        Raises:
          UserError: it can't.
        """

    def target(
        self,
        process: Process,
        data: Float[Array, "*shape"],
        noise: Float[Array, "*shape"],
        time: Float[Array, "*time"],
    ) -> Float[Array, "*shape"]:
        """What the model is to predict."""
        of = self.coefficients(process, time)
        return of.data * data + of.noise * noise

    def values(self, predicted: Float[Array, "*batch o"]) -> Float[Array, "*batch p"]:
        """What of a model's output is to be the target."""
        return predicted

    def further_loss(
        self,
        process: Process,
        data: Float[Array, "*batch p"],
        noisy: Float[Array, "*batch p"],
        predicted: Float[Array, "*batch o"],
        time: Float[Array, "*batch 1"],
    ) -> Float[Array, "*batch"] | None:
        """What of a model's output beside that is trained by, if there is more."""
        return None

    def data_error(self, process: Process, time: Float[Array, "*time"]) -> Float[Array, "*time"]:
        """How large an error of the data is that comes with an error of 1 of the prediction."""
        return jnp.abs(process.sigma(time) / self.determinant(process, time))

    def estimate(
        self,
        process: Process,
        noisy: Float[Array, "*shape"],
        prediction: Float[Array, "*shape"],
        time: Float[Array, "*time"],
    ) -> Estimate:
        """The data and the noise that a prediction stands for."""
        of, determinant = self.coefficients(process, time), self.determinant(process, time)
        return Estimate(
            (process.sigma(time) * prediction - of.noise * noisy) / determinant,
            (of.data * noisy - process.alpha(time) * prediction) / determinant,
        )

    def determinant(self, process: Process, time: Float[Array, "*time"]) -> Float[Array, "*time"]:
        """$d$ of the module's docstring, kept away from 0."""
        of = self.coefficients(process, time)
        found = of.data * process.sigma(time) - of.noise * process.alpha(time)
        return jnp.where(jnp.abs(found) < LEAST_ALPHA, jnp.where(found < 0, -LEAST_ALPHA, LEAST_ALPHA), found)


@dataclass(frozen=True, kw_only=True)
class Epsilon(Prediction):
    """The noise (arXiv 2006.11239). Of pure noise it says nothing of the data, which count as 0 there, their mean."""

    def coefficients(self, process: Process, time: Float[Array, "*time"]) -> Coefficients:
        return Coefficients(jnp.zeros_like(time), jnp.ones_like(time))

    def estimate(
        self,
        process: Process,
        noisy: Float[Array, "*shape"],
        prediction: Float[Array, "*shape"],
        time: Float[Array, "*time"],
    ) -> Estimate:
        alpha = process.alpha(time)
        data = (noisy - process.sigma(time) * prediction) / jnp.maximum(alpha, LEAST_ALPHA)
        return Estimate(jnp.where(alpha < LEAST_ALPHA, 0.0, data), prediction)


@dataclass(frozen=True, kw_only=True)
class X0(Prediction):
    """The data themselves. Of data without noise it says nothing of the noise, which counts as 0 there."""

    def coefficients(self, process: Process, time: Float[Array, "*time"]) -> Coefficients:
        return Coefficients(jnp.ones_like(time), jnp.zeros_like(time))

    def estimate(
        self,
        process: Process,
        noisy: Float[Array, "*shape"],
        prediction: Float[Array, "*shape"],
        time: Float[Array, "*time"],
    ) -> Estimate:
        sigma = process.sigma(time)
        noise = (noisy - process.alpha(time) * prediction) / jnp.maximum(sigma, LEAST_ALPHA)
        return Estimate(prediction, jnp.where(sigma < LEAST_ALPHA, 0.0, noise))


@dataclass(frozen=True, kw_only=True)
class V(Prediction):
    r"""$v = (\alpha \epsilon - \sigma x_0) / \sqrt{\alpha^2 + \sigma^2}$, of one size at all times (arXiv 2202.00512).

    There the root is 1, as the process keeps the variance.
    """

    def coefficients(self, process: Process, time: Float[Array, "*time"]) -> Coefficients:
        alpha, sigma = process.alpha(time), process.sigma(time)
        size = jnp.sqrt(alpha**2 + sigma**2)
        return Coefficients(-sigma / size, alpha / size)


@dataclass(frozen=True, kw_only=True)
class Velocity(Prediction):
    r"""$dx_t / dt = \alpha' x_0 + \sigma' \epsilon$; of rectified flow $\epsilon - x_0$ (arXiv 2209.03003)."""

    def coefficients(self, process: Process, time: Float[Array, "*time"]) -> Coefficients:
        return Coefficients(*process.rates(time))

    def check(self, process: Process) -> None:
        if isinstance(process, Edm):
            raise UserError(
                "the velocity of Edm is the noise times a large factor; predict Epsilon, V or Preconditioned"
            )


@dataclass(frozen=True, kw_only=True)
class Preconditioned(Prediction):
    r"""$(x_0 - c_{skip} x_t) / c_{out}$, of unit variance if the data's deviation is $s$ (arXiv 2206.00364, eq. 8).

    $c_{skip} = \alpha s^2 / (\sigma^2 + \alpha^2 s^2)$ and $c_{out} = \sigma s / \sqrt{\sigma^2 + \alpha^2 s^2}$;
    in the paper alpha is 1.
    """

    data_std: float = 0.5

    def coefficients(self, process: Process, time: Float[Array, "*time"]) -> Coefficients:
        alpha, sigma = process.alpha(time), process.sigma(time)
        size = jnp.sqrt(sigma**2 + (alpha * self.data_std) ** 2)
        return Coefficients(sigma / (size * self.data_std), -alpha * self.data_std / size)


def estimator(denoise: Denoise, process: Process, prediction: Prediction) -> Estimator:
    """What a model says of the data and the noise in a noisy value."""

    def estimate(noisy, time, *past):
        predicted, following = denoise(process.input_scale(time) * noisy, time, *past), None
        if past:
            predicted, following = predicted
        return prediction.estimate(process, noisy, predicted.astype(noisy.dtype), time)._replace(past=following)

    return estimate
