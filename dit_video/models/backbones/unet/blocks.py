"""Blocks of the U-Net: residual blocks of convolutions over space and over time, and attention within a clip.

Features are dense arrays. Padding between the clips of a canvas is zeroed before every convolution, statistics are
those of one clip, and attention stays within a clip: a clip has the same features on a canvas as alone.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float

from dit_video.models.backbones.unet.config import SPATIAL_KERNEL, TEMPORAL_KERNEL, UnetArchitecture
from dit_video.models.conditioning import TextTokens
from dit_video.nn import AttentionInputs, CausalConv, LayerNorm, Linear, Parallelism, RmsNorm, gelu
from dit_video.tokens import Canvas, Grid, PackedRows, Rotary3d, RowView, compute_rotary_angles, rotate

HALF = Grid(1, 2, 2)
"""Factor between the resolutions of neighbouring levels."""


class ClipNorm(nnx.Module):
    """Group norm (arXiv 1803.08494) over the channels of a group and all positions of a clip, scaled per channel.

    The variance is the mean square minus the squared mean, as in Flax.
    """

    def __init__(self, width: int, groups: int, *, eps: float = 1e-5):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.shift = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.groups, self.eps = groups, eps

    def __call__(
        self, x: Float[Array, "B t h w D"], layout: Canvas, modulation: Float[Array, "B G 2*D"] | None = None
    ) -> Float[Array, "B t h w D"]:
        """Normalise, then scale by `1 + modulation[..., :D]` and shift by `modulation[..., D:]`, one of each a clip."""
        width = x.shape[-1] // self.groups
        tokens = rearrange(layout.from_array(x.astype(jnp.float32)), "B N (g d) -> B N g d", d=width)
        moments = layout.mean(jnp.stack([tokens.mean(axis=-1), jnp.square(tokens).mean(axis=-1)], axis=-1))
        mean, square = repeat(moments, "B G g m -> m B G (g d)", d=width)
        scale = self.scale[...] * jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0) + self.eps)
        shift = self.shift[...] - mean * scale
        if modulation is not None:
            factor, offset = jnp.split(modulation, 2, axis=-1)
            scale, shift = scale * (1 + factor), shift * (1 + factor) + offset
        # One scale and one shift for every clip and channel: they are all that is expanded to positions.
        expanded = layout.to_array(layout.expand(jnp.concatenate([scale, shift], axis=-1)))
        return x * expanded[..., : x.shape[-1]] + expanded[..., x.shape[-1] :]


class ConvBlock(nnx.Module):
    """A convolution over space and one over time, each after a norm; the condition of a clip scales and shifts between.

    This is the factorised convolution of R(2+1)D (arXiv 1711.11248) in the residual block of ADM (arXiv 2105.05233).
    """

    def __init__(self, width_in: int, width: int, config: UnetArchitecture, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.norm_in, self.norm_out = ClipNorm(width_in, config.groups), ClipNorm(width, config.groups)
        self.space = CausalConv(width_in, width, SPATIAL_KERNEL, dtype=dtype, rngs=rngs)
        self.modulation = Linear(config.condition_width, 2 * width, init="zero", precision="highest", rngs=rngs)
        self.time = CausalConv(width, width, TEMPORAL_KERNEL, init="zero", dtype=dtype, rngs=rngs)
        self.skip = None if width_in == width else Linear(width_in, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B t h w i"], condition: Float[Array, "B G c"], layout: Canvas
    ) -> Float[Array, "B t h w o"]:
        hidden = self.space(layout.mask_padding(nnx.silu(self.norm_in(x, layout))))
        hidden = nnx.silu(self.norm_out(hidden, layout, self.modulation(condition)))
        hidden = convolve_time(self.time, layout.mask_padding(hidden))
        residual = x if self.skip is None else self.skip(x)
        return (residual + hidden).astype(jnp.float32)


class AttentionBlock(nnx.Module):
    """Attention to all tokens of the clip, attention to its text, and an MLP (arXiv 2112.10752, appendix E.2.1)."""

    def __init__(self, width: int, config: UnetArchitecture, *, parallel: Parallelism, rngs: nnx.Rngs):
        linear = functools.partial(Linear, dtype=jnp.dtype(config.dtype), parallel=parallel, rngs=rngs)
        self.heads, head_width = config.heads, width // config.heads
        self.rotary = Rotary3d.even(head_width)
        self.attention = parallel.make_attention(config.attention)
        self.norm = LayerNorm(width)
        self.query_norm, self.key_norm = RmsNorm(head_width), RmsNorm(head_width)
        self.qkv = linear(width, 3 * width, bias=False)
        self.out = linear(width, width, init="zero", split="inputs")
        if config.context_width:
            self.cross = parallel.make_cross_attention(config.attention)
            self.cross_norm = LayerNorm(width)
            self.cross_query = linear(width, width, bias=False, split="outputs")
            self.cross_key_value = linear(config.context_width, 2 * width, bias=False)
            self.cross_out = linear(width, width, init="zero", split="inputs")
        self.mlp_norm = LayerNorm(width)
        self.up = linear(width, 4 * width, split="outputs")
        self.down = linear(4 * width, width, init="zero", split="inputs")

    def __call__(
        self, x: Float[Array, "B t h w D"], text: TextTokens | None, layout: Canvas, rows: RowView
    ) -> Float[Array, "B t h w D"]:
        # Attention takes the clips one after the other, as they lie in packed rows.
        tokens = rows.pack(layout.from_array(x))
        tokens = tokens + self._attend(self.norm(tokens), rows.layout)
        if text is not None:
            tokens = tokens + self._attend_text(self.cross_norm(tokens), text, rows.layout)
        tokens = tokens + self.down(gelu(self.up(self.mlp_norm(tokens))))
        return layout.to_array(rows.unpack(tokens)).astype(jnp.float32)

    def _attend(self, tokens: Float[Array, "B N D"], layout: PackedRows) -> Float[Array, "B N D"]:
        q, k, v = (self._split_heads(part) for part in jnp.split(self.qkv(tokens), 3, axis=-1))
        angles = compute_rotary_angles(jnp.asarray(layout.positions), self.rotary)
        inputs = _make_inputs(layout)
        mixed = self.attention(rotate(self.query_norm(q), angles), rotate(self.key_norm(k), angles), v, inputs)
        return self.out(mixed.reshape(tokens.shape))

    def _attend_text(
        self, tokens: Float[Array, "B N D"], text: TextTokens, layout: PackedRows
    ) -> Float[Array, "B N D"]:
        k, v = (self._split_heads(part) for part in jnp.split(self.cross_key_value(text.values), 2, axis=-1))
        inputs = _make_inputs(layout).with_context(text.segments)
        mixed = self.cross(self._split_heads(self.cross_query(tokens)), k, v, inputs)
        return self.cross_out(mixed.reshape(tokens.shape))

    def _split_heads(self, x: Float[Array, "B M D"]) -> Float[Array, "B M K d"]:
        return x.reshape(*x.shape[:2], self.heads, -1)


def convolve_time(conv: CausalConv, x: Float[Array, "B t h w i"]) -> Float[Array, "B t h w o"]:
    """Convolve in time, with as many frames of zeros after the clip as before it."""
    reach = conv.kernel.shape[0] // 2
    return conv.convolve_valid(jnp.pad(x, ((0, 0), (reach, reach), (0, 0), (0, 0), (0, 0))))


def merge_positions(x: Float[Array, "B t h w D"]) -> Float[Array, "B t _ _ E"]:
    """Return half the resolution, with the channels of the merged positions side by side."""
    return rearrange(x, "B t (h a) (w b) D -> B t h w (a b D)", a=HALF.h, b=HALF.w)


def repeat_positions(x: Float[Array, "B t h w D"]) -> Float[Array, "B t _ _ D"]:
    """Return twice the resolution, by repetition."""
    return repeat(x, "B t h w D -> B t (h a) (w b) D", a=HALF.h, b=HALF.w)


def _make_inputs(layout: PackedRows) -> AttentionInputs:
    return AttentionInputs.self_attention(jnp.asarray(layout.segments), segment_count=layout.count)
