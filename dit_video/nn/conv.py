"""Causal convolution over (t, h, w): an output frame sees its own and earlier frames only."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.nn.linear import Init, initial


class CausalConv(nnx.Module):
    """A 3-D convolution of odd spatial kernel, zero-padded in space and padded with its first frame in the past.

    Padding with the first frame makes an image the same as a still video, so that the first frame needs no special
    case. It is computed as 2-D convolutions over the time offsets: XLA's CPU backward pass of the 3-D primitive is
    2.4 times slower, and on other backends the two are equal work.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: tuple[int, int, int],
        *,
        init: Init = "xavier",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        volume = kernel[0] * kernel[1] * kernel[2]
        shape = (*kernel, channels_in, channels_out)
        fan = (volume * channels_in, volume * channels_out)
        self.kernel = nnx.Param(initial(init, rngs.params(), shape, fan=fan))
        self.bias = nnx.Param(jnp.zeros((channels_out,), jnp.float32))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B t h w i"]) -> Float[Array, "B t h w o"]:
        kernel = self.kernel[...].astype(self.dtype)
        x = x.astype(self.dtype)
        length = x.shape[1]
        past = jnp.repeat(x[:, :1], kernel.shape[0] - 1, axis=1)
        padded = jnp.concatenate([past, x], axis=1) if kernel.shape[0] > 1 else x
        convolve = _pointwise if kernel.shape[1:3] == (1, 1) else _spatial
        y = sum(convolve(padded[:, offset : offset + length], kernel[offset]) for offset in range(kernel.shape[0]))
        return y + self.bias[...].astype(self.dtype)


def _spatial(x: Float[Array, "B t h w i"], kernel: Float[Array, "kh kw i o"]) -> Float[Array, "B t h w o"]:
    batch, length = x.shape[:2]
    flat = x.reshape(batch * length, *x.shape[2:])
    y = jax.lax.conv_general_dilated(flat, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y.reshape(batch, length, *y.shape[1:])


def _pointwise(x: Float[Array, "B t h w i"], kernel: Float[Array, "1 1 i o"]) -> Float[Array, "B t h w o"]:
    return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[-1])
