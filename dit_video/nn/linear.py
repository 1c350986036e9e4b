"""Linear layers on the last axis, with float32 weights and weight gradients."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.custom_derivatives import linear_call
from jaxtyping import Array, Float

from dit_video.core.typing import AnyArray
from dit_video.nn.parallel import ONE_DEVICE, Parallelism, Precision, Split, WeightConstraint

Init = Literal["xavier", "zero", "normal"]


def init_weights(init: Init, key: Array, shape: tuple[int, ...], *, fan: tuple[int, int]) -> Float[Array, "..."]:
    """Return initial weights: Xavier uniform over (fan in, fan out), zeros, or a normal distribution of std 0.02."""
    match init:
        case "xavier":
            limit = (6 / sum(fan)) ** 0.5
            return jax.random.uniform(key, shape, jnp.float32, -limit, limit)
        case "normal":
            return 0.02 * jax.random.normal(key, shape, jnp.float32)
        case "zero":
            return jnp.zeros(shape, jnp.float32)


class Linear(nnx.Module):
    """A linear layer `y = x W + b`, computed in `dtype`; weights and their gradients are float32.

    The gradient's product is float32 too: otherwise the cross-device sum of the gradients would run in bfloat16.

    On CPU the leading axes are merged for the product: XLA runs the gradient of a 2-D product up to 1.5 times faster.
    On other platforms they stay separate: with both rows and tokens sharded, a merged axis has no sharding as soon as a
    device holds part of the tokens of two rows, and XLA would gather all tokens of both for every product.

    Products of a float32 layer have the platform's default precision unless `precision` is set: TPUs round their
    operands to bfloat16, GPUs to TF32.

    Args:
      features_in, features_out: widths.
      bias: adds a bias.
      init: initialisation of the kernel.
      dtype: dtype of the product.
      split: division over the mesh axis `tensor`; it must agree with the rules by which weights are sharded at rest.
      precision: precision of the products, also of those of the gradients; None for the platform's default. On TPUs
        "highest" takes six passes instead of one: it is for small float32 maps, such as those of the time.
      is_context: True if inputs are tokens of a context, which all devices that share a row's tokens have.
      parallel: devices that the layer is computed on.
      rngs: random keys.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        bias: bool = True,
        init: Init = "xavier",
        dtype: jnp.dtype = jnp.float32,
        split: Split | None = None,
        precision: Precision = None,
        is_context: bool = False,
        parallel: Parallelism = ONE_DEVICE,
        rngs: nnx.Rngs,
    ):
        shape = (features_in, features_out)
        self.kernel = nnx.Param(init_weights(init, rngs.params(), shape, fan=shape))
        self.bias = nnx.Param(jnp.zeros((features_out,), jnp.float32)) if bias else None
        self.dtype, self.precision, self.is_context = dtype, precision, is_context
        self.weight_constraint = parallel.make_weight_constraint(split, is_context=is_context)
        self.fused_constraint = parallel.make_fused_constraint() if split == "fused" else None

    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        kernel, bias = self.kernel[...], None if self.bias is None else self.bias[...]
        return self._apply(x.astype(self.dtype), kernel, bias)

    def project_parts(self, x: Float[Array, "*batch i"], count: int) -> Float[Array, "*batch {count} n"]:
        """Return the outputs of `count` fused maps of equal width."""
        kernel, bias = self.kernel[...], None if self.bias is None else self.bias[...].reshape(count, -1)
        if self.fused_constraint is None or not isinstance(kernel, jax.Array):  # a LoRA kernel has its own products
            return self(x).reshape(*x.shape[:-1], count, -1)
        kernels, x = self.fused_constraint(kernel, count), x.astype(self.dtype)
        parts = [self._apply(x, kernels[:, part], None if bias is None else bias[part]) for part in range(count)]
        return jnp.stack(parts, axis=-2)

    def _apply(
        self, x: Float[Array, "*batch i"], kernel: Any, bias: Float[AnyArray, " o"] | None
    ) -> Float[Array, "*batch o"]:
        if jax.default_backend() == "cpu" and x.ndim != 2:
            return self._apply(x.reshape(-1, x.shape[-1]), kernel, bias).reshape(*x.shape[:-1], kernel.shape[1])
        adapted = not isinstance(kernel, jax.Array | np.ndarray)
        if adapted or (kernel.dtype == self.dtype and self.weight_constraint is None):
            # `LowRankKernel` defines its own product; a kernel in the compute dtype needs no special gradient.
            kernel = kernel.astype(self.dtype)
            if adapted and self.weight_constraint is not None:
                kernel = kernel.constrain(self.weight_constraint)
            y = kernel.multiply(x, self.precision) if adapted else jnp.matmul(x, kernel, precision=self.precision)
            return y if bias is None else y + bias.astype(self.dtype)
        y = _matmul(self.weight_constraint, self.precision, x, kernel)
        return y if bias is None else _add_bias(y, bias)


