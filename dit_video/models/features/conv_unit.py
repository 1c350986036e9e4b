"""Layers of the networks that classify images and videos: convolutions with fixed batch statistics, and pools."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dit_video.nn.cpu.winograd import winograd_conv
from dit_video.nn.linear import init_weights

Padding = Literal["SAME", "VALID"] | tuple[tuple[int, int], ...]
"""Padding along (t, h, w): TensorFlow's, in which the side after the values has an odd one, or numbers per side."""
Extent = tuple[int, int, int]
"""Numbers along (t, h, w)."""
_MIN_WINOGRAD_CHANNELS, _MIN_WINOGRAD_PIXELS = 64, 784
"""Channels, of all frames of a kernel together, and pixels of a frame from which on Winograd is faster on CPU.

Measured with C3D: it takes 1.2 times as much time of the cores if its convolutions of 14×14 pixels have the form too.
"""


class ConvUnit(nnx.Module):
    """A convolution over (t, h, w), batch normalisation with the statistics of its training, and ReLU.

    Args:
      channels_in, channels_out: channels.
      kernel: size of the kernel.
      stride: step of the kernel.
      padding: padding with zeros.
      eps: number that is added to the variance; None for a bias instead of the normalisation.
      relu: False leaves out the ReLU.
      rngs: random keys of the initial parameters, which are to be replaced by loaded ones.
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

    With a kernel of one position it is a product of matrices. On CPU it is one of frames, whose channels are those of
    all frames that the kernel spans: XLA takes up to four times as long for a convolution in three dimensions.
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
