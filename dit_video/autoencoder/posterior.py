"""What an encoder says of latents, and the scale that the rest of the system sees them in."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Posterior(NamedTuple):
    """A diagonal normal over (unnormalised) latents."""

    mean: Float[Array, "B t h w c"]
    log_variance: Float[Array, "B t h w c"]

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
