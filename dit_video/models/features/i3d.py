"""I3D, the inflated Inception-v1 that Fréchet video distances are computed with (arXiv 1705.07750)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.models.features.conv_unit import ConvUnit, pool_max, pool_mean

CLASSES = 400
"""Classes of Kinetics-400."""
SIDE = 224
"""Height and width of its frames in pixels."""
MIN_FRAMES = 9
"""Frames of the shortest clip; time is halved three times, and its last pool has two positions."""
MIXED: dict[str, tuple[int, int, int, int, int, int]] = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}
"""Channels of the convolutions of each mixed block: of its first branch, twice two of the next, and of the last."""
_POOLS = {"4b": ((3, 3, 3), (2, 2, 2)), "5b": ((2, 2, 2), (2, 2, 2))}
"""Windows and strides of the pools before some mixed blocks."""
_FRAME_POOL = (1, 3, 3), (1, 2, 2)


class MixedBlock(nnx.Module):
    """Four branches whose channels are concatenated: 1×1×1, two times 3×3×3 after 1×1×1, and a pool."""

    def __init__(self, channels_in: int, widths: tuple[int, int, int, int, int, int], *, rngs: nnx.Rngs):
        one, two_in, two, three_in, three, four = widths
        self.branch0 = ConvUnit(channels_in, one, (1, 1, 1), rngs=rngs)
        self.branch1_in = ConvUnit(channels_in, two_in, (1, 1, 1), rngs=rngs)
        self.branch1 = ConvUnit(two_in, two, (3, 3, 3), rngs=rngs)
        self.branch2_in = ConvUnit(channels_in, three_in, (1, 1, 1), rngs=rngs)
        self.branch2 = ConvUnit(three_in, three, (3, 3, 3), rngs=rngs)
        self.branch3 = ConvUnit(channels_in, four, (1, 1, 1), rngs=rngs)

    def __call__(self, x: Float[Array, "B t h w i"]) -> Float[Array, "B t h w o"]:
        pooled = pool_max(x, (3, 3, 3), stride=(1, 1, 1))
        branches = (self.branch1(self.branch1_in(x)), self.branch2(self.branch2_in(x)))
        return jnp.concatenate([self.branch0(x), *branches, self.branch3(pooled)], axis=-1)


class I3d(nnx.Module):
    """The logits of Kinetics-400's classes, averaged over time: the features of the Fréchet video distance.

    Args:
      rngs: random keys of the initial parameters, which are to be replaced by loaded ones.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv_1a = ConvUnit(3, 64, (7, 7, 7), stride=(2, 2, 2), rngs=rngs)
        self.conv_2b = ConvUnit(64, 64, (1, 1, 1), rngs=rngs)
        self.conv_2c = ConvUnit(64, 192, (3, 3, 3), rngs=rngs)
        width, mixed = 192, {}
        for name, widths in MIXED.items():
            mixed[name] = MixedBlock(width, widths, rngs=rngs)
            width = widths[0] + widths[2] + sum(widths[4:])
        self.mixed = nnx.Dict(mixed)
        self.logits = ConvUnit(width, CLASSES, (1, 1, 1), eps=None, relu=False, rngs=rngs)

    def __call__(self, pixels: Float[Array, "B T H W 3"]) -> Float[Array, "B 400"]:
        """Return the features of clips of 224×224 pixels in [-1, 1].

        Raises:
          UserError: other sizes, or fewer than 9 frames.
        """
        frames, *size = pixels.shape[1:4]
        if size != [SIDE, SIDE] or frames < MIN_FRAMES:
            rule = f"I3D reads {SIDE}x{SIDE} pixels and at least {MIN_FRAMES} frames"
            raise UserError(f"clips of {frames} frames of {size[0]}x{size[1]} are invalid: {rule}. Use longer clips")
        x = pool_max(self.conv_1a(pixels), _FRAME_POOL[0], stride=_FRAME_POOL[1])
        x = pool_max(self.conv_2c(self.conv_2b(x)), _FRAME_POOL[0], stride=_FRAME_POOL[1])
        for name, block in self.mixed.items():
            if name in _POOLS:
                window, stride = _POOLS[name]
                x = pool_max(x, window, stride=stride)
            x = block(x)
        x = pool_mean(x, (2, 7, 7), stride=(1, 1, 1))
        return jnp.mean(self.logits(x), axis=(1, 2, 3))
