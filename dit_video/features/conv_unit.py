"""Layers of the networks that classify images and videos: convolutions with fixed batch statistics, and pools."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dit_video.nn.linear import init_weights

Padding = Literal["SAME", "VALID"] | tuple[tuple[int, int], ...]
"""Padding along (t, h, w): TensorFlow's, in which the side after the values has an odd one, or numbers per side."""
Extent = tuple[int, int, int]
"""Numbers along (t, h, w)."""


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
    """Return a convolution; with a kernel of one position it is a product of matrices."""
    if kernel.shape[:3] == stride == (1, 1, 1):
        return jnp.einsum("bthwi,io->bthwo", x, kernel[0, 0, 0])
    return jax.lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=("NTHWC", "THWIO", "NTHWC"))


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
