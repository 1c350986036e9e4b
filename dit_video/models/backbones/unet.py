"""U-Net over space and time for dense batches and canvases.

Residual blocks of factorised convolutions at several resolutions (Video Diffusion Models, arXiv 2204.03458), with
attention to the clip and to its text at the lower ones, as in latent diffusion (arXiv 2112.10752).
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.backbones.protocol import BackboneConfig, ClipTokens, count_tokens
from dit_video.models.conditioning import Conditioning, TextTokens
from dit_video.nn import (
    ONE_DEVICE,
    AttentionInputs,
    Backend,
    CausalConv,
    LayerNorm,
    Linear,
    Partitioner,
    RmsNorm,
    gelu,
    sinusoidal_embedding,
)
from dit_video.tokens import Canvas, DenseBatch, Grid, PackedRows, Rotary3d, RowView, compute_rotary_angles, rotate

SPATIAL_KERNEL, TEMPORAL_KERNEL = (1, 3, 3), (3, 1, 1)
TIME_FEATURES = 256
"""Number of sines and cosines of the time."""


@dataclass(frozen=True, kw_only=True)
class UnetArchitecture(BackboneConfig):
    """Fields of a `UnetConfig`, with their checks and costs.

    Raises:
      UserError: If a size is below 1, there are no levels, an attention level does not exist, or groups or heads do not
        divide the widths.
    """

    channels: int
    """Number of latent channels."""
    context_width: int = 0
    """Width of the text encoder's output (E); 0 without text."""
    patch: Grid = Grid(1, 1, 1)
    width: int = 64
    """Number of channels at the highest resolution."""
    multipliers: tuple[int, ...] = (1, 2)
    """Factors of the width at each level; height and width of the latents are halved from level to level."""
    blocks: int = 1
    """Number of residual blocks of a level, on the way down and again on the way up."""
    attention_levels: tuple[int, ...] = (1,)
    """Levels, counted from 0, at which tokens attend to their clip and to the text; the middle always does."""
    heads: int = 4
    groups: int = 8
    """Number of groups of channels in the norms."""
    attention: Backend = "chunked"
    """Backend of attention; `chunked` skips the pairs of different clips of a canvas."""
    dtype: str = "float32"
    """Dtype of convolutions and matrix products; norms and residual features are float32."""

    def __post_init__(self):
        check_at_least(1, channels=self.channels, width=self.width)
        if not self.multipliers or min(self.multipliers) < 1 or self.blocks < 1:
            raise UserError(
                f"multipliers={self.multipliers}, blocks={self.blocks} is invalid: a U-Net has at least one level and "
                "one block. Use 1 or more."
            )
        if any(level not in range(len(self.multipliers)) for level in self.attention_levels):
            raise UserError(
                f"attention_levels={self.attention_levels} is invalid: levels are numbered from 0 to "
                f"{len(self.multipliers) - 1}. Use these."
            )
        for name, divisor in (("groups", self.groups), ("heads", self.heads)):
            if divisor < 1 or self.width % divisor:
                raise UserError(f"{name}={divisor} is invalid: it must divide width={self.width}. Use a divisor.")
        if self.patch != Grid(1, 1, 1):
            raise UserError(f"patch={tuple(self.patch)} is invalid: a U-Net has no patches. Use Grid(1, 1, 1).")

    @property
    def layouts(self) -> tuple[type[PackedRows], ...]:
        return (DenseBatch, Canvas)

    @property
    def size_multiple(self) -> Grid:
        side = 2 ** (len(self.multipliers) - 1)
        return Grid(1, side, side)

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the number of channels at each level."""
        return tuple(self.width * factor for factor in self.multipliers)

    @property
    def condition_width(self) -> int:
        """Return the width of a clip's condition, which is made from its time."""
        return 4 * self.width

    @property
    def layers(self) -> int:  # type: ignore[override]
        """Return the number of attention layers."""
        return sum(layers for _, _, layers in self._list_attention(1))

    @property
    def layer_params(self) -> float:
        grid = self.size_multiple.volume
        weights = self.count_multiplications(grid, text=0, image=0) - self._count_condition_multiplications()
        return weights / (grid * self.layers * self.width**2)

    def attention_pairs(self, grid: Grid) -> float:
        return self.count_pairs(grid, text=0) / self.layers

    def count_pairs(self, clip: ClipTokens, *, text: int) -> int:
        attention = self._list_attention(count_tokens(clip))
        return sum(layers * tokens * (tokens + text) for tokens, _, layers in attention)

    def count_multiplications(self, clip: ClipTokens, *, text: int, image: int) -> int:
        if image:
            raise UserError(f"this model has no image tokens; leave out images, of which this clip has {image}")
        tokens, space, time = count_tokens(clip), math.prod(SPATIAL_KERNEL), math.prod(TEMPORAL_KERNEL)
        total = self._count_condition_multiplications() + 2 * tokens * space * self.channels * self.width
        for level, width in enumerate(self.widths):
            positions, square = tokens // 4**level, width**2
            down, up = space + time, 2 * space + time + 2  # the second with a linear map of the two merged inputs
            total += self.blocks * positions * (down + up) * square
            if level == len(self.widths) - 1:
                total += 2 * positions * (space + time) * square
            else:
                coarse = self.widths[level + 1]
                total += positions * width * coarse * (1 + space)  # from and to the lower resolution
        for positions, width, layers in self._list_attention(tokens):
            cross = 2 * positions * width**2 + 2 * text * self.context_width * width if self.context_width else 0
            total += layers * (positions * 12 * width**2 + cross + 2 * width * positions * (positions + text))
        return total

    def _count_condition_multiplications(self) -> int:
        width = self.condition_width
        blocks = sum(2 * self.blocks * 2 * level_width for level_width in self.widths) + 2 * 2 * self.widths[-1]
        return TIME_FEATURES * width + width**2 + width * blocks

    def _list_attention(self, tokens: int) -> list[tuple[int, int, int]]:
        """Return tokens, width and number of layers of each level with attention."""
        last = len(self.multipliers) - 1
        counts = dict.fromkeys(self.attention_levels, 2 * self.blocks)
        counts[last] = counts.get(last, 0) + 1
        return [(tokens // 4**level, self.widths[level], layers) for level, layers in sorted(counts.items())]


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
        """Normalise, then scale by `1 + modulation[..., :D]` and shift by `modulation[..., D:]`, once per clip."""
        width = x.shape[-1] // self.groups
        tokens = rearrange(layout.from_array(x.astype(jnp.float32)), "B N (g d) -> B N g d", d=width)
        moments = layout.mean(jnp.stack([tokens.mean(axis=-1), jnp.square(tokens).mean(axis=-1)], axis=-1))
        mean, square = repeat(moments, "B G g m -> m B G (g d)", d=width)
        scale = self.scale[...] * jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0) + self.eps)
        shift = self.shift[...] - mean * scale
        if modulation is not None:
            factor, offset = jnp.split(modulation, 2, axis=-1)
            scale, shift = scale * (1 + factor), shift * (1 + factor) + offset
        # Only one scale and one shift per clip and channel are expanded to positions.
        expanded = layout.to_array(layout.expand(jnp.concatenate([scale, shift], axis=-1)))
        return x * expanded[..., : x.shape[-1]] + expanded[..., x.shape[-1] :]


