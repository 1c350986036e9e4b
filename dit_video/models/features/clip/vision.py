"""The vision tower of CLIP (arXiv 2103.00020): a ViT (arXiv 2010.11929) with an extra norm before its layers."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.features.clip.layers import ClipFeatures, ClipLayer, ClipTowerConfig, LayerStates, make_projection
from dit_video.nn import LayerNorm, apply_stack, make_stack


@dataclass(frozen=True, kw_only=True)
class ClipVisionConfig(ClipTowerConfig):
    """Configuration of a vision tower; `weights.load_clip_vision` reads one from a folder.

    Raises:
      UserError: patches that do not divide the image.
    """

    size: int = 224
    """Pixels per side of an image."""
    patch: int = 32
    """Pixels per side of a patch."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, size=self.size, patch=self.patch)
        if self.size % self.patch:
            raise UserError(f"size={self.size} is invalid: must be divisible by patch={self.patch}. Change one")

    @property
    def tokens(self) -> int:
        """Return the tokens of an image: the class token, and one per patch."""
        return 1 + (self.size // self.patch) ** 2

    def make(self, rngs: nnx.Rngs) -> "ClipVision":
        return ClipVision(self, rngs=rngs)


class ClipVision(nnx.Module):
    """A vision tower of images of one size to features; `preprocess_frames` makes such images of frames."""

    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs):
        width, patch = config.width, config.patch
        self.config = config
        shape = (patch, patch, 3, width)
        self.patch_kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.whole = nnx.Param(width**-0.5 * jax.random.normal(rngs.params(), (width,)))
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.tokens, width)))
        self.norm_in = LayerNorm(width, eps=config.eps)
        self.blocks = make_stack(lambda r: ClipLayer(config, rngs=r), config.layers, rngs=rngs)
        self.norm_pooled = LayerNorm(width, eps=config.eps)
        self.projection = make_projection(config, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W 3"]) -> ClipFeatures:
        """Return the features of images that were preprocessed as in the tower's training.

        Raises:
          UserError: images of another size than the tower's.
        """
        size, patch = self.config.size, self.config.patch
        if images.shape[1:3] != (size, size):
            raise UserError(
                f"images of {images.shape[1]}x{images.shape[2]} are invalid: CLIP's vision tower reads {size}x{size}. "
                "Prepare them with ClipImageProcessor"
            )
        dtype = jnp.dtype(self.config.dtype)
        patches = rearrange(images.astype(dtype), "B (h p) (w q) C -> B (h w) (p q C)", p=patch, q=patch)
        patches = patches @ self.patch_kernel[...].astype(dtype).reshape(-1, self.config.width)
        class_token = jnp.broadcast_to(self.whole[...], (len(images), 1, self.config.width))
        x = self.norm_in(jnp.concatenate([class_token, patches.astype(jnp.float32)], axis=1) + self.position[...])
        states = apply_stack(self.blocks, LayerStates(hidden=x, penultimate=x), None)
        pooled = self.norm_pooled(states.hidden[:, 0])
        projected = None if self.projection is None else self.projection(pooled)
        return ClipFeatures(states.hidden, states.penultimate, pooled, projected)