def compute_kernel_gradient(
    x: Float[Array, "*batch i"], cotangent: Float[Array, "*batch o"], precision: Precision = None
) -> Float[Array, "i o"]:
    """Return the gradient of a kernel from inputs and from cotangents of the outputs, summed in float32."""
    rows = tuple(range(x.ndim - 1))
    options: dict[str, Any] = {"precision": precision, "preferred_element_type": jnp.float32}
    return jax.lax.dot_general(x, cotangent, ((rows, rows), ((), ())), **options)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _matmul(
    weight_constraint: WeightConstraint | None,
    precision: Precision,
    x: Float[Array, "*batch i"],
    kernel: Float[Array, "i o"],
) -> Float[Array, "*batch o"]:
    """Multiply in the dtype of `x`; the kernel's gradient is summed in float32, into the kernel's sharding at rest."""
    return jnp.matmul(x, _constrain(weight_constraint, kernel, x.dtype), precision=precision)


def _constrain(
    weight_constraint: WeightConstraint | None, kernel: Float[Array, "i o"], dtype: Any
) -> Float[Array, "i o"]:
    # Rounded before it is gathered, so that devices exchange no more bytes than are used.
    kernel = kernel.astype(dtype)
    return kernel if weight_constraint is None else weight_constraint(kernel)


@_matmul.defjvp
def _matmul_jvp(weight_constraint, precision, primals, tangents):
    (x, kernel), (x_tangent, kernel_tangent) = primals, tangents
    matmul = functools.partial(jnp.matmul, precision=precision)

    def product(x, tangent):
        return matmul(x, tangent.astype(x.dtype))

    def gradient(x, cotangent):
        compute = compute_kernel_gradient if weight_constraint is None else weight_constraint.compute_gradient
        return compute(x, cotangent, precision).astype(kernel.dtype)

    used = _constrain(weight_constraint, kernel, x.dtype)  # gathered once, for the value and for the gradient of `x`
    kernel_part = linear_call(product, gradient, x, kernel_tangent)
    return matmul(x, used), matmul(x_tangent, used) + kernel_part


@jax.custom_jvp
def _add_bias(y: Float[Array, "*batch o"], bias: Float[Array, " o"]) -> Float[Array, "*batch o"]:
    """Add a bias in the dtype of `y`; its gradient is summed in float32."""
    return y + bias.astype(y.dtype)


@_add_bias.defjvp
def _add_bias_jvp(primals, tangents):
    (y, bias), (y_tangent, bias_tangent) = primals, tangents

    def spread(_, tangent):
        return jnp.broadcast_to(tangent.astype(y.dtype), y.shape)

    def gradient(_, cotangent):
        rows = tuple(range(cotangent.ndim - 1))
        return cotangent.sum(axis=rows, dtype=jnp.float32).astype(bias.dtype)

    return _add_bias(y, bias), y_tangent + linear_call(spread, gradient, (), bias_tangent)
