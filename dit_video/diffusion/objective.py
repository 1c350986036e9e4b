"""What a denoiser is trained to do."""

from dataclasses import dataclass, field

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.diffusion.flow import RectifiedFlow
from dit_video.diffusion.predictions import Denoise, Prediction, Velocity
from dit_video.diffusion.process import Process
from dit_video.diffusion.times import LogitNormal, Times


@dataclass(frozen=True, kw_only=True)
class Objective:
    r"""$\lVert p_\theta(x_t, t) - p \rVert^2$ at times drawn from `times` and shifted by the process.

    Raises:
      UserError: a prediction that a model of this process can't make.
    """

    process: Process
    prediction: Prediction
    times: Times

    def __post_init__(self):
        self.prediction.check(self.process)

    def time(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Training times from uniform numbers in [0, 1)."""
        return self.process.shifted(self.times.quantile(u))

    def loss(
        self,
        denoise: Denoise,
        data: Float[Array, "*batch N p"],
        noise: Float[Array, "*batch N p"],
        time: Float[Array, "*batch N"],
    ) -> Float[Array, "*batch N"]:
        """The squared error of every token, averaged over its values."""
        at = time[..., None]
        noisy = self.process.add_noise(data, noise, at)
        predicted = denoise(self.process.input_scale(at) * noisy, time)
        error = predicted - self.prediction.target(self.process, data, noise, at)
        return jnp.square(error.astype(jnp.float32)).mean(axis=-1)


@dataclass(frozen=True, kw_only=True)
class FlowMatching(Objective):
    """The velocity of rectified flow (arXiv 2210.02747), at logit-normal times."""

    process: Process = field(default_factory=RectifiedFlow)
    prediction: Prediction = field(default_factory=Velocity)
    times: Times = LogitNormal()
