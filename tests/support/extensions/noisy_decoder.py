"""A decoder that also is the last denoising step (LTX, arXiv 2501.00103), as a file of another package."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dit_video.core.registry import register
from dit_video.models.autoencoders import PatchVaeConfig
from dit_video.models.autoencoders.patch_vae import PatchVae
from dit_video.nn import Linear


@register
@dataclass(frozen=True, kw_only=True)
class NoisyVaeConfig(PatchVaeConfig):
    """Configuration of `NoisyVae`."""

    decode_time: float = 0.05

    def make(self, rngs):
        return NoisyVae(self, rngs=rngs)


class NoisyVae(PatchVae):
    """A VAE that decodes latents with noise, of which it knows the time."""

    def __init__(self, config, *, rngs):
        super().__init__(config, rngs=rngs)
        self.time_scale = Linear(1, config.channels, init="zero", rngs=rngs)

    def decode(self, latents, cache=None, *, time=None, keys=None):
        draw = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))
        noisy = (1 - time) * latents + time * draw(keys)
        return super().decode(noisy * (1 + self.time_scale(jnp.full((1,), time))), cache)
