"""Layers: linear maps, norms, embeddings, activations and modulation."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jax.custom_derivatives import linear_call
from jaxtyping import Array, Float, Int, Real

from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray
from dit_video.nn.kernel import AnyKernel, Kernel, multiply
from dit_video.nn.partitioner import ONE_DEVICE, Partitioner, Precision, Split, WeightConstraint

_INNER, _CUBIC = math.sqrt(2 / math.pi), 0.044715


@jax.custom_jvp
def gelu(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Return the tanh form of GELU (arXiv 1606.08415); only its slope is kept for the backward pass."""
    return jax.nn.gelu(x, approximate=True)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (step,) = primals, tangents
    tanh = jnp.tanh(_INNER * (x + _CUBIC * x**3))
    share = 0.5 * (1 + tanh)
    slope = share + (0.5 * _INNER) * x * (1 - tanh * tanh) * (1 + 3 * _CUBIC * x**2)
    return x * share, slope * step


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

    The gradient's product is float32 too; otherwise the cross-device sum of the gradients would run in bfloat16.

    On CPU the leading axes are merged for the product: XLA runs the gradient of a 2-D product up to 1.5 times faster.
    On other platforms they stay separate. If both rows and tokens are sharded, a device may hold part of the tokens of
    two rows; a merged axis then has no sharding, and XLA would gather all tokens of both rows for every product.

    Products of a float32 layer have the platform's default precision unless `precision` is set: TPUs round their
    operands to bfloat16, GPUs to TF32.

    Args:
      features_in, features_out: Widths.
      bias: Adds a bias.
      init: Initialisation of the kernel.
      dtype: Dtype of the product.
      split: Division over the mesh axis `tensor`; it must agree with the rules for the sharding of weights at rest.
      precision: Precision of the products, including the gradients' products; None for the platform's default. On TPUs
        "highest" takes six passes instead of one, so it suits small float32 maps, such as the time's.
      is_context: True if inputs are a context's tokens, which are present on every device that shares a row's tokens.
      partitioner: Attention and sharding of weights of the devices that the layer is computed on.
      rngs: Random keys.
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
        partitioner: Partitioner = ONE_DEVICE,
        rngs: nnx.Rngs,
    ):
        shape = (features_in, features_out)
        self.kernel = nnx.Param(init_weights(init, rngs.params(), shape, fan=shape))
        self.bias = nnx.Param(jnp.zeros((features_out,), jnp.float32)) if bias else None
        self.dtype, self.precision, self.is_context = dtype, precision, is_context
        self.weight_constraint = partitioner.make_weight_constraint(split, is_context=is_context)
        self.fused_constraint = partitioner.make_fused_constraint() if split == "fused" else None

    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        kernel, bias = self.kernel[...], None if self.bias is None else self.bias[...]
        return self._apply(x.astype(self.dtype), kernel, bias)

    def project_parts(self, x: Float[Array, "*batch i"], count: int) -> Float[Array, "*batch {count} n"]:
        """Return the outputs of `count` fused maps of equal width."""
        kernel, bias = self.kernel[...], None if self.bias is None else self.bias[...].reshape(count, -1)
        if self.fused_constraint is None or isinstance(kernel, Kernel):  # which has its own products
            return self(x).reshape(*x.shape[:-1], count, -1)
        kernels, x = self.fused_constraint(kernel, count), x.astype(self.dtype)
        parts = [self._apply(x, kernels[:, part], None if bias is None else bias[part]) for part in range(count)]
        return jnp.stack(parts, axis=-2)

    def _apply(
        self, x: Float[Array, "*batch i"], kernel: AnyKernel, bias: Float[AnyArray, " o"] | None
    ) -> Float[Array, "*batch o"]:
        if jax.default_backend() == "cpu" and x.ndim != 2:
            return self._apply(x.reshape(-1, x.shape[-1]), kernel, bias).reshape(*x.shape[:-1], kernel.shape[1])
        if isinstance(kernel, Kernel) or (kernel.dtype == self.dtype and self.weight_constraint is None):
            # A `Kernel` has a product of its own; an array in the compute dtype needs no special gradient.
            y = multiply(x, kernel, self.precision, self.weight_constraint)
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
    # The kernel is rounded before it is gathered, so that devices exchange only the bytes that are used.
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


def layer_norm(x: Float[Array, "*batch D"], *, eps: float = 1e-6) -> Float[Array, "*batch D"]:
    """Normalise to zero mean and unit variance, without a learned scale, as adaptive modulation needs."""
    return _normalize(_drop_unit_axes(x).astype(jnp.float32), eps, True)[0].astype(x.dtype).reshape(x.shape)


def rms_norm(x: Float[Array, "*batch D"], *, eps: float = 1e-6) -> Float[Array, "*batch D"]:
    """Normalise to a root mean square of 1, without a learned scale (arXiv 1910.07467)."""
    return _normalize(_drop_unit_axes(x).astype(jnp.float32), eps, False)[0].astype(x.dtype).reshape(x.shape)


