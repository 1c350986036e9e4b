"""Normalisation layers over the last axis, or over groups of channels within a frame, computed in float32."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError


def layer_norm(x: Float[Array, "*batch D"], *, eps: float = 1e-6) -> Float[Array, "*batch D"]:
    """Normalise to zero mean and unit variance, without learned scale, as adaptive modulation needs it."""
    return _normalize(_drop_unit_axes(x).astype(jnp.float32), eps, True)[0].astype(x.dtype).reshape(x.shape)


def rms_norm(x: Float[Array, "*batch D"], *, eps: float = 1e-6) -> Float[Array, "*batch D"]:
    """Normalise to a root mean square of 1, without learned scale (arXiv 1910.07467)."""
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
    # Two means at most, where automatic differentiation takes four: half the time on CPU.
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

    Statistics are those of one frame, over height, width and the channels of a group, so no frame sees later ones.

    Raises:
      UserError: groups that do not divide the width.
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
        """Normalise frames, or canvases shared by several segments, each with statistics of its own.

        `segments` holds segment ids from 0 to at most `h * w`, at the resolution of `x` or coarser by integer factors.
        """
        if segments is None:
            segments = jnp.zeros((x.shape[0], 1, 1), jnp.int32)
        rows, columns = segments.shape[1:]
        # Sums are taken within a cell of pixels first, so that few values are left and rounding stays small.
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
    """Return for each position the sum over all positions of its segment."""
    if values.shape[1] == 1:
        return values

    def sum_canvas(values: Array, ids: Array) -> Array:
        return jax.ops.segment_sum(values, ids, num_segments=len(values) + 1)[ids]

    return jax.vmap(sum_canvas)(values, segments.reshape(len(segments), -1))
