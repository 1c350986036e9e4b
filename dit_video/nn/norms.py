"""Norms over the last axis, or over groups of its channels in a frame; computed in float32."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError


def layer_norm(x: Float[Array, "*batch D"], *, eps: float = 1e-6) -> Float[Array, "*batch D"]:
    """Zero mean and unit variance, without learned scale: what adaptive modulation is applied to."""
    return _normal(x.astype(jnp.float32), eps, True)[0].astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _normal(
    x: Float[Array, "*batch D"], eps: float, centre: bool
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch 1"]]:
    """A root mean square of 1, with `centre` around a mean of 0; and by what the values were multiplied."""
    if centre:
        x = x - x.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + eps)
    return x * inverse, inverse


@_normal.defjvp
def _normal_jvp(eps, centre, primals, tangents):
    """At most two means, where the derivative of each operation in turn takes four: half the time on CPU."""
    normal, inverse = _normal(*primals, eps, centre)
    (step,) = tangents
    along = (normal * step).mean(axis=-1, keepdims=True)
    if centre:
        step = step - step.mean(axis=-1, keepdims=True)
    return (normal, inverse), (inverse * (step - normal * along), -jnp.square(inverse) * along)


class RmsNorm(nnx.Module):
    """`x / rms(x) * scale` (arXiv 1910.07467)."""

    def __init__(self, width: int, *, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        normal, _ = _normal(x.astype(jnp.float32), self.eps, False)
        return (normal * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`layer_norm` with a learned scale and shift."""

    def __init__(self, width: int, *, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.shift = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        normal = layer_norm(x.astype(jnp.float32), eps=self.eps)
        return (normal * self.scale[...] + self.shift[...]).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Zero mean and unit variance in each frame over the channels of a group; then a scale and a shift of each channel.

    (arXiv 1803.08494, over height and width; frames are apart, so that none sees those that follow it.)

    Raises:
      UserError: groups that do not divide the width.
    """

    def __init__(self, width: int, groups: int, *, eps: float = 1e-6):
        if groups < 1 or width % groups:
            raise UserError(f"{width} channels are not divisible by {groups} groups; change the one or the other")
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.shift = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.groups, self.eps = groups, eps

    def __call__(
        self, x: Float[Array, "B t H W D"], segments: Int[Array, "B h w"] | None = None
    ) -> Float[Array, "B t H W D"]:
        """Of frames, or of canvases that several segments share, whose statistics are then their own.

        `segments` numbers the segments 0, 1, …, each number at most `h * w`, at the resolution of `x` or at one that
        is coarser by whole factors.
        """
        if segments is None:
            segments = jnp.zeros((x.shape[0], 1, 1), jnp.int32)
        rows, columns = segments.shape[1:]
        # All sums are taken within a cell of pixels first: few numbers are left, and rounding stays small.
        cells = rearrange(x.astype(jnp.float32), "B t (h a) (w b) D -> B t (h w) (a b) D", h=rows, w=columns)
        counts = _totals(jnp.ones((x.shape[0], rows * columns, 1)), segments)
        values = counts * (cells.shape[3] * x.shape[4] // self.groups)

        def means(of: Float[Array, "B t n p D"]) -> Float[Array, "B t n 1 D"]:
            """Over each segment's pixels and each group's channels, at every position and channel."""
            frames = of.shape[1]
            sums = rearrange(of.sum(axis=3), "B t n (G d) -> B t n G d", G=self.groups).sum(axis=4)
            totals = _totals(rearrange(sums, "B t n G -> B n (t G)"), segments) / values
            return repeat(totals, "B n (t G) -> B t n 1 (G d)", t=frames, d=of.shape[4] // self.groups)

        centred = cells - means(cells)
        normal = centred * (jax.lax.rsqrt(means(jnp.square(centred)) + self.eps) * self.scale[...]) + self.shift[...]
        folded = "B t (h w) (a b) D -> B t (h a) (w b) D"
        return rearrange(normal, folded, h=rows, a=x.shape[2] // rows).astype(x.dtype)


def _totals(values: Float[Array, "B n V"], segments: Int[Array, "B h w"]) -> Float[Array, "B n V"]:
    """At each position the sum over all positions of its segment."""
    if values.shape[1] == 1:
        return values

    def of_one(values: Array, ids: Array) -> Array:
        return jax.ops.segment_sum(values, ids, num_segments=len(values) + 1)[ids]

    return jax.vmap(of_one)(values, segments.reshape(len(segments), -1))