def _drop_unit_axes(x: Float[Array, "*batch D"]) -> Float[Array, "*rows D"]:
    """Drop leading axes of size 1: XLA's CPU backend takes ten times as long for sums of products with such axes."""
    return x.reshape(*(size for size in x.shape[:-1] if size > 1), x.shape[-1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _normalize(
    x: Float[Array, "*batch D"], eps: float, centre: bool
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch 1"]]:
    """Scale to a root mean square of 1, after subtracting the mean if `centre`; also return the factor."""
    if centre:
        x = x - x.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + eps)
    return x * inverse, inverse


@_normalize.defjvp
def _normalize_jvp(eps, centre, primals, tangents):
    # This takes at most two means where automatic differentiation takes four: half the time on CPU.
    normal, inverse = _normalize(*primals, eps, centre)
    (tangent,) = tangents
    projection = (normal * tangent).mean(axis=-1, keepdims=True)
    if centre:
        tangent = tangent - tangent.mean(axis=-1, keepdims=True)
    return (normal, inverse), (inverse * (tangent - normal * projection), -jnp.square(inverse) * projection)


class RmsNorm(nnx.Module):
    """Root mean square norm `x / rms(x) * scale` (arXiv 1910.07467)."""

    def __init__(self, width: int, *, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        normal, _ = _normalize(_drop_unit_axes(x).astype(jnp.float32), self.eps, False)
        return (normal * self.scale[...]).astype(x.dtype).reshape(x.shape)


class LayerNorm(nnx.Module):
    """Layer norm with a learned scale and shift."""

    def __init__(self, width: int, *, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.shift = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        normal = layer_norm(_drop_unit_axes(x).astype(jnp.float32), eps=self.eps)
        return (normal * self.scale[...] + self.shift[...]).astype(x.dtype).reshape(x.shape)


class GroupNorm(nnx.Module):
    """Group norm (arXiv 1803.08494) of each frame, with a learned scale and shift per channel.

    Statistics are taken over the height, width and group channels of one frame, so no frame sees later ones.

    Raises:
      UserError: If the number of groups does not divide the width.
    """

    def __init__(self, width: int, groups: int, *, eps: float = 1e-6):
        if groups < 1 or width % groups:
            raise UserError(f"{width} channels are not divisible by {groups} groups; change one of the two")
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.shift = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.groups, self.eps = groups, eps

    def __call__(
        self, x: Float[Array, "B t H W D"], segments: Int[Array, "B h w"] | None = None
    ) -> Float[Array, "B t H W D"]:
        """Normalise frames, or canvases shared by several segments, each with its own statistics.

        `segments` holds segment ids from 0 to at most `h * w`, at the resolution of `x` or coarser by integer factors.
        """
        if segments is None:
            segments = jnp.zeros((x.shape[0], 1, 1), jnp.int32)
        rows, columns = segments.shape[1:]
        # Sums are first taken within a cell of pixels, so that few values are left and rounding errors stay small.
        cells = rearrange(x.astype(jnp.float32), "B t (h a) (w b) D -> B t (h w) (a b) D", h=rows, w=columns)
        counts = _sum_segments(jnp.ones((x.shape[0], rows * columns, 1)), segments)
        values = counts * (cells.shape[3] * x.shape[4] // self.groups)

        def means(pixels: Float[Array, "B t n p D"]) -> Float[Array, "B t n 1 D"]:
            """Return the mean over each segment's pixels and group's channels, for every cell and channel."""
            frames = pixels.shape[1]
            sums = rearrange(pixels.sum(axis=3), "B t n (G d) -> B t n G d", G=self.groups).sum(axis=4)
            totals = _sum_segments(rearrange(sums, "B t n G -> B n (t G)"), segments) / values
            return repeat(totals, "B n (t G) -> B t n 1 (G d)", t=frames, d=pixels.shape[4] // self.groups)

        centred = cells - means(cells)
        normal = centred * (jax.lax.rsqrt(means(jnp.square(centred)) + self.eps) * self.scale[...]) + self.shift[...]
        merge_cells = "B t (h w) (a b) D -> B t (h a) (w b) D"
        return rearrange(normal, merge_cells, h=rows, a=x.shape[2] // rows).astype(x.dtype)


def _sum_segments(values: Float[Array, "B n V"], segments: Int[Array, "B h w"]) -> Float[Array, "B n V"]:
    """Return, for each position, the sum over its segment's positions."""
    if values.shape[1] == 1:
        return values

    def sum_canvas(values: Array, ids: Array) -> Array:
        return jax.ops.segment_sum(values, ids, num_segments=len(values) + 1)[ids]

    return jax.vmap(sum_canvas)(values, segments.reshape(len(segments), -1))


def sinusoidal_embedding(
    values: Real[Array, "*batch"], width: int, *, max_period: float = 10_000.0
) -> Float[Array, "*batch {width}"]:
    """Return `[cos(x f), sin(x f)]` with frequencies from 1 down towards `1 / max_period`.

    `width` must be even (arXiv 1706.03762, section 3.5).
    """
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angles = values.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def modulate(
    x: Float[Array, "*batch D"], shift: Float[Array, "*batch D"], scale: Float[Array, "*batch D"], *, eps: float = 1e-6
) -> Float[Array, "*batch D"]:
    """Return `layer_norm(x) * (1 + scale) + shift`, computed in float32; `eps` is the norm's."""
    return (layer_norm(x.astype(jnp.float32), eps=eps) * (1 + scale) + shift).astype(x.dtype)


def make_modulation_table(entries: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    """Return a block's learned table of shifts, scales and gates, which are added to the projected time's."""
    return nnx.Param(jax.random.normal(rngs.params(), (entries, width), jnp.float32) / width**0.5)
