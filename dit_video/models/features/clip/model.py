"""CLIP with both towers, and the similarity of texts and images."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.models.features.clip.text import ClipTextConfig
from dit_video.models.features.clip.vision import ClipVisionConfig


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Configuration of both towers; `weights.load_clip` reads it from a folder.

    Raises:
      UserError: towers that do not project into one space.
    """

    text: ClipTextConfig
    vision: ClipVisionConfig

    def __post_init__(self):
        if self.text.projection is None or self.text.projection != self.vision.projection:
            raise UserError(
                f"text.projection={self.text.projection}, vision.projection={self.vision.projection} is invalid: both "
                "towers project into one space. Give both the same projection"
            )

    def make(self, rngs: nnx.Rngs) -> "ClipTowers":
        return ClipTowers(self, rngs=rngs)


class ClipTowers(nnx.Module):
    """A CLIP model: the towers `text` and `vision`, and the scale of their similarity."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.text, self.vision = config.text.make(rngs), config.vision.make(rngs)
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(1 / 0.07)))

    def similarity(self, texts: Float[Array, "A P"], images: Float[Array, "B P"]) -> Float[Array, "A B"]:
        """Return `exp(logit_scale) cos(text, image)` of every pair of projected texts and images.

        Its softmax over texts is the probability of each text as the image's caption.
        """
        return jnp.exp(self.logit_scale[...]) * l2_normalize(texts) @ l2_normalize(images).T


def l2_normalize(x: Float[Array, "*batch P"]) -> Float[Array, "*batch P"]:
    """Return `x / |x|` in float32, so that products of such vectors are cosines."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
