"""Encoder and decoder of the image autoencoders of latent diffusion: those of Stable Diffusion, FLUX and MoVQ.

Levels of residual blocks with group norms, attention in the middle (arXiv 2112.10752, appendix G; after arXiv
2012.09841). Each frame is coded separately, as an image. The caller chooses the decoder's norms: plain group norms, or
norms modulated by the latents (MoVQ, arXiv 2209.09002).

Temporal layers can be added between the decoder's blocks; see `dit_video.autoencoders.inflate`.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from dit_video.autoencoders.blocks import CanvasSegments, Downsample, Upsample, compute_frame_segments, mask_gaps
from dit_video.autoencoders.interface import Latents
from dit_video.core.errors import UserError
from dit_video.nn import AttentionInputs, CausalConv, ConvCache, GroupNorm, Linear, make_attention
from dit_video.tokens import Grid

_HALF = Grid(1, 2, 2)


@dataclass(frozen=True, kw_only=True)
class ImageLevels:
    """Configuration of the levels of an encoder and decoder; each level has half the height and width of the previous.

    Raises:
      UserError: no levels, groups that do not divide a width, or attention at a level that does not exist.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of each level."""
    blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    groups: int = 32
    """Number of groups of channels in group norms."""
    middle_attention: bool = True
    """True adds attention between the two blocks in the middle."""
    attention: tuple[int, ...] = ()
    """Levels with attention after every residual block, counted from 0."""
    bfloat16: bool = False
    """True stores features in bfloat16, with products summed in float32; parameters, norms and latents stay float32."""

    def __post_init__(self):
        if not self.widths or min(*self.widths, self.blocks, self.groups) < 1:
            raise UserError(f"{self} is invalid: use one level or more, and widths, blocks and groups of at least 1")
        for width in self.widths:
            if width % self.groups:
                raise UserError(f"{width} channels are not divisible by groups={self.groups}; change one of them")
        if set(self.attention) - set(range(len(self.widths))):
            raise UserError(f"attention={self.attention} is invalid: use levels from 0 to {len(self.widths) - 1}")

    @property
    def stride(self) -> Grid:
        """Return the pixels per latent along (t, h, w)."""
        side = 2 ** (len(self.widths) - 1)
        return Grid(1, side, side)

    @property
    def dtype(self) -> jnp.dtype:
        """Return the dtype of products."""
        return jnp.dtype(jnp.bfloat16 if self.bfloat16 else jnp.float32)


class BlockInputs(NamedTuple):
    """Inputs of a block in addition to the features."""

    segments: CanvasSegments | None = None
    """Clip ids of the positions, if several clips share a canvas."""
    latents: Latents | None = None
    """Latents being decoded, for norms that they modulate."""
    cache: ConvCache | None = None
    """Cache left by the previous chunk, for temporal layers."""


@runtime_checkable
class Norm(Protocol):
    """A norm of features at any resolution: `FrameNorm`, or one that reads `inputs.latents`."""

    def __call__(self, x: Float[Array, "B t h w D"], inputs: BlockInputs) -> Float[Array, "B t h w D"]: ...


NormFactory = Callable[[int, nnx.Rngs], nnx.Module]
"""Function that makes a `Norm` for a number of channels."""


class FrameNorm(GroupNorm):
    """A group norm over each frame, or over each clip's part of it if clips share a canvas."""

    def __call__(self, x: Float[Array, "B t h w D"], inputs: BlockInputs) -> Float[Array, "B t h w D"]:  # type: ignore[override]
        return super().__call__(x, None if inputs.segments is None else inputs.segments.ids)


def make_frame_norm_factory(levels: ImageLevels) -> NormFactory:
    """Return a factory of plain group norms: those of all encoders, and of Stable Diffusion's and FLUX's decoders."""
    return lambda width, _: FrameNorm(width, levels.groups)


