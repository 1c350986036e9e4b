"""Building blocks of a convolutional causal autoencoder: residual blocks, attention within a frame, resampling.

They are those of Wan's autoencoder (arXiv 2503.20314, section 4.1), which are those of Stable Diffusion's (arXiv
2112.10752) made causal in time. A resolution changes by factors of 1 or 2 along (t, h, w); the first frame is never
merged with later ones.

Every block takes the features of a clip, or of one chunk given the `ConvCache` of the previous chunk. Where several
clips share a canvas, `segments` names the clip of each position: features between clips are zeroed before every
convolution, and attention stays within a clip.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.autoencoders.interface import SegmentIds, chunk_grid
from dit_video.autoencoders.modulation import Guide, SpatialNorm
from dit_video.core.errors import UserError
from dit_video.nn import AttentionInputs, CausalConv, ConvCache, Linear, RmsNorm, make_attention
from dit_video.tokens import Grid

_EPSILON = 1e-12
"""Lower bound of norms in divisions: negligible, as the open models divide by the norm itself."""


class CanvasSegments(NamedTuple):
    """Clip ids of the latent positions of a canvas: 1, 2, …; 0 is padding."""

    ids: Int[Array, "B h w"]

    def mask_gaps(self, x: Float[Array, "B t H W i"]) -> Float[Array, "B t H W i"]:
        """Return features of any resolution, zeroed where there is no clip."""
        return jnp.where(self.upsample_like(x)[:, None, :, :, None] > 0, x, 0)

    def upsample_like(self, x: Float[Array, "B t H W i"]) -> Int[Array, "B H W"]:
        """Return the clip ids at the resolution of `x`."""
        rows, columns = x.shape[2] // self.ids.shape[1], x.shape[3] // self.ids.shape[2]
        return jnp.repeat(jnp.repeat(self.ids, rows, axis=1), columns, axis=2)


def mask_gaps(x: Float[Array, "B t h w i"], segments: CanvasSegments | None) -> Float[Array, "B t h w i"]:
    """Return features zeroed between the clips of a canvas, as each clip alone has zeros beyond its border."""
    return x if segments is None else segments.mask_gaps(x)


def make_canvas_segments(
    pixels: Float[Array, "B T H W _"], stride: Grid, segment_ids: SegmentIds, cache: ConvCache | None
) -> CanvasSegments | None:
    """Check the shape of pixels and return the clip ids of their canvas, or None if there are none.

    Raises:
      UserError: pixels of a clip or a chunk that do not fit the stride, or that are not RGB.
    """
    if pixels.shape[-1] != 3:
        raise UserError(f"pixels have {pixels.shape[-1]} channels: use 3, red, green and blue")
    chunk_grid(Grid(*pixels.shape[1:4]), stride, is_first=cache is None or cache.is_first)
    return None if segment_ids is None else CanvasSegments(segment_ids.astype(jnp.int32))


def compute_frame_segments(x: Float[Array, "B t h w D"], segments: CanvasSegments | None) -> Int[Array, "B*t h*w"]:
    """Return the clip id of each position, one row per frame, so that attention stays within a clip's frame."""
    if segments is None:
        return jnp.ones((x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]), jnp.int32)
    return repeat(segments.upsample_like(x), "B h w -> (B t) (h w)", t=x.shape[1])


def make_norm(width: int, guide_channels: int | None, rngs: nnx.Rngs) -> nnx.Module:
    """Return an RMS norm, modulated by latents of `guide_channels` channels unless that is None."""
    norm = RmsNorm(width, eps=_EPSILON)
    return norm if guide_channels is None else SpatialNorm(norm, width, guide_channels, rngs=rngs)


def apply_norm(norm: nnx.Module, x: Float[Array, "B t h w D"], guide: Guide | None) -> Float[Array, "B t h w D"]:
    """Apply a norm made by `make_norm`."""
    return norm(x) if guide is None else norm(x, guide)


