"""VideoMAE v2's ViT-g, the network of the content-debiased Fréchet video distance (arXiv 2303.16727 and 2404.12391).

It was fine-tuned on Something-Something v2. The reference implementation is content-debiased-fvd; its features are the
normalised means over tokens, before the class layer.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Float32

from dit_video.core.errors import UserError
from dit_video.models.features.vit import VitBlock, check_sizes
from dit_video.nn import AttentionInputs, LayerNorm, Linear, apply_stack, make_stack

_PERIOD = 10_000
_MARGIN = 0.1
"""Number that the reference adds to the length in tokens before dividing by the training length."""


@dataclass(frozen=True, kw_only=True)
class VideoMaeConfig:
    """Configuration of VideoMAE; the default is the published ViT-g.

    Raises:
      UserError: If a size is below 1, the heads do not divide the width, or patches do not divide the clip.
    """

    width: int = 1408
    layers: int = 40
    heads: int = 16
    mlp_width: int = 6144
    side: int = 224
    """Height and width of the frames in pixels."""
    patch: int = 14
    """Height and width of a patch in pixels."""
    frames: int = 16
    """Frames of a training clip, which the positions are made for."""
    patch_frames: int = 2
    """Frames of a patch."""
    eps: float = 1e-6
    """Epsilon of layer norms."""

    def __post_init__(self):
        check_sizes(self, ("width", "heads"), ("side", "patch"), ("frames", "patch_frames"))

    @property
    def grid(self) -> tuple[int, int, int]:
        """Return the tokens of a training clip along (t, h, w)."""
        return self.frames // self.patch_frames, self.side // self.patch, self.side // self.patch

    def make(self, rngs: nnx.Rngs) -> "VideoMae":
        return VideoMae(self, rngs=rngs)


class VideoMaeBlock(VitBlock):
    """A block whose keys have no bias."""

    def __init__(self, config: VideoMaeConfig, *, rngs: nnx.Rngs):
        super().__init__(config, bias=False, rngs=rngs)
        self.query_bias, self.value_bias = (nnx.Param(jnp.zeros((config.width,), jnp.float32)) for _ in range(2))

    def project(self, x: Float[Array, "B N D"]) -> Float[Array, "B N E"]:
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        return jnp.concatenate([q + self.query_bias[...], k, v + self.value_bias[...]], axis=-1)


class VideoMae(nnx.Module):
    """The features of the content-debiased Fréchet video distance: means over tokens, normalised.

    Args:
      config: Sizes.
      rngs: Random keys of the initial parameters, which are to be replaced by loaded ones.
    """

    def __init__(self, config: VideoMaeConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Linear(config.patch_frames * config.patch**2 * 3, config.width, rngs=rngs)
        self.blocks = make_stack(lambda r: VideoMaeBlock(config, rngs=r), config.layers, rngs=rngs)
        self.norm = LayerNorm(config.width, eps=config.eps)

    def __call__(self, pixels: Float[Array, "B T H W 3"]) -> Float[Array, "B D"]:
        """Return the features of clips in [-1, 1]; `resize_frames` makes their size, without keeping their shape.

        Clips may be shorter or longer than training clips: positions are then interpolated in time, as in the
        reference.

        Raises:
          UserError: If the height or width differs, or patches do not divide the frames.
        """
        config, (frames, *size) = self.config, pixels.shape[1:4]
        if size != [config.side, config.side] or frames % config.patch_frames:
            rule = f"VideoMAE reads {config.side}x{config.side} pixels and a multiple of {config.patch_frames} frames"
            raise UserError(f"clips of {frames} frames of {size[0]}x{size[1]} are invalid: {rule}. Resize or cut them")
        pattern = "B (t r) (h p) (w q) C -> B (t h w) (r p q C)"
        patches = rearrange((pixels + 1) / 2, pattern, r=config.patch_frames, p=config.patch, q=config.patch)
        x = self.embed(patches) + make_position_table(config, frames // config.patch_frames)
        inputs = AttentionInputs.self_attention(jnp.ones(x.shape[:2], jnp.int32), segment_count=1)
        return self.norm(apply_stack(self.blocks, x, inputs).mean(axis=1))


def make_position_table(config: VideoMaeConfig, length: int) -> Float32[np.ndarray, "N D"]:
    """Return the sinusoids that are added to the tokens of clips of `length` tokens in time.

    Token `n` of a training clip, counted over all three axes, has sin(n / 10000^(2i/D)) in the channel 2i and the
    cosine in the next one (arXiv 1706.03762, section 3.5). For other lengths these are interpolated linearly in time.
    """
    steps, rows, columns = config.grid
    channels = np.arange(config.width)
    angles = np.arange(steps * rows * columns)[:, None] / _PERIOD ** (2 * (channels // 2) / config.width)
    table = np.where(channels % 2, np.cos(angles), np.sin(angles)).astype(np.float32)
    if length == steps:
        return table
    # The reference's interpolation divides by this ratio, not by the ratio of the two lengths.
    ratio = (length + _MARGIN) / steps
    times = np.clip((np.arange(length) + 0.5) / ratio - 0.5, 0, steps - 1)
    weights = np.maximum(0, 1 - np.abs(times[:, None] - np.arange(steps))).astype(np.float32)
    return (weights @ table.reshape(steps, -1)).reshape(-1, config.width)
