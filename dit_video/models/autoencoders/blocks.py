"""Building blocks of a convolutional causal autoencoder: residual blocks, attention within a frame, resampling.

They are those of Wan's autoencoder (arXiv 2503.20314, section 4.1), which are those of Stable Diffusion's (arXiv
2112.10752) made causal in time. A resolution changes by factors of 1 or 2 along (t, h, w); the first frame is never
merged with later ones.

Every block takes the features of a clip, or of one chunk given the `ConvCache` of the previous chunk. Where several
clips share a canvas, `segments` holds the clip of each position: features between clips are zeroed before every
convolution, and attention stays within a clip.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError
from dit_video.models.autoencoders.interface import Latents, SegmentIds, chunk_grid
from dit_video.nn import AttentionInputs, CausalConv, ConvCache, Init, Linear, TemporalPadding, make_attention
from dit_video.tokens import Grid

NormFactory = Callable[[int, nnx.Rngs], nnx.Module]
"""Function that makes a norm for a number of channels; the norm is called with the features and `BlockInputs`."""


class BlockInputs(NamedTuple):
    """Inputs of a block in addition to the features."""

    segments: Int[Array, "B h w"] | None = None
    """Clip id of each latent position of a canvas, 0 between clips; None if there are no canvases."""
    latents: Latents | None = None
    """Latents being decoded, for norms that they modulate."""
    cache: ConvCache | None = None
    """Cache left by the previous chunk, for temporal layers."""

    @property
    def is_first(self) -> bool:
        """Return True for a whole clip or its first chunk, whose first latent frame stands for a single frame."""
        return self.cache is None or self.cache.is_first

    def mask_gaps(self, x: Float[Array, "B t h w i"]) -> Float[Array, "B t h w i"]:
        """Return the features with zeros between clips, so that a convolution sees only the clip it is in."""
        return x if self.segments is None else jnp.where(self._upsample_segments(x)[:, None, :, :, None] > 0, x, 0)

    def compute_frame_segments(self, x: Float[Array, "B t h w D"]) -> Int[Array, "B*t h*w"]:
        """Return the clip id of each position, one row per frame, so that attention stays within a clip's frame."""
        if self.segments is None:
            return jnp.ones((x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]), jnp.int32)
        return repeat(self._upsample_segments(x), "B h w -> (B t) (h w)", t=x.shape[1])

    def _upsample_segments(self, x: Float[Array, "B t H W i"]) -> Int[Array, "B H W"]:
        """Return the clip ids at the resolution of these features."""
        assert self.segments is not None
        rows, columns = x.shape[2] // self.segments.shape[1], x.shape[3] // self.segments.shape[2]
        return jnp.repeat(jnp.repeat(self.segments, rows, axis=1), columns, axis=2)


def make_encoder_inputs(
    pixels: Float[Array, "B T H W _"], stride: Grid, segment_ids: SegmentIds, cache: ConvCache | None
) -> BlockInputs:
    """Return the inputs of an encoder's blocks.

    Raises:
      UserError: pixels of other than 3 channels, or clip sizes that the stride does not divide.
    """
    if pixels.shape[-1] != 3:
        raise UserError(f"pixels have {pixels.shape[-1]} channels: use 3, red, green and blue")
    segments = None if segment_ids is None else segment_ids.astype(jnp.int32)
    inputs = BlockInputs(segments, cache=cache)
    chunk_grid(Grid(*pixels.shape[1:4]), stride, is_first=inputs.is_first)
    return inputs


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Options that all layers of an encoder or a decoder share."""

    norm: NormFactory
    blocks: int
    """Residual blocks per level of the encoder; the decoder has one more."""
    kernel: tuple[int, int, int]
    """Sizes of the residual blocks' kernels along (t, h, w)."""
    temporal_padding: TemporalPadding = "zero"
    fused_attention: bool = False
    """True computes queries, keys and values by one map, as Wan's autoencoders do."""
    middle_attention: bool = True
    """True adds attention between the two blocks in the middle."""
    shortcuts: bool = False
    """True adds a path without parameters to every level."""
    halves: bool = False
    """True halves the number of channels with every upsampling."""
    remat: bool = False
    """True computes the features of residual blocks again in the backward pass."""
    dtype: jnp.dtype
    rngs: nnx.Rngs

    def make_conv(self, width_in: int, width_out: int, *, init: Init = "xavier") -> CausalConv:
        """Return a convolution with the residual blocks' kernel."""
        options: dict[str, Any] = {"temporal_padding": self.temporal_padding, "dtype": self.dtype, "rngs": self.rngs}
        return CausalConv(width_in, width_out, self.kernel, init=init, **options)

    def make_linear(self, width_in: int, width_out: int) -> Linear:
        """Return a linear map of each position."""
        return Linear(width_in, width_out, dtype=self.dtype, rngs=self.rngs)


