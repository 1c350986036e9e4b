"""Both towers of CLIP, and how alike they find a text and an image."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.features.clip.text import ClipTextConfig
from dit_video.features.clip.vision import ClipVisionConfig


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """The shapes of both towers; `weights.load_clip` reads them from a folder.

    Raises:
      UserError: towers that do not map into one space.
    """

    text: ClipTextConfig
    vision: ClipVisionConfig

    def __post_init__(self):
        if self.text.projection is None or self.text.projection != self.vision.projection:
            raise UserError(
                "the towers of a CLIP map into one space; give both the same projection, not "
                f"{self.text.projection} and {self.vision.projection}"
            )

    def make(self, rngs: nnx.Rngs) -> "ClipTowers":
        return ClipTowers(self, rngs=rngs)


class ClipTowers(nnx.Module):
    """The towers, `text` and `vision`, and the scale that they were trained with."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.text, self.vision = config.text.make(rngs), config.vision.make(rngs)
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(1 / 0.07)))

    def similarity(self, texts: Float[Array, "A P"], images: Float[Array, "B P"]) -> Float[Array, "A B"]:
        """`exp(logit_scale) cos(text, image)` of every pair of projected texts and images.

        Its softmax over texts is how probable each of them is as an image's caption.
        """
        return jnp.exp(self.logit_scale[...]) * unit(texts) @ unit(images).T


def unit(x: Float[Array, "*batch P"]) -> Float[Array, "*batch P"]:
    """`x / |x|`, in float32: products of such vectors are cosines."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
