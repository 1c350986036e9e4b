"""Encoder and decoder of the image autoencoders around latent diffusion: those of Stable Diffusion, FLUX and MoVQ.

Levels of residual blocks with group norms, attention in the middle (arXiv 2112.10752, appendix G; after arXiv
2012.09841). Frames are coded one by one, as if each were an image. Which norm the decoder has is chosen by who builds
it: a plain group norm, or one that the latents modulate (MoVQ, arXiv 2209.09002).

Temporal layers can be put between the decoder's blocks; see `dit_video.autoencoders.inflate`.
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

from dit_video.autoencoders.blocks import Down, Places, Up, alone, frame_segments
from dit_video.core.errors import UserError
from dit_video.nn import CausalConv, GroupNorm, Linear, Memory, Tokens, make_attention
from dit_video.tokens import Grid

_HALF = Grid(1, 2, 2)


@dataclass(frozen=True, kw_only=True)
class ImageLevels:
    """The levels of an encoder and of its decoder; each next one has half the height and width.

    Raises:
      UserError: no levels, groups that do not divide a width, or attention at a level that isn't there.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    """channels of each level"""
    blocks: int = 2
    """residual blocks a level in the encoder; the decoder has one more"""
    groups: int = 32
    """of channels that are normed together"""
    middle_attention: bool = True
    """whether there is attention between the two blocks in the middle"""
    attention: tuple[int, ...] = ()
    """levels that have attention after every residual block"""
    bfloat16: bool = False
    """whether features are bfloat16, with products summed in float32; parameters, norms and latents stay float32"""

    def __post_init__(self):
        if not self.widths or min(*self.widths, self.blocks, self.groups) < 1:
            raise UserError("an image autoencoder needs one level or more, and widths, blocks and groups of at least 1")
        for width in self.widths:
            if width % self.groups:
                raise UserError(
                    f"{width} channels are not divisible by {self.groups} groups; change the widths or the groups"
                )
        if set(self.attention) - set(range(len(self.widths))):
            raise UserError(f"attention at levels {self.attention} of {len(self.widths)}; they are counted from 0")

    @property
    def stride(self) -> Grid:
        """Pixels for one latent along (t, h, w)."""
        side = 2 ** (len(self.widths) - 1)
        return Grid(1, side, side)

    @property
    def dtype(self) -> jnp.dtype:
        """What products are computed in."""
        return jnp.dtype(jnp.bfloat16 if self.bfloat16 else jnp.float32)


class Beside(NamedTuple):
    """What blocks are told beside the features."""

    places: Places | None = None
    """which clip each position belongs to, of several on one canvas"""
    latents: Float[Array, "B t h w c"] | None = None
    """what is decoded, for norms that it modulates"""
    memory: Memory | None = None
    """of the chunk before, for temporal layers"""


@runtime_checkable
class Norm(Protocol):
    """A norm of features at any resolution: `FrameNorm`, or one that reads `beside.latents`."""

    def __call__(self, x: Float[Array, "B t h w D"], beside: Beside) -> Float[Array, "B t h w D"]: ...


MakeNorm = Callable[[int, nnx.Rngs], nnx.Module]
"""A `Norm` of so many channels."""


class FrameNorm(GroupNorm):
    """A group norm over each frame, or over each clip's part of it."""

    def __call__(self, x: Float[Array, "B t h w D"], beside: Beside) -> Float[Array, "B t h w D"]:  # type: ignore[override]
        return super().__call__(x, None if beside.places is None else beside.places.clips)


def frame_norms(levels: ImageLevels) -> MakeNorm:
    """Plain group norms, as all encoders have them, and the decoders of Stable Diffusion and FLUX."""
    return lambda width, _: FrameNorm(width, levels.groups)