class ResidualBlock(nnx.Module):
    """Two times norm, SiLU and a 3×3×3 convolution, added to the identity or a projection."""

    def __init__(
        self, width_in: int, width_out: int, *, guide_channels: int | None = None, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.norm_in = make_norm(width_in, guide_channels, rngs)
        self.norm_out = make_norm(width_out, guide_channels, rngs)
        self.conv_in = CausalConv(width_in, width_out, (3, 3, 3), temporal_padding="zero", dtype=dtype, rngs=rngs)
        self.conv_out = CausalConv(width_out, width_out, (3, 3, 3), temporal_padding="zero", dtype=dtype, rngs=rngs)
        self.shortcut = None if width_in == width_out else Linear(width_in, width_out, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B t h w i"],
        cache: ConvCache | None = None,
        segments: CanvasSegments | None = None,
        guide: Guide | None = None,
    ) -> Float[Array, "B t h w o"]:
        y = self.conv_in(mask_gaps(jax.nn.silu(apply_norm(self.norm_in, x, guide)), segments), cache)
        y = self.conv_out(mask_gaps(jax.nn.silu(apply_norm(self.norm_out, y, guide)), segments), cache)
        return y + (x if self.shortcut is None else self.shortcut(x))


class FrameAttention(nnx.Module):
    """Single-head attention among the positions of a frame, added to the identity."""

    def __init__(self, width: int, *, guide_channels: int | None = None, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = make_norm(width, guide_channels, rngs)
        self.qkv = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)
        self.attention = make_attention()

    def __call__(
        self, x: Float[Array, "B t h w D"], segments: CanvasSegments | None = None, guide: Guide | None = None
    ) -> Float[Array, "B t h w D"]:
        tokens = rearrange(apply_norm(self.norm, x, guide), "B t h w D -> (B t) (h w) 1 D")
        q, k, v = jnp.split(self.qkv(tokens), 3, axis=-1)
        mixed = self.attention(q, k, v, AttentionInputs.self_attention(compute_frame_segments(x, segments)))
        return x + self.out(mixed).reshape(x.shape)


class Downsample(nnx.Module):
    """Downsampling by 2 along the axes where `factors` is 2: a convolution in space, then one in time."""

    def __init__(self, width: int, factors: Grid, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        spatial = factors.h == 2
        self.space = CausalConv(width, width, (1, 3, 3), stride=2, dtype=dtype, rngs=rngs) if spatial else None
        self.time = CausalConv(width, width, (3, 1, 1), dtype=dtype, rngs=rngs) if factors.t == 2 else None

    def __call__(
        self, x: Float[Array, "B T H W D"], cache: ConvCache | None = None, segments: CanvasSegments | None = None
    ) -> Float[Array, "B t h w D"]:
        if self.space is not None:
            x = self.space(mask_gaps(x, segments))
        if self.time is None:
            return x
        if cache is None or cache.is_first:
            # The first frame is kept as it is, and is the padding before the frames that follow.
            rest = x if cache is None else cache.prepend(x[:, :1], x[:, 1:])
            first = x[:, :1]
            return (
                first if x.shape[1] == 1 else jnp.concatenate([first, self.time.convolve_valid(rest, step=2)], axis=1)
            )
        return self.time.convolve_valid(cache.prepend(x[:, :1], x), step=2)


class Upsample(nnx.Module):
    """Upsampling by 2 along the axes where `factors` is 2: a convolution in time, then one in space."""

    def __init__(self, width_in: int, width_out: int, factors: Grid, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        spatial = factors.h == 2
        self.time = CausalConv(width_in, 2 * width_in, (3, 1, 1), dtype=dtype, rngs=rngs) if factors.t == 2 else None
        self.space = CausalConv(width_in, width_out, (1, 3, 3), dtype=dtype, rngs=rngs) if spatial else None
        self.narrow = None if spatial or width_in == width_out else Linear(width_in, width_out, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B t h w i"], cache: ConvCache | None = None) -> Float[Array, "B T H W o"]:
        if self.time is not None:
            x = self._double_frames(self.time, x, cache)
        if self.space is not None:
            x = self.space(repeat(x, "B t h w i -> B t (h a) (w b) i", a=2, b=2))
        return x if self.narrow is None else self.narrow(x)

    def _double_frames(
        self, convolution: CausalConv, x: Float[Array, "B t h w i"], cache: ConvCache | None
    ) -> Float[Array, "B T h w i"]:
        """Return two frames for each but the clip's first, which later frames do not see."""
        begins = cache is None or cache.is_first
        first, rest = (x[:, :1], x[:, 1:]) if begins else (x[:, :0], x)
        padding = jnp.zeros_like(jnp.repeat(x[:, :1], 2, axis=1))
        padded = jnp.concatenate([padding, rest], axis=1) if cache is None else cache.prepend(padding, rest)
        if rest.shape[1] == 0:
            return first
        pairs = rearrange(convolution.convolve_valid(padded), "B t h w (two i) -> B (t two) h w i", two=2)
        return jnp.concatenate([first, pairs], axis=1)


def average_downsample(
    x: Float[Array, "B T H W i"], width: int, factors: Grid, *, is_first: bool
) -> Float[Array, "B t h w o"]:
    """Return a block's parameter-free shortcut to a lower resolution: cells of pixels become channels, then means.

    The first frame has cells of its own, padded with zeros before it.
    """
    if is_first:
        x = jnp.pad(x, ((0, 0), (factors.t - 1, 0), (0, 0), (0, 0), (0, 0)))
    cells = rearrange(x, "B (t a) (h b) (w c) i -> B t h w (i a b c)", a=factors.t, b=factors.h, c=factors.w)
    return cells.reshape(*cells.shape[:-1], width, -1).mean(axis=-1)


def repeat_upsample(
    x: Float[Array, "B t h w i"], width: int, factors: Grid, *, is_first: bool
) -> Float[Array, "B T H W o"]:
    """Return a block's parameter-free shortcut to a higher resolution: repeated channels become cells of pixels.

    Only the last frame of the first frame's cells is kept.
    """
    wide = jnp.repeat(x, width * factors.volume // x.shape[-1], axis=-1)
    cells = rearrange(wide, "B t h w (o a b c) -> B (t a) (h b) (w c) o", a=factors.t, b=factors.h, c=factors.w)
    return cells[:, factors.t - 1 :] if is_first else cells
