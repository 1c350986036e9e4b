"""Convolutional networks for evaluation: their common layers, then Inception v3, I3D and C3D."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.nn import Linear
from dit_video.nn.cpu.convolution import winograd_conv
from dit_video.nn.layers import init_weights
from dit_video.tokens import Grid


def resize_frames(
    pixels: Float[Array, "*B T H W 3"], *, height: int, width: int, has_aligned_corners: bool = False
) -> Float[Array, "*B T {height} {width} 3"]:
    """Resize frames linearly between the four nearest pixels.

    Args:
      pixels: Frames.
      height, width: Their new size in pixels.
      has_aligned_corners: True to map the centres of the corners' pixels to each other; False for the corners of the
        frame.
    """
    axes, lengths, sides = (pixels.ndim - 3, pixels.ndim - 2), np.array(pixels.shape[-3:-1]), np.array([height, width])
    scale = (sides - 1) / np.maximum(1, lengths - 1) if has_aligned_corners else sides / lengths
    translation = (1 - scale) / 2 if has_aligned_corners else np.zeros(2)
    shape = (*pixels.shape[:-3], height, width, 3)
    return jax.image.scale_and_translate(
        pixels, shape, axes, jnp.float32(scale), jnp.float32(translation), "linear", antialias=False
    )


Padding = Literal["SAME", "VALID"] | tuple[tuple[int, int], ...]
"""Padding along (t, h, w): TensorFlow's, which puts an odd one after the values, or numbers per side."""
Extent = tuple[int, int, int]
"""Numbers along (t, h, w)."""
_MIN_WINOGRAD_CHANNELS, _MIN_WINOGRAD_PIXELS = 64, 784
"""Channels, over all frames of a kernel, and pixels of a frame from which Winograd is faster on CPU.

Measured with C3D: it takes 1.2 times as much core time if its convolutions of 14×14 pixels also have the form.
"""


