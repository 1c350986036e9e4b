"""Losses of latents: how an autoencoder decodes clips in training, and what it is trained with besides their pixels."""

import abc
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Key, PyTree

from dit_video.models.autoencoders.interface import Pixels, Vae

ScalarMetrics = dict[str, Float[Array, ""]]
"""Metrics by name."""


class DecodedClips(NamedTuple):
    """Reconstructed clips of a training batch."""

    pixels: Pixels
    bottleneck: Float[Array, " B"]
    """Weighted loss of each clip's latents, which is added to that of its pixels."""
    metrics: ScalarMetrics
    """Means over the batch, which are logged."""
    auxiliary: PyTree = None
    """Values that `LatentLoss.update` learns from."""


class LearnedArrays(NamedTuple):
    """The arrays of a training that `LatentLoss.update` may change."""

    params: dict[str, Any]
    ema: dict[str, Any]
    """Moving average of the parameters."""
    extra: dict[str, Any]
    """Arrays of the loss itself, from `LatentLoss.init_extra`, which checkpoints hold too."""


class LatentLoss(abc.ABC):
    """The way an autoencoder decodes clips in training, and the loss of their latents: a frozen dataclass.

    The pixels are compared elsewhere, by an `AutoencoderObjective` and perhaps by a discriminator.
    """

    @abc.abstractmethod
    def decode(self, model: Any, pixels: Pixels, random_key: Key[Array, ""]) -> DecodedClips:
        """Encode and decode clips, and return the loss of their latents. Traced.

        Args:
          model: The autoencoder's module.
          pixels: Clips, in [-1, 1].
          random_key: Random key of the step.
        """

    def init_extra(self, params: dict[str, Any], *, is_fresh: bool) -> dict[str, Any]:
        """Return further arrays that `update` changes; by default none.

        Args:
          params: Parameters before the first step.
          is_fresh: False for parameters that were trained before.
        """
        return {}

    def update(
        self, arrays: LearnedArrays, auxiliary: PyTree, random_key: Key[Array, ""]
    ) -> tuple[LearnedArrays, ScalarMetrics]:
        """Update what is not learned by gradients, after a step's gradient update, and return metrics. Traced.

        Args:
          arrays: Arrays after the gradient update.
          auxiliary: Value of `DecodedClips` in this step.
          random_key: Random key of the step, another one than `decode` gets.
        """
        return arrays, {}


@dataclass(frozen=True, kw_only=True)
class KlLoss(LatentLoss):
    """The divergence of the posterior from a standard normal distribution; latents are samples of the posterior."""

    weight: float | Float[Array, ""]
    """Weight of the divergence, in nats per latent position."""

    def decode(self, model: Vae, pixels: Pixels, random_key: Key[Array, ""]) -> DecodedClips:
        posterior = model.posterior(pixels)
        latents = posterior.sample(jax.random.normal(random_key, posterior.mean.shape))
        kl = posterior.kl()
        return DecodedClips(model.reconstruct(latents), self.weight * kl, {"kl": kl.mean()})
