"""A position embedding, as a file of another package."""

from dataclasses import dataclass

import jax.numpy as jnp

from dit_video.core.registry import register
from dit_video.models.backbones.positions import PositionEmbedding


@register
@dataclass(frozen=True, kw_only=True)
class Triangles(PositionEmbedding):
    """Triangle waves of the positions, then a linear layer."""

    periods: tuple[float, ...] = (2.0, 5.0)

    @property
    def linear_features(self):
        return 3 * len(self.periods)

    def compute_features(self, positions, segments, *, count, width):
        phases = positions[..., None] / jnp.asarray(self.periods) % 1
        return jnp.abs(2 * phases - 1).reshape(*positions.shape[:-1], -1)
