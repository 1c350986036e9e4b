"""What a denoiser is trained to do."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.diffusion.process import RectifiedFlow
from dit_video.diffusion.times import LogitNormal, Times

Denoise = Callable[[Float[Array, "*shape"], Float[Array, "*time"]], Float[Array, "*shape"]]
"""`denoise(noisy, time) -> prediction`: all that diffusion knows of a model."""


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    r"""$\lVert v_\theta(x_t, t) - (\epsilon - x_0) \rVert^2$ at times drawn from `times` and shifted by the process."""

    process: RectifiedFlow = RectifiedFlow()
    times: Times = LogitNormal()

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
        noisy = self.process.add_noise(data, noise, time[..., None])
        error = denoise(noisy, time) - self.process.target(data, noise)
        return jnp.square(error.astype(jnp.float32)).mean(axis=-1)
