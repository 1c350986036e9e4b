"""The vision tower of CLIP (arXiv 2103.00020), a ViT (arXiv 2010.11929) with a norm before its layers too."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.features.clip.layers import ClipLayer, ClipTower, States, make_projection
from dit_video.nn import LayerNorm, apply_stack, make_stack


@dataclass(frozen=True, kw_only=True)
class ClipVisionConfig(ClipTower):
    """The shape of a vision tower; `weights.load_clip_vision` reads one from a folder.

    Raises:
      UserError: patches that do not divide the image.
    """

    size: int = 224
    """pixels of each side of an image"""
    patch: int = 32
    """pixels of each side of a patch"""

    def __post_init__(self):
        super().__post_init__()
        self.check_sizes("size", "patch")
        if self.size % self.patch:
            raise UserError(f"images of {self.size} pixels a side are not whole patches of {self.patch}; change one")

    @property
    def tokens(self) -> int:
        """Of an image: one for the whole, and one for each patch."""
        return 1 + (self.size // self.patch) ** 2

    def make(self, rngs: nnx.Rngs) -> "ClipVision":
        return ClipVision(self, rngs=rngs)


class VisionFeatures(NamedTuple):
    """What the vision tower makes of images; of the tokens, the first is the whole image's."""

    values: Float[Array, "B S E"]
    """of every token, after all layers, without a norm"""
    before: Float[Array, "B S E"]
    """the penultimate hidden states: what the last layer was given. The image tokens of Wan's image-to-video."""
    pooled: Float[Array, "B E"]
    """the first of `values`, after a norm"""
    projected: Float[Array, "B P"] | None
    """`pooled` in the space that texts share; None where the tower has no map into it"""


class ClipVision(nnx.Module):
    """Images of one size to features; `ClipImages` makes such images of frames."""

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

    def __call__(self, images: Float[Array, "B H W 3"]) -> VisionFeatures:
        """Features of images whose colours are scaled as the tower was trained.

        Raises:
          UserError: images of another size than the tower's.
        """
        size, patch = self.config.size, self.config.patch
        if images.shape[1:3] != (size, size):
            raise UserError(
                f"CLIP's vision tower reads images of {size}x{size}, not {images.shape[1]}x{images.shape[2]}; prepare "
                "them with ClipImages"
            )
        dtype = jnp.dtype(self.config.dtype)
        patches = rearrange(images.astype(dtype), "B (h p) (w q) C -> B (h w) (p q C)", p=patch, q=patch)
        patches = patches @ self.patch_kernel[...].astype(dtype).reshape(-1, self.config.width)
        whole = jnp.broadcast_to(self.whole[...], (len(images), 1, self.config.width))
        x = self.norm_in(jnp.concatenate([whole, patches.astype(jnp.float32)], axis=1) + self.position[...])
        states = apply_stack(self.blocks, States(last=x, before=x), None)
        pooled = self.norm_pooled(states.last[:, 0])
        projected = None if self.projection is None else self.projection(pooled)
        return VisionFeatures(states.last, states.before, pooled, projected)