class ConvBlock(nnx.Module):
    """A spatial and a temporal convolution, each after a norm; the clip's condition scales and shifts in between.

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

    def __init__(self, width: int, config: UnetArchitecture, *, partitioner: Partitioner, rngs: nnx.Rngs):
        linear = functools.partial(Linear, dtype=jnp.dtype(config.dtype), partitioner=partitioner, rngs=rngs)
        self.heads, head_width = config.heads, width // config.heads
        self.rotary = Rotary3d.even(head_width)
        self.attention = partitioner.make_attention(config.attention)
        self.norm = LayerNorm(width)
        self.query_norm, self.key_norm = RmsNorm(head_width), RmsNorm(head_width)
        self.qkv = linear(width, 3 * width, bias=False)
        self.out = linear(width, width, init="zero", split="inputs")
        if config.context_width:
            self.cross = partitioner.make_cross_attention(config.attention)
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


class _LevelInputs(NamedTuple):
    """Inputs that all blocks of a level share, besides the features."""

    condition: Float[Array, "B G c"]
    text: TextTokens | None
    layout: Canvas
    """Places of the clips at the level's resolution."""
    rows: RowView


class _UnetLevel(nnx.Module):
    """Residual blocks at one resolution, each followed by attention where the config says so."""

    def __init__(
        self, width_in: int, level: int, config: UnetArchitecture, *, partitioner: Partitioner, rngs: nnx.Rngs
    ):
        width, blocks = config.widths[level], range(config.blocks)
        attends = level in config.attention_levels
        self.residual = nnx.List([ConvBlock(width_in, width, config, rngs=rngs) for _ in blocks])
        self.attention = nnx.List(
            [AttentionBlock(width, config, partitioner=partitioner, rngs=rngs) for _ in blocks if attends]
        )

    def apply(self, index: int, x: Float[Array, "B t h w i"], inputs: _LevelInputs) -> Float[Array, "B t h w o"]:
        """Apply one of the blocks, and its attention."""
        x = self.residual[index](x, inputs.condition, inputs.layout)
        return self.attention[index](x, inputs.text, inputs.layout, inputs.rows) if len(self.attention) else x


