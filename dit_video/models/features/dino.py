"""DINO's vision transformer (arXiv 2104.14294), whose features of frames VBench compares.

The reference is `vision_transformer.py` of facebookresearch/dino.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.core.resize import make_bicubic_matrix
from dit_video.models.features.vit import VitBlock, check_sizes
from dit_video.nn import AttentionInputs, LayerNorm, Linear, apply_stack, make_stack

_MARGIN = 0.1
"""Number that the reference adds to the sides in patches before dividing by those of training."""


@dataclass(frozen=True, kw_only=True)
class DinoConfig:
    """Configuration of DINO's transformer; the default is ViT-B/16.

    Raises:
      UserError: If a size is below 1, the heads do not divide the width, or patches do not divide the side.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    side: int = 224
    """Height and width of training images in pixels, which the positions are made for."""
    patch: int = 16
    """Height and width of a patch in pixels."""
    eps: float = 1e-6
    """Epsilon of layer norms."""

    def __post_init__(self):
        check_sizes(self, ("width", "heads"), ("side", "patch"))

    @property
    def grid(self) -> int:
        """Return the number of patches along a side of a training image."""
        return self.side // self.patch

    def make(self, rngs: nnx.Rngs) -> "Dino":
        return Dino(self, rngs=rngs)


class Dino(nnx.Module):
    """The transformer, from images to the normalised output of the class token.

    Args:
      config: Sizes.
      rngs: Random keys of the initial parameters, which are to be replaced by loaded ones.
    """

    def __init__(self, config: DinoConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Linear(config.patch**2 * 3, config.width, rngs=rngs)
        self.whole = nnx.Param(jnp.zeros((config.width,), jnp.float32))
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1 + config.grid**2, config.width)))
        self.blocks = make_stack(lambda r: VitBlock(config, rngs=r), config.layers, rngs=rngs)
        self.norm = LayerNorm(config.width, eps=config.eps)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """Return the features of images of any size from one patch on; pixels beyond the last whole patch do not count.

        Raises:
          UserError: If the images are smaller than a patch.
        """
        config, (rows, columns) = self.config, (side // self.config.patch for side in images.shape[1:3])
        if not rows or not columns:
            raise UserError(
                f"images of {images.shape[1:3]} pixels are invalid: a patch has {config.patch}. Enlarge them"
            )
        images = images[:, : rows * config.patch, : columns * config.patch]
        x = self.embed(rearrange(images, "B (h p) (w q) C -> B (h w) (p q C)", p=config.patch, q=config.patch))
        whole = jnp.broadcast_to(self.whole[...] + self.position[0], (len(x), 1, config.width))
        x = jnp.concatenate([whole, x + self._interpolate_positions(rows, columns)], axis=1)
        inputs = AttentionInputs.self_attention(jnp.ones(x.shape[:2], jnp.int32), segment_count=1)
        return self.norm(apply_stack(self.blocks, x, inputs)[:, 0])

    def _interpolate_positions(self, rows: int, columns: int) -> Float[Array, "N D"]:
        """Return the positions of patches, interpolated as in the reference for another grid than in training."""
        grid, table = self.config.grid, self.position[1:]
        if rows == columns == grid:
            return table
        table = table.reshape(grid, grid, -1)
        table = jnp.einsum("gh,hwd->gwd", make_bicubic_matrix(grid, rows, (rows + _MARGIN) / grid), table)
        table = jnp.einsum("vw,gwd->gvd", make_bicubic_matrix(grid, columns, (columns + _MARGIN) / grid), table)
        return table.reshape(rows * columns, -1)
