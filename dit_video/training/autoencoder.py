"""The loss of a variational autoencoder."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dit_video.rng import key


@dataclass(frozen=True, kw_only=True)
class AutoencoderLoss:
    """Mean absolute and squared error of pixels, and the divergence of the latents from a standard normal."""

    graph: nnx.GraphDef
    kl: float
    """weight of the divergence, in nats a latent position"""
    seed: int

    def __call__(
        self, params, clips: UInt8[Array, "B T H W 3"], step: Array
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        pixels = clips.astype(jnp.float32) / 127.5 - 1
        model = nnx.merge(self.graph, params)
        posterior = model.posterior(pixels)
        random = jax.random.fold_in(key(self.seed, "latents"), step)
        error = model.reconstruct(posterior.sample(jax.random.normal(random, posterior.mean.shape))) - pixels
        squared, absolute = jnp.square(error).mean(axis=(1, 2, 3, 4)), jnp.abs(error).mean(axis=(1, 2, 3, 4))
        kl = posterior.kl()
        loss = (squared + 0.1 * absolute + self.kl * kl).mean()
        return loss, {"mse": squared.mean(), "kl": kl.mean(), "psnr": -10 * jnp.log10(squared.mean() / 4)}