class ImageResidual(nnx.Module):
    """Twice norm, SiLU and a 3×3 convolution, beside the identity or a projection."""

    def __init__(self, width_in: int, width_out: int, norm: MakeNorm, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm_in, self.norm_out = norm(width_in, rngs), norm(width_out, rngs)
        self.conv_in = CausalConv(width_in, width_out, (1, 3, 3), dtype=dtype, rngs=rngs)
        self.conv_out = CausalConv(width_out, width_out, (1, 3, 3), dtype=dtype, rngs=rngs)
        self.shortcut = None if width_in == width_out else Linear(width_in, width_out, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B t h w i"], beside: Beside) -> Float[Array, "B t h w o"]:
        y = self.conv_in(alone(jax.nn.silu(self.norm_in(x, beside)), beside.places))
        y = self.conv_out(alone(jax.nn.silu(self.norm_out(y, beside)), beside.places))
        return y + (x if self.shortcut is None else self.shortcut(x))


class ImageAttention(nnx.Module):
    """Attention of one head among the positions of a frame, beside the identity."""

    def __init__(self, width: int, norm: MakeNorm, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = norm(width, rngs)
        self.query, self.key, self.value, self.out = (Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(4))
        self.attention = make_attention()

    def __call__(self, x: Float[Array, "B t h w D"], beside: Beside) -> Float[Array, "B t h w D"]:
        tokens = rearrange(self.norm(x, beside), "B t h w D -> (B t) (h w) 1 D")
        at = Tokens.among(frame_segments(x, beside.places))
        mixed = self.attention(self.query(tokens), self.key(tokens), self.value(tokens), at)
        return x + self.out(mixed).reshape(x.shape)


class ImageEncoder(nnx.Module):
    """Pixels to `channels` features for each latent position."""

    def __init__(self, levels: ImageLevels, channels: int, *, rngs: nnx.Rngs):
        widths, dtype, norm = levels.widths, levels.dtype, frame_norms(levels)
        self.conv_in = CausalConv(3, widths[0], (1, 3, 3), dtype=dtype, rngs=rngs)
        self.levels = nnx.List(
            [
                _DownLevel(levels, index, (before, *[width] * levels.blocks), norm, rngs=rngs)
                for index, (before, width) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True))
            ]
        )
        self.middle = _Middle(levels, norm, rngs=rngs)
        self.norm = norm(widths[-1], rngs)
        self.conv_out = CausalConv(widths[-1], channels, (1, 3, 3), dtype=dtype, rngs=rngs)

    def __call__(self, pixels: Float[Array, "B t H W 3"], places: Places | None = None) -> Float[Array, "B t h w _"]:
        beside = Beside(places=places)
        x = self.conv_in(alone(pixels, places))
        for level in self.levels:
            x = level(x, beside)
        x = self.middle(x, beside)
        return self.conv_out(alone(jax.nn.silu(self.norm(x, beside)), places))


class ImageDecoder(nnx.Module):
    """`channels` features for each latent position to pixels.

    `norm` makes its norms: `frame_norms(levels)` those of Stable Diffusion; others may read `beside.latents`.
    """

    def __init__(self, levels: ImageLevels, channels: int, norm: MakeNorm, *, rngs: nnx.Rngs):
        self.config = levels
        widths, dtype = levels.widths[::-1], levels.dtype
        self.conv_in = CausalConv(channels, widths[0], (1, 3, 3), dtype=dtype, rngs=rngs)
        self.middle = _Middle(levels, norm, rngs=rngs)
        self.levels = nnx.List(
            [
                _UpLevel(levels, len(widths) - 1 - index, (before, *[width] * (levels.blocks + 1)), norm, rngs=rngs)
                for index, (before, width) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True))
            ]
        )
        self.norm = norm(widths[-1], rngs)
        self.conv_out = CausalConv(widths[-1], 3, (1, 3, 3), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B t h w c"], beside: Beside) -> Float[Array, "B t H W 3"]:
        x = self.middle(self.conv_in(x), beside)
        for level in self.levels:
            x = level(x, beside)
        return self.conv_out(jax.nn.silu(self.norm(x, beside)))


class _DownLevel(nnx.Module):
    """Residual blocks, then half the height and width; the last level keeps them."""

    def __init__(self, levels: ImageLevels, index: int, widths: Sequence[int], norm: MakeNorm, *, rngs: nnx.Rngs):
        blocks, attentions = _blocks(levels, index, widths, norm, rngs=rngs)
        self.blocks, self.attentions = nnx.List(blocks), nnx.List(attentions)
        last = index == len(levels.widths) - 1
        self.down = None if last else Down(widths[-1], _HALF, dtype=levels.dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B t H W i"], beside: Beside) -> Float[Array, "B t h w o"]:
        for block, attention in itertools.zip_longest(self.blocks, self.attentions):
            x = block(x, beside)
            x = x if attention is None else attention(x, beside)
        return x if self.down is None else self.down(x, places=beside.places)


class _UpLevel(nnx.Module):
    """Residual blocks, then twice the height and width; the last level keeps them."""

    def __init__(self, levels: ImageLevels, index: int, widths: Sequence[int], norm: MakeNorm, *, rngs: nnx.Rngs):
        blocks, attentions = _blocks(levels, index, widths, norm, rngs=rngs)
        self.blocks, self.attentions = nnx.List(blocks), nnx.List(attentions)
        self.up = None if index == 0 else Up(widths[-1], widths[-1], _HALF, dtype=levels.dtype, rngs=rngs)
        self.temporal: nnx.List[nnx.Module] = nnx.List([])
        """layers that follow the residual blocks, one each; a decoder of images has none"""

    def __call__(self, x: Float[Array, "B t h w i"], beside: Beside) -> Float[Array, "B t H W o"]:
        for block, attention, temporal in itertools.zip_longest(self.blocks, self.attentions, self.temporal):
            x = block(x, beside)
            x = x if attention is None else attention(x, beside)
            x = x if temporal is None else temporal(x, beside)
        return x if self.up is None else self.up(x)


def _blocks(
    levels: ImageLevels, index: int, widths: Sequence[int], norm: MakeNorm, *, rngs: nnx.Rngs
) -> tuple[list[ImageResidual], list[ImageAttention]]:
    """The residual blocks of a level, and the attention after each: none, or as many."""
    dtype = levels.dtype
    blocks = [ImageResidual(*pair, norm, dtype=dtype, rngs=rngs) for pair in itertools.pairwise(widths)]
    attentive = widths[1:] if index in levels.attention else ()
    return blocks, [ImageAttention(width, norm, dtype=dtype, rngs=rngs) for width in attentive]


class _Middle(nnx.Module):
    def __init__(self, levels: ImageLevels, norm: MakeNorm, *, rngs: nnx.Rngs):
        width, dtype = levels.widths[-1], levels.dtype
        self.before = ImageResidual(width, width, norm, dtype=dtype, rngs=rngs)
        self.attention = ImageAttention(width, norm, dtype=dtype, rngs=rngs) if levels.middle_attention else None
        self.after = ImageResidual(width, width, norm, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B t h w D"], beside: Beside) -> Float[Array, "B t h w D"]:
        x = self.before(x, beside)
        x = x if self.attention is None else self.attention(x, beside)
        return self.after(x, beside)
