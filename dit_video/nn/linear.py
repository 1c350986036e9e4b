"""Linear maps on the last axis."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.nn.lora import LowRank

Init = Literal["xavier", "zero", "normal"]

Fused = Callable[[Float[Array, "i o"], int], Float[Array, "i parts n"]]
"""Takes the weights of several maps in one apart, and says where they lie on devices; no value changes."""


def initial(init: Init, key: Array, shape: tuple[int, ...], *, fan: tuple[int, int]) -> Float[Array, "..."]:
    """Initial weights: Xavier uniform over (fan in, fan out), zeros, or a normal of std 0.02."""
    match init:
        case "xavier":
            limit = (6 / sum(fan)) ** 0.5
            return jax.random.uniform(key, shape, jnp.float32, -limit, limit)
        case "normal":
            return 0.02 * jax.random.normal(key, shape, jnp.float32)
        case "zero":
            return jnp.zeros(shape, jnp.float32)


class Linear(nnx.Module):
    """`y = x W + b`, computed in `dtype`; weights are float32.

    The leading axes are flattened before the product: XLA's CPU backend runs a 2-D product up to 2.6 times faster than
    the batched form, and other backends do not care.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        bias: bool = True,
        init: Init = "xavier",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (features_in, features_out)
        self.kernel = nnx.Param(initial(init, rngs.params(), shape, fan=shape))
        self.bias = nnx.Param(jnp.zeros((features_out,), jnp.float32)) if bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        kernel = self.kernel[...]
        y = _product(None, 1, x.reshape(-1, x.shape[-1]).astype(self.dtype), kernel)
        if self.bias is not None:
            y = _sum(y, self.bias[...])
        return y.reshape(*x.shape[:-1], kernel.shape[1])

    def parts(self, x: Float[Array, "*batch i"], count: int, fused: Fused | None) -> Float[Array, "*batch {count} n"]:
        """Its outputs as those of `count` maps of equal width."""
        kernel = self.kernel[...]
        if fused is None:
            return self(x).reshape(*x.shape[:-1], count, -1)
        y = _product(fused, count, x.reshape(-1, x.shape[-1]).astype(self.dtype), kernel)
        if self.bias is not None:
            y = _sum(y, self.bias[...].reshape(count, -1))
        return y.reshape(*x.shape[:-1], count, -1)


def _product(fused: Fused | None, parts: int, x: Float[Array, "n i"], kernel: Any) -> Array:
    """`x @ kernel` in the dtype of `x`: `[n o]`, or `[n parts o/parts]` of weights that are taken apart."""
    if isinstance(kernel, LowRank):
        first = _product(fused, parts, x, kernel.kernel)
        return first + _product(fused, parts, _product(None, 1, x, kernel.a), kernel.b)
    if x.dtype != kernel.dtype:
        return _mixed(fused, parts, x, kernel)
    return _plain(fused, parts, x, kernel)


def _plain(fused: Fused | None, parts: int, x: Float[Array, "n i"], kernel: Float[Array, "i o"]) -> Array:
    return x @ kernel if fused is None else jnp.tensordot(x, fused(kernel, parts), axes=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mixed(fused: Fused | None, parts: int, x: Float[Array, "n i"], kernel: Float[Array, "i o"]) -> Array:
    """Of weights in more bits than `x`. Their gradient is summed in their own dtype, over the devices too: a cast's
    would be rounded on each device, and summed over them in the bits of `x`."""
    return _plain(fused, parts, x, kernel.astype(x.dtype))


def _mixed_forward(fused, parts, x, kernel):
    return _mixed(fused, parts, x, kernel), (x, kernel)


def _mixed_backward(fused, parts, saved, d_y):
    x, kernel = saved
    (d_x,) = jax.linear_transpose(lambda x: _plain(fused, parts, x, kernel.astype(x.dtype)), x)(d_y)
    axes = (((0,), (0,)), ((), ()))
    d_kernel = jax.lax.dot_general(x, d_y, axes, preferred_element_type=kernel.dtype)
    return d_x, d_kernel.reshape(kernel.shape)


_mixed.defvjp(_mixed_forward, _mixed_backward)


def _sum(y: Array, bias: Array) -> Array:
    return y + bias if y.dtype == bias.dtype else _plus(y, bias)


@jax.custom_vjp
def _plus(y: Array, bias: Array) -> Array:
    """`y + bias` in the dtype of `y`; the gradient of the bias is summed in its own."""
    return y + bias.astype(y.dtype)


def _plus_backward(bias, d_y):
    return d_y, d_y.astype(bias.dtype).sum(axis=tuple(range(d_y.ndim - bias.ndim)))


_plus.defvjp(lambda y, bias: (_plus(y, bias), bias), _plus_backward)