class ConvUnit(nnx.Module):
    """A convolution over (t, h, w), batch normalisation with the statistics of its training, and ReLU.

    Args:
      channels_in, channels_out: Channels.
      kernel: Size of the kernel.
      stride: Step of the kernel.
      padding: Padding with zeros.
      eps: Number that is added to the variance; None for a bias instead of the normalisation.
      relu: False leaves out the ReLU.
      rngs: Random keys of the initial parameters, which are to be replaced by loaded ones.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: Extent,
        *,
        stride: Extent = (1, 1, 1),
        padding: Padding = "SAME",
        eps: float | None = 1e-3,
        relu: bool = True,
        rngs: nnx.Rngs,
    ):
        shape = (*kernel, channels_in, channels_out)
        volume = int(np.prod(kernel, axis=0))
        fan = (volume * channels_in, volume * channels_out)
        self.kernel = nnx.Param(init_weights("xavier", rngs.params(), shape, fan=fan))
        self.bias = nnx.Param(jnp.zeros((channels_out,), jnp.float32))
        if eps is not None:
            self.scale, self.variance = (nnx.Param(jnp.ones((channels_out,), jnp.float32)) for _ in range(2))
            self.mean = nnx.Param(jnp.zeros((channels_out,), jnp.float32))
        self.stride, self.padding, self.eps, self.relu = stride, padding, eps, relu

    def __call__(self, x: Float[Array, "B t h w i"]) -> Float[Array, "B _ _ _ o"]:
        kernel, bias = jnp.asarray(self.kernel[...]), self.bias[...]
        if self.eps is not None:
            gain = self.scale[...] * jax.lax.rsqrt(self.variance[...] + self.eps)
            kernel, bias = kernel * gain, bias - self.mean[...] * gain
        y = convolve(x, kernel, stride=self.stride, padding=self.padding) + bias
        return jax.nn.relu(y) if self.relu else y


def convolve(
    x: Float[Array, "B t h w i"], kernel: Float[Array, "kt kh kw i o"], *, stride: Extent, padding: Padding
) -> Float[Array, "B _ _ _ o"]:
    """Return a convolution.

    With a kernel of one position it is a matrix product. On CPU it is a convolution of frames, with the channels of all
    frames in the kernel's span stacked: XLA takes up to four times as long for a three-dimensional convolution.
    """
    if kernel.shape[:3] == stride == (1, 1, 1):
        return jnp.einsum("bthwi,io->bthwo", x, kernel[0, 0, 0])
    if jax.default_backend() != "cpu":
        return jax.lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=("NTHWC", "THWIO", "NTHWC"))
    if isinstance(padding, str):
        padding = tuple(jax.lax.padtype_to_pads(x.shape[1:4], kernel.shape[:3], stride, padding))
    stacked = _stack_frames(x, kernel.shape[0], stride[0], padding[0])
    merged = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], -1, kernel.shape[-1])
    frames = stacked.reshape(-1, *stacked.shape[2:])
    y = _convolve_frames(frames, merged, stride[1:], padding[1:])
    return y.reshape(*stacked.shape[:2], *y.shape[1:])


def _stack_frames(x: Float[Array, "B t h w i"], span: int, step: int, sides: tuple[int, int]) -> Array:
    """Return, for each output frame, the channels of the `span` frames that it sees."""
    padded = jnp.pad(x, ((0, 0), sides, (0, 0), (0, 0), (0, 0)))
    last = padded.shape[1] - span
    return jnp.concatenate([padded[:, start : start + last + 1 : step] for start in range(span)], axis=-1)


def _convolve_frames(
    x: Float[Array, "n h w i"],
    kernel: Float[Array, "kh kw i o"],
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
) -> Float[Array, "n _ _ o"]:
    is_plain = kernel.shape[:2] == (3, 3) and stride == (1, 1) and padding == ((1, 1), (1, 1))
    if is_plain and x.shape[1] * x.shape[2] >= _MIN_WINOGRAD_PIXELS and min(kernel.shape[2:]) >= _MIN_WINOGRAD_CHANNELS:
        return winograd_conv(x, kernel)
    return jax.lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def pool_max(
    x: Float[Array, "B t h w D"], window: Extent, *, stride: Extent, padding: Padding = "SAME"
) -> Float[Array, "B _ _ _ D"]:
    """Return the maximum of every window, without its padding."""
    return _reduce(x, -jnp.inf, jax.lax.max, window, stride, padding)


def pool_mean(
    x: Float[Array, "B t h w D"], window: Extent, *, stride: Extent, padding: Padding = "VALID"
) -> Float[Array, "B _ _ _ D"]:
    """Return the mean of every window, without its padding."""
    ones = jnp.ones((1, *x.shape[1:4], 1), x.dtype)
    total, count = (_reduce(each, 0.0, jax.lax.add, window, stride, padding) for each in (x, ones))
    return total / count


def _reduce(
    x: Array, start: float, operation: Callable[..., Array], window: Extent, stride: Extent, padding: Padding
) -> Array:
    sides = padding if isinstance(padding, str) else ((0, 0), *padding, (0, 0))
    return jax.lax.reduce_window(x, start, operation, (1, *window, 1), (1, *stride, 1), sides)


# Inception v3

INCEPTION_CLASSES = 1008
INCEPTION_SIDE = 299
"""Height and width of its images in pixels."""
InceptionPool = Literal["mean", "max", "halve"]
"""Pool of a block: 3×3 at every position before a unit, or at every second one without a unit."""


class InceptionUnit(NamedTuple):
    """A convolution of a block."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    """1 pads the sides so that the size stays; 2 pads nothing."""


InceptionBranch = tuple[tuple[InceptionUnit, ...], ...]
"""Stages that follow each other; each has one unit, or two whose channels are concatenated."""


def _chain_branch(name: str, *units: tuple[int, tuple[int, int]], stride: int = 1) -> InceptionBranch:
    """Return a branch of numbered units; the last one has the stride."""
    last = len(units)
    return tuple(
        (InceptionUnit(f"{name}_{number}", width, kernel, stride if number == last else 1),)
        for number, (width, kernel) in enumerate(units, 1)
    )


def _make_branch(name: str, width: int, kernel: tuple[int, int] = (1, 1), stride: int = 1) -> InceptionBranch:
    return ((InceptionUnit(name, width, kernel, stride),),)


def _make_inception_a(pooled: int) -> tuple[InceptionBranch, ...]:
    return (
        _make_branch("branch1x1", 64),
        _chain_branch("branch5x5", (48, (1, 1)), (64, (5, 5))),
        _chain_branch("branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
        _make_branch("branch_pool", pooled),
    )


def _make_inception_c(width: int) -> tuple[InceptionBranch, ...]:
    tall, wide = (7, 1), (1, 7)
    double = ((width, (1, 1)), (width, tall), (width, wide), (width, tall), (192, wide))
    return (
        _make_branch("branch1x1", 192),
        _chain_branch("branch7x7", (width, (1, 1)), (width, wide), (192, tall)),
        _chain_branch("branch7x7dbl", *double),
        _make_branch("branch_pool", 192),
    )


def _make_inception_e() -> tuple[InceptionBranch, ...]:
    def split(name: str) -> tuple[InceptionUnit, InceptionUnit]:
        return InceptionUnit(f"{name}a", 384, (1, 3)), InceptionUnit(f"{name}b", 384, (3, 1))

    return (
        _make_branch("branch1x1", 320),
        (*_chain_branch("branch3x3", (384, (1, 1))), split("branch3x3_2")),
        (*_chain_branch("branch3x3dbl", (448, (1, 1)), (384, (3, 3))), split("branch3x3dbl_3")),
        _make_branch("branch_pool", 192),
    )


_INCEPTION_B = (
    _make_branch("branch3x3", 384, (3, 3), 2),
    _chain_branch("branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3)), stride=2),
)
_INCEPTION_D = (
    _chain_branch("branch3x3", (192, (1, 1)), (320, (3, 3)), stride=2),
    _chain_branch("branch7x7x3", (192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3)), stride=2),
)
INCEPTION_BLOCKS: dict[str, tuple[tuple[InceptionBranch, ...], InceptionPool]] = {
    "Mixed_5b": (_make_inception_a(32), "mean"),
    "Mixed_5c": (_make_inception_a(64), "mean"),
    "Mixed_5d": (_make_inception_a(64), "mean"),
    "Mixed_6a": (_INCEPTION_B, "halve"),
    "Mixed_6b": (_make_inception_c(128), "mean"),
    "Mixed_6c": (_make_inception_c(160), "mean"),
    "Mixed_6d": (_make_inception_c(160), "mean"),
    "Mixed_6e": (_make_inception_c(192), "mean"),
    "Mixed_7a": (_INCEPTION_D, "halve"),
    "Mixed_7b": (_make_inception_e(), "mean"),
    "Mixed_7c": (_make_inception_e(), "max"),
}
"""Branches and the pool of every block."""
INCEPTION_STEM: tuple[tuple[str, int, int, int, Padding], ...] = (
    ("Conv2d_1a_3x3", 32, 3, 2, "VALID"),
    ("Conv2d_2a_3x3", 32, 3, 1, "VALID"),
    ("Conv2d_2b_3x3", 64, 3, 1, "SAME"),
    ("Conv2d_3b_1x1", 80, 1, 1, "VALID"),
    ("Conv2d_4a_3x3", 192, 3, 1, "VALID"),
)
"""Name, channels, kernel, stride and padding of the first units."""
_INCEPTION_POOLED = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")
"""Units that a pool follows."""


class InceptionBlock(nnx.Module):
    """Branches of convolutions with concatenated channels; the last branch has a pool before it."""

    def __init__(self, channels_in: int, branches: tuple[InceptionBranch, ...], pool: InceptionPool, *, rngs: nnx.Rngs):
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
      rngs: Random keys of the initial parameters, which are to be replaced by loaded ones.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        stem, width = {}, 3
        for name, width_out, side, stride, padding in INCEPTION_STEM:
            stem[name] = ConvUnit(
                width, width_out, (1, side, side), stride=(1, stride, stride), padding=padding, rngs=rngs
            )
            width = width_out
        self.stem = nnx.Dict(stem)
        blocks = {}
        for name, (branches, pool) in INCEPTION_BLOCKS.items():
            blocks[name] = InceptionBlock(width, branches, pool, rngs=rngs)
            width = blocks[name].channels_out
        self.blocks = nnx.Dict(blocks)
        self.fc = Linear(width, INCEPTION_CLASSES, rngs=rngs)

    def __call__(self, images: Float[Array, "B 299 299 3"]) -> Float[Array, "B 2048"]:
        """Return the features of images in [-1, 1], means over positions.

        Raises:
          UserError: If the size differs from what the network reads.
        """
        if images.shape[1:3] != (INCEPTION_SIDE, INCEPTION_SIDE):
            height, width = images.shape[1:3]
            side = f"{INCEPTION_SIDE}x{INCEPTION_SIDE}"
            raise UserError(f"images of {height}x{width} are invalid: Inception-v3 reads {side}. Resize them")
        x = images[:, None]
        for name, unit in self.stem.items():
            x = unit(x)
            if name in _INCEPTION_POOLED:
                x = pool_max(x, (1, 3, 3), stride=(1, 2, 2), padding="VALID")
        for block in self.blocks.values():
            x = block(x)
        return jnp.mean(x, axis=(1, 2, 3))

    def classify(self, features: Float[Array, "B 2048"]) -> Float[Array, "B 1008"]:
        """Return the class logits without their bias, as in TensorFlow's release of the inception score."""
        return jnp.einsum("bi,io->bo", features, self.fc.kernel[...])


