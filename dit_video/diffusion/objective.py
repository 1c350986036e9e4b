"""Training objectives of denoisers."""

from dataclasses import dataclass, field

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dit_video.diffusion.loss_weights import UniformWeighting, Weighting
from dit_video.diffusion.predictions import DenoiseFn, Prediction, Velocity
from dit_video.diffusion.processes.process import Process
from dit_video.diffusion.processes.rectified_flow import RectifiedFlow
from dit_video.diffusion.shift import ClipSize
from dit_video.diffusion.time_distributions import LogitNormal, TimeDistribution, Uniform


@dataclass(frozen=True, kw_only=True)
class Objective:
    r"""The loss $w(t) \lVert p_\theta(x_t, t) - p \rVert^2$ at times drawn from `times`.

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

        The model gets the tokens of `cond_mask` unchanged, at time 0; they have no loss, whatever their time.
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
        auxiliary = self.prediction.auxiliary_loss(self.process, data, noisy, predicted, token_time)
        loss = loss if auxiliary is None else loss + auxiliary
        return loss if cond_mask is None else jnp.where(cond_mask, 0, loss)


@dataclass(frozen=True, kw_only=True)
class FlowMatching(Objective):
    """The velocity of rectified flow (arXiv 2210.02747), at logit-normal times."""

    process: Process = field(default_factory=RectifiedFlow)
    prediction: Prediction = field(default_factory=Velocity)
    times: TimeDistribution = LogitNormal()
