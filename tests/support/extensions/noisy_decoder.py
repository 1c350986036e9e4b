"""A decoder that also is the last denoising step (LTX, arXiv 2501.00103), as a file of another package."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dit_video.core.registry import register
from dit_video.models.autoencoders import DecodedClips, LatentLoss, PatchVae, PatchVaeConfig
from dit_video.nn import Linear


@register
@dataclass(frozen=True, kw_only=True)
class NoisyVaeConfig(PatchVaeConfig):
    """Configuration of `NoisyVae`."""

    decode_time: float = 0.05

    def make(self, rngs):
        return NoisyVae(self, rngs=rngs)

    def make_loss(self, objective, is_trained=lambda path: True):
        return NoisyDecoderLoss(max_time=2 * self.decode_time, weight=objective.kl)


@dataclass(frozen=True, kw_only=True)
class NoisyDecoderLoss(LatentLoss):
    """The size of the latents, which are decoded with noise of any time up to `max_time`."""

    max_time: float
    weight: float

    def decode(self, model, pixels, random_key):
        latents = model.posterior(pixels).mean
        time_key, *keys = jax.random.split(random_key, 1 + len(pixels))
        time = jax.random.uniform(time_key, maxval=self.max_time)
        decoded = model.reconstruct_noisy(latents, time, jnp.stack(keys))
        size = jnp.square(latents).mean(axis=(1, 2, 3, 4))
        return DecodedClips(decoded, self.weight * size, {"latent_size": size.mean(), "decode_time": time})


class NoisyVae(PatchVae):
    """A VAE that decodes latents with noise, of which it knows the time."""

    def __init__(self, config, *, rngs):
        super().__init__(config, rngs=rngs)
        self.time_scale = Linear(1, config.channels, init="zero", rngs=rngs)

    def decode(self, latents, cache=None, *, time=None, keys=None):
        return self.reconstruct_noisy(self.normalizer.denormalize(latents), time, keys, cache)

    def reconstruct_noisy(self, latents, time, keys, cache=None):
        noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys)
        noisy = (1 - time) * latents + time * noise
        return self.reconstruct(noisy * (1 + self.time_scale(jnp.full((1,), time))), cache)
