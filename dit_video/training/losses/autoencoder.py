"""The loss of a variational autoencoder."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dit_video.core.rng import key
from dit_video.models.autoencoders import AutoencoderObjective
from dit_video.training.optim.optimizer import OptimizerConfig, freeze
from dit_video.training.step import LossDetails, LossOutput

ScalarMetrics = dict[str, Float[Array, ""]]


class DecodedClips(NamedTuple):
    """Reconstructed clips of a training batch."""

    pixels: Float[Array, "B T H W 3"]
    bottleneck: Float[Array, " B"]
    """Weighted regularization loss of each clip's latents."""
    metrics: ScalarMetrics
    auxiliary: Any = None
    """Values that the step uses after the update; see `LossOutput`."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderLoss:
    """Reconstruction loss plus the KL divergence of the latents from a standard normal distribution."""

    graph: nnx.GraphDef
    objective: AutoencoderObjective
    seed: int
    perceptual_net: nnx.GraphDef | None = None
    """Graph of the LPIPS network, whose parameters are an argument of each call; None if LPIPS is not used."""
    optimizer: OptimizerConfig | None = None
    """Optimizer whose untrained parameters get no gradients; None if all parameters are trained."""

    def __call__(
        self, params, clips: UInt8[Array, "B T H W 3"], step: Array, perceptual_params: Any = None
    ) -> LossOutput:
        """Return the mean loss over the clips, its terms as metrics, and the auxiliary output of `decode`.

        Args:
          params: Parameters of the autoencoder.
          clips: Batch of clips.
          step: Training step, from which random numbers are derived.
          perceptual_params: Parameters of LPIPS if the objective uses it.
        """
        pixels = self.to_pixels(clips)
        decoded = self.decode(params, pixels, step)
        value, metrics = self.compare(decoded.pixels, pixels, perceptual_params)
        metrics = decoded.metrics | metrics
        details = LossDetails(metrics, auxiliary=decoded.auxiliary)
        return LossOutput((value + decoded.bottleneck).mean(), details)

    @staticmethod
    def to_pixels(clips: UInt8[Array, "B T H W 3"]) -> Float[Array, "B T H W 3"]:
        """Map uint8 values 0..255 to [-1, 1]."""
        return clips.astype(jnp.float32) / 127.5 - 1

    def decode(self, params, pixels: Float[Array, "B T H W 3"], step: Array) -> DecodedClips:
        """Encode and decode clips, with latents sampled from their posterior."""
        model = nnx.merge(self.graph, self.freeze_untrained(params))
        posterior = model.posterior(pixels)
        random_key = jax.random.fold_in(key(self.seed, "latents"), step)
        latents = posterior.sample(jax.random.normal(random_key, posterior.mean.shape))
        kl = posterior.kl()
        return DecodedClips(model.reconstruct(latents), self.objective.kl * kl, {"kl": kl.mean()})

    def freeze_untrained(self, params):
        """Return the parameters with gradients stopped at those that are not trained."""
        return params if self.optimizer is None else freeze(self.optimizer, params)

    def compare(
        self, decoded: Float[Array, "B T H W 3"], pixels: Float[Array, "B T H W 3"], perceptual_params: Any = None
    ) -> tuple[Float[Array, " B"], ScalarMetrics]:
        """Return the objective of each clip, and the means of its terms as metrics."""
        perceptual_distance = None if self.perceptual_net is None else nnx.merge(self.perceptual_net, perceptual_params)
        value, terms = self.objective.compare(decoded, pixels, perceptual_distance)
        mse = jnp.square(decoded - pixels).mean(axis=(1, 2, 3, 4)).mean()
        term_means = {name: term.mean() for name, term in terms.items() if name != "squared"}
        return value, {"mse": mse, "psnr": -10 * jnp.log10(mse / 4), **term_means}