# I3D

I3D_CLASSES = 400
"""Classes of Kinetics-400."""
I3D_SIDE = 224
"""Height and width of its frames in pixels."""
I3D_MIN_FRAMES = 9
"""Frames of the shortest clip; time is halved three times, and its last pool has two positions."""
I3D_BLOCKS: dict[str, tuple[int, int, int, int, int, int]] = {
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
"""Channels of each mixed block's convolutions: one in the first branch, two in each of the next two, one in the
last."""
_I3D_POOLS = {"4b": ((3, 3, 3), (2, 2, 2)), "5b": ((2, 2, 2), (2, 2, 2))}
"""Windows and strides of the pools before some mixed blocks."""
_I3D_FRAME_POOL = (1, 3, 3), (1, 2, 2)


class I3dBlock(nnx.Module):
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
      rngs: Random keys of the initial parameters, which are to be replaced by loaded ones.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv_1a = ConvUnit(3, 64, (7, 7, 7), stride=(2, 2, 2), rngs=rngs)
        self.conv_2b = ConvUnit(64, 64, (1, 1, 1), rngs=rngs)
        self.conv_2c = ConvUnit(64, 192, (3, 3, 3), rngs=rngs)
        width, mixed = 192, {}
        for name, widths in I3D_BLOCKS.items():
            mixed[name] = I3dBlock(width, widths, rngs=rngs)
            width = widths[0] + widths[2] + sum(widths[4:])
        self.mixed = nnx.Dict(mixed)
        self.logits = ConvUnit(width, I3D_CLASSES, (1, 1, 1), eps=None, relu=False, rngs=rngs)

    def __call__(self, pixels: Float[Array, "B T H W 3"]) -> Float[Array, "B 400"]:
        """Return the features of clips of 224×224 pixels in [-1, 1].

        Raises:
          UserError: If the sizes differ, or there are fewer than 9 frames.
        """
        frames, *size = pixels.shape[1:4]
        if size != [I3D_SIDE, I3D_SIDE] or frames < I3D_MIN_FRAMES:
            rule = f"I3D reads {I3D_SIDE}x{I3D_SIDE} pixels and at least {I3D_MIN_FRAMES} frames"
            raise UserError(f"clips of {frames} frames of {size[0]}x{size[1]} are invalid: {rule}. Use longer clips")
        x = pool_max(self.conv_1a(pixels), _I3D_FRAME_POOL[0], stride=_I3D_FRAME_POOL[1])
        x = pool_max(self.conv_2c(self.conv_2b(x)), _I3D_FRAME_POOL[0], stride=_I3D_FRAME_POOL[1])
        for name, block in self.mixed.items():
            if name in _I3D_POOLS:
                window, stride = _I3D_POOLS[name]
                x = pool_max(x, window, stride=stride)
            x = block(x)
        x = pool_mean(x, (2, 7, 7), stride=(1, 1, 1))
        return jnp.mean(self.logits(x), axis=(1, 2, 3))


# C3D

C3D_CLASSES = 101
C3D_SIZE = Grid(16, 112, 112)
"""Frames, height and width of its clips."""
C3D_CONVOLUTIONS: dict[str, int] = {
    "conv1a": 64,
    "conv2a": 128,
    "conv3a": 256,
    "conv3b": 256,
    "conv4a": 512,
    "conv4b": 512,
    "conv5a": 512,
    "conv5b": 512,
}
"""Channels of the convolutions by their names in Caffe."""
_C3D_POOLS: dict[str, Extent] = {"conv1a": (1, 2, 2)} | dict.fromkeys(
    ("conv2a", "conv3b", "conv4b", "conv5b"), (2, 2, 2)
)
"""Windows of the pools after some convolutions."""
_C3D_HIDDEN = 4096


class C3d(nnx.Module):
    """The logits of UCF-101's classes.

    Args:
      rngs: Random keys of the initial parameters, which are to be replaced by loaded ones.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        width, convolutions = 3, {}
        for name, width_out in C3D_CONVOLUTIONS.items():
            convolutions[name] = ConvUnit(width, width_out, (3, 3, 3), eps=None, rngs=rngs)
            width = width_out
        self.convolutions = nnx.Dict(convolutions)
        self.fc6 = Linear(width * 4 * 4, _C3D_HIDDEN, rngs=rngs)
        self.fc7 = Linear(_C3D_HIDDEN, _C3D_HIDDEN, rngs=rngs)
        self.fc8 = Linear(_C3D_HIDDEN, C3D_CLASSES, rngs=rngs)
        self.mean = nnx.Param(jnp.zeros((*C3D_SIZE, 3), jnp.float32))

    def __call__(self, pixels: Float[Array, "B 16 112 112 3"]) -> Float[Array, "B 101"]:
        """Return the logits of clips in [-1, 1], red first.

        Raises:
          UserError: If the size differs from what the network reads.
        """
        size = Grid(*pixels.shape[1:4])
        if size != C3D_SIZE:
            raise UserError(f"clips of {size} are invalid: C3D reads {C3D_SIZE}. Resize them")
        x = 128 * (pixels[..., ::-1] + 1) - self.mean[...]
        for name, convolution in self.convolutions.items():
            x = convolution(x)
            if name in _C3D_POOLS:
                x = pool_max(x, _C3D_POOLS[name], stride=_C3D_POOLS[name])
        # Caffe orders values by channels, rows and columns.
        x = jnp.moveaxis(x[:, 0], -1, 1).reshape(len(x), -1)
        return self.fc8(jax.nn.relu(self.fc7(jax.nn.relu(self.fc6(x)))))
