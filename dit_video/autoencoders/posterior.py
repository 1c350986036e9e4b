"""What an encoder says of latents, and the scale that the rest of the system sees them in."""

import abc
import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dit_video.core.errors import UserError
from dit_video.nn import Memory

_LOG_VARIANCE = (-30.0, 20.0)
"""The bounds that the open models have."""


class Posterior(NamedTuple):
    """A diagonal normal over (unnormalised) latents."""

    mean: Float[Array, "B t h w c"]
    log_variance: Float[Array, "B t h w c"]

    @classmethod
    def of_moments(cls, moments: Float[Array, "B t h w _"], std: float | None) -> "Posterior":
        """From mean and logarithm of the variance, one after the other, and a fixed deviation if there is one."""
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        if std is not None:
            log_variance = jnp.full_like(mean, 2 * math.log(std) if std else -math.inf)
        return cls(mean, jnp.clip(log_variance, *_LOG_VARIANCE))

    def sample(self, noise: Float[Array, "B t h w c"]) -> Float[Array, "B t h w c"]:
        """Latents from standard normal noise."""
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise

    def kl(self) -> Float[Array, " B"]:
        """Divergence from the standard normal in nats, summed over channels, averaged over positions."""
        values = 0.5 * (jnp.square(self.mean) + jnp.exp(self.log_variance) - 1 - self.log_variance)
        return values.sum(axis=-1).mean(axis=(1, 2, 3))


class Normalizer(nnx.Module):
    """Mean and standard deviation of each latent channel, measured on the training set after training."""

    def __init__(self, channels: int):
        self.mean = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.std = nnx.Param(jnp.ones((channels,), jnp.float32))

    def normalize(self, latents: Float[Array, "B t h w c"]) -> Float[Array, "B t h w c"]:
        return (latents - self.mean[...]) / self.std[...]

    def restore(self, latents: Float[Array, "B t h w c"]) -> Float[Array, "B t h w c"]:
        return latents * self.std[...] + self.mean[...]


def check_std(std: float | None) -> None:
    """Refuse a deviation that is none.

    Raises:
      UserError: a negative one.
    """
    if std is not None and not 0 <= std < math.inf:
        raise UserError(f"std {std} must not be negative; None learns it")


class Vae(nnx.Module):
    """An autoencoder by its posterior: normalised latents are the posterior's mean."""

    normalizer: Normalizer

    @abc.abstractmethod
    def posterior(
        self,
        pixels: Float[Array, "B T H W 3"],
        inside: Bool[Array, "B h w"] | Int[Array, "B h w"] | None = None,
        memory: Memory | None = None,
    ) -> Posterior:
        """The distribution of latents, before normalisation. See `encode` for the arguments."""

    @abc.abstractmethod
    def reconstruct(
        self, latents: Float[Array, "B t h w c"], memory: Memory | None = None
    ) -> Float[Array, "B T H W 3"]:
        """Pixels from latents that are not normalised."""

    def encode(
        self,
        pixels: Float[Array, "B T H W 3"],
        inside: Bool[Array, "B h w"] | Int[Array, "B h w"] | None = None,
        memory: Memory | None = None,
    ) -> Float[Array, "B t h w c"]:
        """Normalised latents.

        Args:
          pixels: clips, canvases that several clips share (see `dit_video.autoencoders.canvas`), or a chunk of them:
            1 + k * temporal stride frames of a clip's start, then multiples of the temporal stride.
          inside: of a canvas, which clip each latent position belongs to; 0 is none. Clips, one position or more apart,
            do not see each other: they get the latents that they get alone.
          memory: of the chunk before.

        Raises:
          UserError: a size that does not fit the stride, or pixels that are not red, green and blue.
        """
        return self.normalizer.normalize(self.posterior(pixels, inside, memory).mean)

    def decode(self, latents: Float[Array, "B t h w c"], memory: Memory | None = None) -> Float[Array, "B T H W 3"]:
        """Pixels, about in [-1, 1], from normalised latents: of a clip, or of a chunk of one."""
        return self.reconstruct(self.normalizer.restore(latents), memory)