class ImageResidualBlock(nnx.Module):
    """Two times norm, SiLU and a 3×3 convolution, added to the identity or a projection."""

    def __init__(self, width_in: int, width_out: int, norm: NormFactory, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm_in, self.norm_out = norm(width_in, rngs), norm(width_out, rngs)
        self.conv_in = CausalConv(width_in, width_out, (1, 3, 3), dtype=dtype, rngs=rngs)
        self.conv_out = CausalConv(width_out, width_out, (1, 3, 3), dtype=dtype, rngs=rngs)
        self.shortcut = None if width_in == width_out else Linear(width_in, width_out, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B t h w i"], inputs: BlockInputs) -> Float[Array, "B t h w o"]:
        y = self.conv_in(mask_gaps(jax.nn.silu(self.norm_in(x, inputs)), inputs.segments))
        y = self.conv_out(mask_gaps(jax.nn.silu(self.norm_out(y, inputs)), inputs.segments))
        return y + (x if self.shortcut is None else self.shortcut(x))


class ImageAttention(nnx.Module):
    """Single-head attention among the positions of a frame, added to the identity."""

    def __init__(self, width: int, norm: NormFactory, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = norm(width, rngs)
        self.query, self.key, self.value, self.out = (Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(4))
        self.attention = make_attention()

    def __call__(self, x: Float[Array, "B t h w D"], inputs: BlockInputs) -> Float[Array, "B t h w D"]:
        tokens = rearrange(self.norm(x, inputs), "B t h w D -> (B t) (h w) 1 D")
        meta = AttentionInputs.self_attention(compute_frame_segments(x, inputs.segments))
        mixed = self.attention(self.query(tokens), self.key(tokens), self.value(tokens), meta)
        return x + self.out(mixed).reshape(x.shape)


class ImageVaeEncoder(nnx.Module):
    """An encoder of pixels to `channels` features per latent position."""

    def __init__(self, levels: ImageLevels, channels: int, *, rngs: nnx.Rngs):
        widths, dtype, norm = levels.widths, levels.dtype, make_frame_norm_factory(levels)
        self.conv_in = CausalConv(3, widths[0], (1, 3, 3), dtype=dtype, rngs=rngs)
        chains = [(width_in, *[width] * levels.blocks) for width_in, width in itertools.pairwise((widths[0], *widths))]
        self.levels = nnx.List([_DownLevel(levels, index, part, norm, rngs=rngs) for index, part in enumerate(chains)])
        self.middle = _MiddleBlock(levels, norm, rngs=rngs)
        self.norm = norm(widths[-1], rngs)
        self.conv_out = CausalConv(widths[-1], channels, (1, 3, 3), dtype=dtype, rngs=rngs)

    def __call__(
        self, pixels: Float[Array, "B t H W 3"], segments: CanvasSegments | None = None
    ) -> Float[Array, "B t h w _"]:
        inputs = BlockInputs(segments=segments)
        x = self.conv_in(mask_gaps(pixels, segments))
        for level in self.levels:
            x = level(x, inputs)
        x = self.middle(x, inputs)
        return self.conv_out(mask_gaps(jax.nn.silu(self.norm(x, inputs)), segments))


class ImageVaeDecoder(nnx.Module):
    """A decoder of `channels` features per latent position to pixels.

    `norm` makes its norms: `make_frame_norm_factory(levels)` plain ones; others may read `inputs.latents`.
    """

    def __init__(self, levels: ImageLevels, channels: int, norm: NormFactory, *, rngs: nnx.Rngs):
        self.config = levels
        widths, dtype = levels.widths[::-1], levels.dtype
        self.conv_in = CausalConv(channels, widths[0], (1, 3, 3), dtype=dtype, rngs=rngs)
        self.middle = _MiddleBlock(levels, norm, rngs=rngs)
        pairs, count = itertools.pairwise((widths[0], *widths)), levels.blocks + 1
        chains = [(width_in, *[width] * count) for width_in, width in pairs]
        indices = range(len(widths) - 1, -1, -1)
        self.levels = nnx.List([_UpLevel(levels, *part, norm, rngs=rngs) for part in zip(indices, chains, strict=True)])
        self.norm = norm(widths[-1], rngs)
        self.conv_out = CausalConv(widths[-1], 3, (1, 3, 3), dtype=dtype, rngs=rngs)

    def __call__(self, x: Latents, inputs: BlockInputs) -> Float[Array, "B t H W 3"]:
        x = self.middle(self.conv_in(x), inputs)
        for level in self.levels:
            x = level(x, inputs)
        return self.conv_out(jax.nn.silu(self.norm(x, inputs)))


class _DownLevel(nnx.Module):
    """Residual blocks, then downsampling by 2 in height and width, except in the last level."""

    def __init__(self, levels: ImageLevels, index: int, widths: Sequence[int], norm: NormFactory, *, rngs: nnx.Rngs):
        blocks, attentions = _make_blocks(levels, index, widths, norm, rngs=rngs)
        self.blocks, self.attentions = nnx.List(blocks), nnx.List(attentions)
        last = index == len(levels.widths) - 1
        self.down = None if last else Downsample(widths[-1], _HALF, dtype=levels.dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B t H W i"], inputs: BlockInputs) -> Float[Array, "B t h w o"]:
        for block, attention in itertools.zip_longest(self.blocks, self.attentions):
            x = block(x, inputs)
            x = x if attention is None else attention(x, inputs)
        return x if self.down is None else self.down(x, segments=inputs.segments)


class _UpLevel(nnx.Module):
    """Residual blocks, then upsampling by 2 in height and width, except in the last level."""

    def __init__(self, levels: ImageLevels, index: int, widths: Sequence[int], norm: NormFactory, *, rngs: nnx.Rngs):
        blocks, attentions = _make_blocks(levels, index, widths, norm, rngs=rngs)
        self.blocks, self.attentions = nnx.List(blocks), nnx.List(attentions)
        self.up = None if index == 0 else Upsample(widths[-1], widths[-1], _HALF, dtype=levels.dtype, rngs=rngs)
        self.temporal: nnx.List[nnx.Module] = nnx.List([])
        """Temporal layers, one after each residual block; empty in a decoder of images."""

    def __call__(self, x: Float[Array, "B t h w i"], inputs: BlockInputs) -> Float[Array, "B t H W o"]:
        for block, attention, temporal in itertools.zip_longest(self.blocks, self.attentions, self.temporal):
            x = block(x, inputs)
            x = x if attention is None else attention(x, inputs)
            x = x if temporal is None else temporal(x, inputs)
        return x if self.up is None else self.up(x)


def _make_blocks(
    levels: ImageLevels, index: int, widths: Sequence[int], norm: NormFactory, *, rngs: nnx.Rngs
) -> tuple[list[ImageResidualBlock], list[ImageAttention]]:
    """Return a level's residual blocks, and the attention after each: one per block, or none."""
    dtype = levels.dtype
    blocks = [ImageResidualBlock(*pair, norm, dtype=dtype, rngs=rngs) for pair in itertools.pairwise(widths)]
    attention_widths = widths[1:] if index in levels.attention else ()
    return blocks, [ImageAttention(width, norm, dtype=dtype, rngs=rngs) for width in attention_widths]


class _MiddleBlock(nnx.Module):
    def __init__(self, levels: ImageLevels, norm: NormFactory, *, rngs: nnx.Rngs):
        width, dtype = levels.widths[-1], levels.dtype
        self.before = ImageResidualBlock(width, width, norm, dtype=dtype, rngs=rngs)
        self.attention = ImageAttention(width, norm, dtype=dtype, rngs=rngs) if levels.middle_attention else None
        self.after = ImageResidualBlock(width, width, norm, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B t h w D"], inputs: BlockInputs) -> Float[Array, "B t h w D"]:
        x = self.before(x, inputs)
        x = x if self.attention is None else self.attention(x, inputs)
        return self.after(x, inputs)