class ResidualBlock(nnx.Module):
    """Two times norm, SiLU and a convolution, added to the identity or a projection."""

    def __init__(self, width_in: int, width_out: int, layers: LayerOptions, *, init: Init = "xavier"):
        """Create the block; `init` fills the kernel of the second convolution."""
        self.norm_in, self.norm_out = layers.norm(width_in, layers.rngs), layers.norm(width_out, layers.rngs)
        self.conv_in = layers.make_conv(width_in, width_out)
        self.conv_out = layers.make_conv(width_out, width_out, init=init)
        self.shortcut = None if width_in == width_out else layers.make_linear(width_in, width_out)

    def __call__(self, x: Float[Array, "B t h w i"], inputs: BlockInputs) -> Float[Array, "B t h w o"]:
        y = self.conv_in(inputs.mask_gaps(jax.nn.silu(self.norm_in(x, inputs))), inputs.cache)
        y = self.conv_out(inputs.mask_gaps(jax.nn.silu(self.norm_out(y, inputs))), inputs.cache)
        return y + (x if self.shortcut is None else self.shortcut(x))


class FrameAttention(nnx.Module):
    """Single-head attention among the positions of a frame, added to the identity."""

    def __init__(self, width: int, layers: LayerOptions):
        self.norm = layers.norm(width, layers.rngs)
        self.qkv = layers.make_linear(width, 3 * width) if layers.fused_attention else None
        if self.qkv is None:
            self.query, self.key, self.value = (layers.make_linear(width, width) for _ in range(3))
        self.out = layers.make_linear(width, width)
        self.attention = make_attention()

    def __call__(self, x: Float[Array, "B t h w D"], inputs: BlockInputs) -> Float[Array, "B t h w D"]:
        tokens = rearrange(self.norm(x, inputs), "B t h w D -> (B t) (h w) 1 D")
        if self.qkv is None:
            q, k, v = self.query(tokens), self.key(tokens), self.value(tokens)
        else:
            q, k, v = jnp.split(self.qkv(tokens), 3, axis=-1)
        mixed = self.attention(q, k, v, AttentionInputs.self_attention(inputs.compute_frame_segments(x)))
        return x + self.out(mixed).reshape(x.shape)


class Downsample(nnx.Module):
    """Downsampling by 2 along the axes where `factors` is 2: a convolution in space, then one in time."""

    def __init__(self, width: int, factors: Grid, layers: LayerOptions):
        options: dict[str, Any] = {"dtype": layers.dtype, "rngs": layers.rngs}
        spatial = factors.h == 2
        self.space = CausalConv(width, width, (1, 3, 3), stride=2, **options) if spatial else None
        self.time = CausalConv(width, width, (3, 1, 1), **options) if factors.t == 2 else None

    def __call__(self, x: Float[Array, "B T H W D"], inputs: BlockInputs) -> Float[Array, "B t h w D"]:
        cache = inputs.cache
        if self.space is not None:
            x = self.space(inputs.mask_gaps(x))
        if self.time is None:
            return x
        if cache is not None and not cache.is_first:
            return self.time.convolve_valid(cache.prepend(x[:, :1], x), step=2)
        # The first frame is kept as it is, and is the padding before the frames that follow.
        rest = x if cache is None else cache.prepend(x[:, :1], x[:, 1:])
        first = x[:, :1]
        return first if x.shape[1] == 1 else jnp.concatenate([first, self.time.convolve_valid(rest, step=2)], axis=1)


class Upsample(nnx.Module):
    """Upsampling by 2 along the axes where `factors` is 2: a convolution in time, then one in space."""

    def __init__(self, width_in: int, width_out: int, factors: Grid, layers: LayerOptions):
        options: dict[str, Any] = {"dtype": layers.dtype, "rngs": layers.rngs}
        spatial = factors.h == 2
        self.time = CausalConv(width_in, 2 * width_in, (3, 1, 1), **options) if factors.t == 2 else None
        self.space = CausalConv(width_in, width_out, (1, 3, 3), **options) if spatial else None
        self.narrow = None if spatial or width_in == width_out else Linear(width_in, width_out, **options)

    def __call__(self, x: Float[Array, "B t h w i"], inputs: BlockInputs) -> Float[Array, "B T H W o"]:
        if self.time is not None:
            x = self._double_frames(self.time, x, inputs)
        if self.space is not None:
            x = self.space(repeat(x, "B t h w i -> B t (h a) (w b) i", a=2, b=2))
        return x if self.narrow is None else self.narrow(x)

    def _double_frames(
        self, convolution: CausalConv, x: Float[Array, "B t h w i"], inputs: BlockInputs
    ) -> Float[Array, "B T h w i"]:
        """Return two frames for each but the clip's first, which later frames do not see."""
        cache = inputs.cache
        first, rest = (x[:, :1], x[:, 1:]) if inputs.is_first else (x[:, :0], x)
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
