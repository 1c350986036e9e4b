"""Conditioning on a clip of low resolution with noise augmentation (arXiv 2106.15282), as a file of another package."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dit_video.core.registry import register
from dit_video.models.conditioning import ClipConditioning
from dit_video.nn import Linear
from dit_video.tokens import Field


@register
@dataclass(frozen=True, kw_only=True)
class LowResolutionClip(ClipConditioning):
    """A clip of one pixel per latent; its strength is 1 minus the standard deviation of noise that is added to it."""

    field = Field(name="low_resolution", alignment="grid", shape=(3,))

    def from_clip(self, view):
        return self.shrink(view.frames, view.latents)

    def from_request(self, value, latents):
        return self.shrink(value.frames, latents)

    def shrink(self, frames, latents):
        frames = frames[np.linspace(0, len(frames) - 1, latents.t).round().astype(int)] / 127.5 - 1
        blocks = frames.reshape(latents.t, latents.h, -1, latents.w, frames.shape[2] // latents.w, 3)
        return blocks.mean(axis=(2, 4)).astype(np.float32)

    def prepare(self, values, layout, keys, strength):
        """Add noise, at a level that is random in training and that the model gets, too."""
        level_keys, noise_keys = (jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, i) for i in (0, 1))
        level = jax.vmap(jax.vmap(jax.random.uniform))(level_keys) if strength is None else 1 - strength
        level = self.spread(level, values, layout)
        noisy = values + level * layout.sample_noise(noise_keys, values.shape[-1])
        clean_strength = None if strength is None else jnp.ones_like(strength)
        record = super().prepare(noisy, layout, keys, clean_strength)
        level = jnp.broadcast_to(level, (*values.shape[:2], 1))
        return record._replace(values=jnp.concatenate([record.values, level], axis=-1))

    def make_embedding(self, width, *, patch, dtype, partitioner, rngs):
        return Linear(3 * patch.volume + 1, width, dtype=dtype, partitioner=partitioner, rngs=rngs)