class Unet(nnx.Module):
    """A U-Net on dense batches and canvases; see `Backbone`."""

    def __init__(self, config: UnetArchitecture, *, partitioner: Partitioner = ONE_DEVICE, rngs: nnx.Rngs):
        self.config = config
        widths, dtype = config.widths, jnp.dtype(config.dtype)
        levels, last = range(len(widths)), widths[-1]
        self.time_in = Linear(TIME_FEATURES, config.condition_width, precision="highest", rngs=rngs)
        self.time_out = Linear(config.condition_width, config.condition_width, precision="highest", rngs=rngs)
        self.embed = CausalConv(config.channels, widths[0], SPATIAL_KERNEL, dtype=dtype, rngs=rngs)
        self.down = nnx.List(
            [_UnetLevel(widths[level], level, config, partitioner=partitioner, rngs=rngs) for level in levels]
        )
        self.shrink = nnx.List(
            [Linear(HALF.volume * fine, coarse, dtype=dtype, rngs=rngs) for fine, coarse in itertools.pairwise(widths)]
        )
        self.middle_in = ConvBlock(last, last, config, rngs=rngs)
        self.middle_attention = AttentionBlock(last, config, partitioner=partitioner, rngs=rngs)
        self.middle_out = ConvBlock(last, last, config, rngs=rngs)
        self.up = nnx.List(
            [_UnetLevel(2 * widths[level], level, config, partitioner=partitioner, rngs=rngs) for level in levels]
        )
        self.grow = nnx.List(
            [
                CausalConv(coarse, fine, SPATIAL_KERNEL, dtype=dtype, rngs=rngs)
                for fine, coarse in itertools.pairwise(widths)
            ]
        )
        self.head_norm = ClipNorm(widths[0], config.groups)
        self.head = CausalConv(widths[0], config.channels, SPATIAL_KERNEL, init="zero", rngs=rngs)

    def __call__(
        self,
        noisy: Float[Array, "B N c"],
        time: Float[Array, "B G"],
        layout: Canvas,
        conditioning: Conditioning,
        state: Any = None,
    ) -> tuple[Float[Array, "B N c"], Any]:
        """Predict from noisy latents; see `Backbone`."""
        conditioning.check(self.config.conditioning_kinds)
        levels = self._prepare_levels(time, layout, conditioning)
        x, skips = self.embed(layout.mask_padding(layout.to_array(noisy))), []
        for number, (level, inputs) in enumerate(zip(self.down, levels, strict=True)):
            if number:
                x = self.shrink[number - 1](merge_positions(x))
            for index in range(self.config.blocks):
                x = level.apply(index, x, inputs)
                skips.append(x)
        x = self.middle_in(x, levels[-1].condition, levels[-1].layout)
        x = self.middle_attention(x, levels[-1].text, levels[-1].layout, levels[-1].rows)
        x = self.middle_out(x, levels[-1].condition, levels[-1].layout)
        for number in reversed(range(len(levels))):
            for index in range(self.config.blocks):
                x = self.up[number].apply(index, jnp.concatenate([x, skips.pop()], axis=-1), levels[number])
            if number:
                x = self.grow[number - 1](levels[number - 1].layout.mask_padding(repeat_positions(x)))
        x = layout.mask_padding(nnx.silu(self.head_norm(x, layout)))
        return layout.from_array(self.head(x)).astype(jnp.float32), state

    def _prepare_levels(
        self, time: Float[Array, "B G"], layout: Canvas, conditioning: Conditioning
    ) -> list[_LevelInputs]:
        features = sinusoidal_embedding(1000 * time, TIME_FEATURES)
        condition = nnx.silu(self.time_out(nnx.silu(self.time_in(features))))
        levels = []
        for number in range(len(self.config.widths)):
            layout = layout.coarsen(HALF) if number else layout
            levels.append(_LevelInputs(condition, conditioning.get(TextTokens), layout, layout.to_rows()))
        return levels


@dataclass(frozen=True, kw_only=True)
class UnetConfig(UnetArchitecture):
    """Configuration of the U-Net; for the fields see `UnetArchitecture`."""

    def make(self, rngs: nnx.Rngs, partitioner: Partitioner = ONE_DEVICE) -> Unet:
        return Unet(self, partitioner=partitioner, rngs=rngs)
