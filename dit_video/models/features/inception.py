"""Inception-v3 in the variant of the Fréchet inception distance (arXiv 1512.00567 and 1706.08500).

It has the weights of TensorFlow's release of December 2015. What differs from other versions of the network are the
classes, of which there are 1008, pools that average without their padding, and a pool in the last block that takes the
maximum. The names of the units are those of torchvision.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.models.features.conv_unit import ConvUnit, Padding, pool_max, pool_mean
from dit_video.nn import Linear

CLASSES = 1008
SIDE = 299
"""Height and width of its images in pixels."""
CHANNELS = 2048
"""Channels of the features before the classes."""
Pool = Literal["mean", "max", "halve"]
"""Pool of a block: 3×3 at every position before a unit, or at every second one without a unit."""


class Unit(NamedTuple):
    """A convolution of a block."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    """1 pads the sides so that the size stays; 2 pads nothing."""


Branch = tuple[tuple[Unit, ...], ...]
"""Stages that follow each other, each of which has one unit, or two whose channels are concatenated."""


def _chain(name: str, *units: tuple[int, tuple[int, int]], stride: int = 1) -> Branch:
    """Return a branch of numbered units, the last of which has the stride."""
    last = len(units)
    return tuple(
        (Unit(f"{name}_{number}", width, kernel, stride if number == last else 1),)
        for number, (width, kernel) in enumerate(units, 1)
    )


def _single(name: str, width: int, kernel: tuple[int, int] = (1, 1), stride: int = 1) -> Branch:
    return ((Unit(name, width, kernel, stride),),)


def _make_a(pooled: int) -> tuple[Branch, ...]:
    return (
        _single("branch1x1", 64),
        _chain("branch5x5", (48, (1, 1)), (64, (5, 5))),
        _chain("branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
        _single("branch_pool", pooled),
    )


def _make_c(width: int) -> tuple[Branch, ...]:
    tall, wide = (7, 1), (1, 7)
    double = ((width, (1, 1)), (width, tall), (width, wide), (width, tall), (192, wide))
    return (
        _single("branch1x1", 192),
        _chain("branch7x7", (width, (1, 1)), (width, wide), (192, tall)),
        _chain("branch7x7dbl", *double),
        _single("branch_pool", 192),
    )


def _make_e() -> tuple[Branch, ...]:
    def split(name: str) -> tuple[Unit, Unit]:
        return Unit(f"{name}a", 384, (1, 3)), Unit(f"{name}b", 384, (3, 1))

    return (
        _single("branch1x1", 320),
        (*_chain("branch3x3", (384, (1, 1))), split("branch3x3_2")),
        (*_chain("branch3x3dbl", (448, (1, 1)), (384, (3, 3))), split("branch3x3dbl_3")),
        _single("branch_pool", 192),
    )


_B = (
    _single("branch3x3", 384, (3, 3), 2),
    _chain("branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3)), stride=2),
)
_D = (
    _chain("branch3x3", (192, (1, 1)), (320, (3, 3)), stride=2),
    _chain("branch7x7x3", (192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3)), stride=2),
)
BLOCKS: dict[str, tuple[tuple[Branch, ...], Pool]] = {
    "Mixed_5b": (_make_a(32), "mean"),
    "Mixed_5c": (_make_a(64), "mean"),
    "Mixed_5d": (_make_a(64), "mean"),
    "Mixed_6a": (_B, "halve"),
    "Mixed_6b": (_make_c(128), "mean"),
    "Mixed_6c": (_make_c(160), "mean"),
    "Mixed_6d": (_make_c(160), "mean"),
    "Mixed_6e": (_make_c(192), "mean"),
    "Mixed_7a": (_D, "halve"),
    "Mixed_7b": (_make_e(), "mean"),
    "Mixed_7c": (_make_e(), "max"),
}
"""Branches and the pool of every block."""
STEM: tuple[tuple[str, int, int, int, Padding], ...] = (
    ("Conv2d_1a_3x3", 32, 3, 2, "VALID"),
    ("Conv2d_2a_3x3", 32, 3, 1, "VALID"),
    ("Conv2d_2b_3x3", 64, 3, 1, "SAME"),
    ("Conv2d_3b_1x1", 80, 1, 1, "VALID"),
    ("Conv2d_4a_3x3", 192, 3, 1, "VALID"),
)
"""Name, channels, kernel, stride and padding of the first units."""
_POOLED = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")
"""Units that a pool follows."""


class InceptionBlock(nnx.Module):
    """Branches of convolutions, of which the last one has a pool before it, with concatenated channels."""

    def __init__(self, channels_in: int, branches: tuple[Branch, ...], pool: Pool, *, rngs: nnx.Rngs):
        self.branches, self.pool = branches, pool
        units = {}
        for branch in branches:
            width = channels_in
            for stage in branch:
                for unit in stage:
                    units[unit.name] = ConvUnit(
                        width,
                        unit.width,
                        (1, *unit.kernel),
                        stride=(1, unit.stride, unit.stride),
                        padding="VALID" if unit.stride > 1 else "SAME",
                        rngs=rngs,
                    )
                width = sum(unit.width for unit in stage)
        self.units = nnx.Dict(units)
        pooled = channels_in if pool == "halve" else 0
        self.channels_out = pooled + sum(unit.width for branch in branches for unit in branch[-1])

    def __call__(self, x: Float[Array, "B 1 h w i"]) -> Float[Array, "B 1 _ _ o"]:
        outputs = []
        for branch in self.branches:
            y = self._pool(x) if branch[0][0].name == "branch_pool" else x
            for stage in branch:
                y = jnp.concatenate([self.units[unit.name](y) for unit in stage], axis=-1)
            outputs.append(y)
        outputs += [self._pool(x)] if self.pool == "halve" else []
        return jnp.concatenate(outputs, axis=-1)

    def _pool(self, x: Float[Array, "B 1 h w i"]) -> Float[Array, "B 1 _ _ i"]:
        if self.pool == "halve":
            return pool_max(x, (1, 3, 3), stride=(1, 2, 2), padding="VALID")
        pool = pool_mean if self.pool == "mean" else pool_max
        return pool(x, (1, 3, 3), stride=(1, 1, 1), padding="SAME")


class InceptionV3(nnx.Module):
    """The features of the Fréchet inception distance, and the logits of the inception score.

    Args:
      rngs: random keys of the initial parameters, which are to be replaced by loaded ones.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        stem, width = {}, 3
        for name, width_out, side, stride, padding in STEM:
            stem[name] = ConvUnit(
                width, width_out, (1, side, side), stride=(1, stride, stride), padding=padding, rngs=rngs
            )
            width = width_out
        self.stem = nnx.Dict(stem)
        blocks = {}
        for name, (branches, pool) in BLOCKS.items():
            blocks[name] = InceptionBlock(width, branches, pool, rngs=rngs)
            width = blocks[name].channels_out
        self.blocks = nnx.Dict(blocks)
        self.fc = Linear(width, CLASSES, rngs=rngs)

    def __call__(self, images: Float[Array, "B 299 299 3"]) -> Float[Array, "B 2048"]:
        """Return the features of images in [-1, 1], means over positions.

        Raises:
          UserError: another size.
        """
        if images.shape[1:3] != (SIDE, SIDE):
            height, width = images.shape[1:3]
            raise UserError(f"images of {height}x{width} are invalid: Inception-v3 reads {SIDE}x{SIDE}. Resize them")
        x = images[:, None]
        for name, unit in self.stem.items():
            x = unit(x)
            if name in _POOLED:
                x = pool_max(x, (1, 3, 3), stride=(1, 2, 2), padding="VALID")
        for block in self.blocks.values():
            x = block(x)
        return jnp.mean(x, axis=(1, 2, 3))

    def classify(self, features: Float[Array, "B 2048"]) -> Float[Array, "B 1008"]:
        """Return the logits of the classes, without their bias, as the inception score of TensorFlow's release."""
        return jnp.einsum("bi,io->bo", features, self.fc.kernel[...])
