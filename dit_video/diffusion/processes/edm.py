"""The process of EDM: noise is added and the data are not scaled."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.core.typing import SameArray
from dit_video.diffusion.processes.process import Process, Times


@dataclass(frozen=True, kw_only=True)
class Edm(Process):
    r"""The variance exploding process $x_t = x_0 + \sigma(t)\,\epsilon$ with $\sigma = \sigma_{max}\,t^\rho$.

    It is the process of arXiv 2206.00364. In this time the schedule of Karras et al. (eq. 5 there) is uniform except
    for its smallest sigma, and 0 is data. The model's input is $x_t / \sqrt{\sigma^2 + \sigma_{data}^2}$.

    Raises:
      UserError: If a value is not positive.
    """

    sigma_max: float = 80.0
    exponent: float = 7.0
    data_std: float = 0.5
    """Standard deviation of the data; normalised latents have 1."""

    def __post_init__(self):
        if not min(self.sigma_max, self.exponent, self.data_std) > 0:
            raise UserError(f"{self} is invalid: all must be positive. Use the defaults 80, 7 and 0.5.")

    def alpha(self, time: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        return time * 0 + 1

    def sigma(self, time: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        return self.sigma_max * time**self.exponent

    def ratio_to_time(self, ratio: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        return (ratio / self.sigma_max) ** (1 / self.exponent)

    def input_scale(self, time: Times) -> Float[Array, "*time"] | float:
        return 1 / jnp.sqrt(self.sigma(time) ** 2 + self.data_std**2)

    def scale_initial_noise(self, noise: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        return self.sigma_max * noise
