"""The process of EDM: noise is added, and data stay as they are."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.core.typing import SameArray
from dit_video.diffusion.processes.process import Process


@dataclass(frozen=True, kw_only=True)
class Edm(Process):
    r"""$x_t = x_0 + \sigma(t)\,\epsilon$ with $\sigma = \sigma_{max}\,t^\rho$ (variance exploding; arXiv 2206.00364).

    With this clock Karras' times, eq. 5 there, are evenly spaced but for their least sigma, and 0 is data. A model is
    given $x_t / \sqrt{\sigma^2 + \sigma_{data}^2}$.

    Raises:
      UserError: a value that is not positive.
    """

    sigma_max: float = 80.0
    exponent: float = 7.0
    data_std: float = 0.5
    """standard deviation of the data; of normalised latents it is 1"""

    def __post_init__(self):
        if not min(self.sigma_max, self.exponent, self.data_std) > 0:
            raise UserError(
                f"sigma_max, exponent and data_std are positive; got {self.sigma_max}, {self.exponent}, {self.data_std}"
            )

    def alpha(self, time: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        return time * 0 + 1

    def sigma(self, time: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        return self.sigma_max * time**self.exponent

    def time_at(self, ratio: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        return (ratio / self.sigma_max) ** (1 / self.exponent)

    def input_scale(self, time: Float[Array, "*time"]) -> Float[Array, "*time"] | float:
        return 1 / jnp.sqrt(self.sigma(time) ** 2 + self.data_std**2)

    def start(self, noise: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        return self.sigma_max * noise
