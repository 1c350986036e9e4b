"""Linear maps on the last axis."""

import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import linear_call
from jaxtyping import Array, Float

from dit_video.core.typing import AnyArray

Init = Literal["xavier", "zero", "normal"]

Fused = Callable[[Float[Array, "i o"], int], Float[Array, "i parts n"]]
"""Takes the weights of several maps in one apart, and says where they lie on devices; no value changes."""


@runtime_checkable
class Placed(Protocol):
    """Says where weights lie while they are used; no value changes."""

    def __call__(self, kernel: Float[Array, "i o"]) -> Float[Array, "i o"]: ...

    def factors(
        self, a: Float[Array, "i r"], b: Float[Array, "r o"]
    ) -> tuple[Float[Array, "i r"], Float[Array, "r o"]]:
        """The same of an adapter's."""
        ...


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
    """`y = x W + b`, computed in `dtype`; weights are float32, and so is the product that is their gradient.

    In a lower precision it would be summed over devices in that: each adds its own rows, after the product.

    On CPU the leading axes are one in the product: XLA runs the gradient of a 2-D product up to 1.5 times faster there.
    Elsewhere they stay apart. Rows and tokens that are split over devices have no place on one axis as soon as a device
    holds two rows of which it has some tokens: XLA would gather all tokens of both for every product.
    """

    placed: Placed | None = None
    """of weights that lie in parts on several devices between their uses"""

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
        kernel, bias = self.kernel[...], None if self.bias is None else self.bias[...]
        return self._of(x.astype(self.dtype), kernel, bias)

    def parts(self, x: Float[Array, "*batch i"], count: int, fused: Fused | None) -> Float[Array, "*batch {count} n"]:
        """Its outputs as those of `count` maps of equal width, whose weights lie where `fused` says."""
        kernel, bias = self.kernel[...], None if self.bias is None else self.bias[...].reshape(count, -1)
        if fused is None or not isinstance(kernel, jax.Array):  # adapted kernels are products of their own
            return self(x).reshape(*x.shape[:-1], count, -1)
        kernels, x = fused(kernel, count), x.astype(self.dtype)
        parts = [self._of(x, kernels[:, at], None if bias is None else bias[at]) for at in range(count)]
        return jnp.stack(parts, axis=-2)

    def _of(
        self, x: Float[Array, "*batch i"], kernel: Any, bias: Float[AnyArray, " o"] | None
    ) -> Float[Array, "*batch o"]:
        if jax.default_backend() == "cpu" and x.ndim != 2:
            return self._of(x.reshape(-1, x.shape[-1]), kernel, bias).reshape(*x.shape[:-1], kernel.shape[1])
        adapted = not isinstance(kernel, jax.Array)
        if adapted or (kernel.dtype == self.dtype and self.placed is None):
            # An adapted kernel knows its products.
            kernel = kernel.astype(self.dtype)
            y = x @ (kernel.laid(self.placed) if adapted and self.placed is not None else kernel)
            return y if bias is None else y + bias.astype(self.dtype)
        y = _product(self.placed, x, kernel)
        return y if bias is None else _sum(y, bias)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(
    placed: Placed | None, x: Float[Array, "*batch i"], kernel: Float[Array, "i o"]
) -> Float[Array, "*batch o"]:
    """In the dtype of `x`, with a gradient of the kernel that is summed in float32, and over devices to where the
    kernel lies between its uses."""
    return x @ _used(placed, kernel, x.dtype)


def _used(placed: Placed | None, kernel: Float[Array, "i o"], dtype: Any) -> Float[Array, "i o"]:
    """Rounded first, so that no more is sent than is read."""
    kernel = kernel.astype(dtype)
    return kernel if placed is None else placed(kernel)


@_product.defjvp
def _product_jvp(placed, primals, tangents):
    (x, kernel), (x_tangent, kernel_tangent) = primals, tangents

    def product(x, tangent):
        return x @ tangent.astype(x.dtype)

    def gradient(x, cotangent):
        rows = tuple(range(x.ndim - 1))
        summed = jax.lax.dot_general(x, cotangent, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
        return summed.astype(kernel.dtype)

    used = _used(placed, kernel, x.dtype)  # once, for the value and for the gradient of `x`
    by_kernel = linear_call(product, gradient, x, kernel_tangent)
    return x @ used, x_tangent @ used + by_kernel


@jax.custom_jvp
def _sum(y: Float[Array, "*batch o"], bias: Float[Array, " o"]) -> Float[Array, "*batch o"]:
    """The same of a bias."""
    return y + bias.astype(y.dtype)


@_sum.defjvp
def _sum_jvp(primals, tangents):
    (y, bias), (y_tangent, bias_tangent) = primals, tangents

    def spread(_, tangent):
        return jnp.broadcast_to(tangent.astype(y.dtype), y.shape)

    def gradient(_, cotangent):
        rows = tuple(range(cotangent.ndim - 1))
        return cotangent.sum(axis=rows, dtype=jnp.float32).astype(bias.dtype)

    return _sum(y, bias), y_tangent + linear_call(spread, gradient, (), bias_tangent)
