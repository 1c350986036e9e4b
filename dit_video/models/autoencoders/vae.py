"""A causal convolutional variational autoencoder; both of Wan's are configurations of it.

Resolution levels of residual blocks, attention in the middle (arXiv 2503.20314, section 4.1). With `shortcuts`, every
level has a parallel path without parameters, as in the autoencoder of Wan 2.2 (after DC-AE, arXiv 2410.10733). The
autoencoders of images and those with quantised latents are made of the same blocks.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError
from dit_video.models.autoencoders.config import AutoencoderConfig
from dit_video.models.autoencoders.interface import (
    Latents,
    Normalizer,
    Pixels,
    Posterior,
    SegmentIds,
    Vae,
    check_std,
    chunk_grid,
)
from dit_video.nn import (
    AttentionInputs,
    CausalConv,
    ConvCache,
    ConvForm,
    Init,
    Linear,
    RmsNorm,
    TemporalPadding,
    make_attention,
    rematerialize,
    set_conv_form,
)
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
      UserError: If pixels do not have 3 channels, or the stride does not divide the clip sizes.
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
    """Norm, SiLU and a convolution, twice, added to the identity or a projection."""

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


class Resolution(NamedTuple):
    """Configuration of one level."""

    width: int
    """Channels."""
    factors: Grid | None
    """Factors along (t, h, w) of the resampling that ends the level; None keeps the resolution."""
    has_attention: bool = False
    """True adds attention after every residual block."""


class Encoder(nnx.Module):
    """Pixels to features, by levels of ever lower resolution."""

    def __init__(
        self, layers: LayerOptions, resolutions: Sequence[Resolution], *, channels: int = 3, width: int, features: int
    ):
        """Create the encoder from `channels` to `features` channels, with `width` after the first convolution.

        `width` is the base width whatever the first level's width, as in the open models.
        """
        last = resolutions[-1].width
        self.conv_in = layers.make_conv(channels, width)
        starts = (width, *(each.width for each in resolutions))
        chains = [(start, *[each.width] * layers.blocks) for start, each in zip(starts, resolutions, strict=False)]
        pairs = zip(chains, resolutions, strict=True)
        self.levels = nnx.List([_DownLevel(*pair, layers) for pair in pairs])
        self.middle = _MiddleBlock(last, layers, has_attention=layers.middle_attention)
        self.norm = layers.norm(last, layers.rngs)
        self.conv_out = layers.make_conv(last, features)

    def __call__(self, pixels: Float[Array, "B T H W _"], inputs: BlockInputs) -> Float[Array, "B t h w _"]:
        x = self.conv_in(inputs.mask_gaps(pixels), inputs.cache)
        for level in self.levels:
            x = level(x, inputs)
        x = jax.nn.silu(self.norm(self.middle(x, inputs), inputs))
        return self.conv_out(inputs.mask_gaps(x), inputs.cache)


class Decoder(nnx.Module):
    """Latents to pixels, by levels of ever higher resolution."""

    def __init__(self, layers: LayerOptions, resolutions: Sequence[Resolution], *, channels: int, features: int = 3):
        """Create the decoder from `channels` to `features` channels; its levels are the reverse of `resolutions`."""
        width = resolutions[-1].width
        self.conv_in = layers.make_conv(channels, width)
        self.middle = _MiddleBlock(width, layers, has_attention=layers.middle_attention)
        levels = []
        factors = (*(each.factors for each in resolutions[-2::-1]), None)
        for each, factor in zip(resolutions[::-1], factors, strict=True):
            widths = (width, *[each.width] * (layers.blocks + 1))
            width = each.width // 2 if layers.halves else each.width
            levels.append(_UpLevel(widths, width, each._replace(factors=factor), layers))
        self.levels = nnx.List(levels)
        self.norm = layers.norm(resolutions[0].width, layers.rngs)
        self.conv_out = layers.make_conv(resolutions[0].width, features)

    def __call__(self, latents: Float[Array, "B t h w c"], inputs: BlockInputs) -> Float[Array, "B T H W _"]:
        x = self.middle(self.conv_in(latents, inputs.cache), inputs)
        for level in self.levels:
            x = level(x, inputs)
        return self.conv_out(jax.nn.silu(self.norm(x, inputs)), inputs.cache)


class _Level(nnx.Module):
    """Residual blocks of one resolution, each followed by attention and by a temporal layer if there are any."""

    def __init__(self, widths: Sequence[int], resolution: Resolution, layers: LayerOptions):
        self.width, self.factors = resolution.width, resolution.factors or Grid(1, 1, 1)
        self.shortcuts, self.remat = layers.shortcuts, layers.remat
        self.blocks = nnx.List([ResidualBlock(*pair, layers) for pair in itertools.pairwise(widths)])
        attention_widths = widths[1:] if resolution.has_attention else ()
        self.attentions = nnx.List([FrameAttention(width, layers) for width in attention_widths])
        self.temporal: nnx.List[nnx.Module] = nnx.List([])
        """Temporal layers, one per block, which `dit_video.models.autoencoders.inflate` adds."""

    def apply_blocks(self, x: Float[Array, "B t h w i"], inputs: BlockInputs) -> Float[Array, "B t h w o"]:
        """Apply the blocks, attention and temporal layers in turn."""
        for block, *others in itertools.zip_longest(self.blocks, self.attentions, self.temporal):
            if self.remat and inputs.cache is None:
                x = rematerialize(lambda block, x: block(x, inputs), block, x)
            else:
                x = block(x, inputs)
            for layer in others:
                x = x if layer is None else layer(x, inputs)
        return x


class _DownLevel(_Level):
    """Residual blocks, then downsampling if the level has factors."""

    def __init__(self, widths: Sequence[int], resolution: Resolution, layers: LayerOptions):
        super().__init__(widths, resolution, layers)
        factors = resolution.factors
        self.down = None if factors is None else Downsample(resolution.width, factors, layers)

    def __call__(self, x: Float[Array, "B T H W i"], inputs: BlockInputs) -> Float[Array, "B t h w o"]:
        y = self.apply_blocks(x, inputs)
        y = y if self.down is None else self.down(y, inputs)
        return y + average_downsample(x, self.width, self.factors, is_first=inputs.is_first) if self.shortcuts else y


class _UpLevel(_Level):
    """Residual blocks, then upsampling if the level has factors."""

    def __init__(self, widths: Sequence[int], up_width: int, resolution: Resolution, layers: LayerOptions):
        super().__init__(widths, resolution, layers)
        factors = resolution.factors
        self.up = None if factors is None else Upsample(resolution.width, up_width, factors, layers)

    def __call__(self, x: Float[Array, "B t h w i"], inputs: BlockInputs) -> Float[Array, "B T H W o"]:
        y = self.apply_blocks(x, inputs)
        if self.up is None:
            return y
        y = self.up(y, inputs)
        return y + repeat_upsample(x, self.width, self.factors, is_first=inputs.is_first) if self.shortcuts else y


class _MiddleBlock(nnx.Module):
    def __init__(self, width: int, layers: LayerOptions, *, has_attention: bool):
        self.before = ResidualBlock(width, width, layers)
        self.attention = FrameAttention(width, layers) if has_attention else None
        self.after = ResidualBlock(width, width, layers)

    def __call__(self, x: Float[Array, "B t h w D"], inputs: BlockInputs) -> Float[Array, "B t h w D"]:
        x = self.before(x, inputs)
        x = x if self.attention is None else self.attention(x, inputs)
        return self.after(x, inputs)


class ConvVae(Vae):
    """A variational autoencoder: an encoder and a decoder made of levels, with linear maps to and from the latents."""

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        config: AutoencoderConfig,
        *,
        std: float | None,
        has_moments_map: bool = True,
        has_latents_map: bool = True,
        rngs: nnx.Rngs,
    ):
        """Create the model; `std` is its posterior's standard deviation, None if it is learned."""
        self.config, self.std, self.encoder, self.decoder = config, std, encoder, decoder
        channels = config.channels
        self.moments = Linear(2 * channels, 2 * channels, rngs=rngs) if has_moments_map else None
        self.latents = Linear(channels, channels, rngs=rngs) if has_latents_map else None
        self.normalizer = Normalizer(channels)

    def posterior(self, pixels: Pixels, segment_ids: SegmentIds = None, cache: ConvCache | None = None) -> Posterior:
        """Return the posterior of the latents before normalization. See `encode` for the arguments."""
        inputs = make_encoder_inputs(pixels, self.config.stride, segment_ids, cache)
        moments = self.encoder(pixels, inputs).astype(jnp.float32)
        moments = moments if self.moments is None else self.moments(moments)
        return Posterior.from_moments(moments, self.std)

    def reconstruct(self, latents: Latents, cache: ConvCache | None = None) -> Pixels:
        """Return the pixels of latents that are not normalized."""
        x = latents if self.latents is None else self.latents(latents)
        return self.decoder(x, BlockInputs(cache=cache)).astype(jnp.float32)


_EPSILON = 1e-12


@dataclass(frozen=True, kw_only=True)
class CausalVaeConfig(AutoencoderConfig):
    """Configuration of a causal VAE.

    Raises:
      UserError: If a factor is not 1 or 2, the numbers of levels and multipliers differ, the channels of shortcuts do
        not divide, or the form of convolutions is unknown.
    """

    channels: int = 16
    """Channels of the latents."""
    width: int = 96
    """Channels of the encoder's first level."""
    decoder_width: int | None = None
    """Channels of the decoder's last level; None uses `width`."""
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Multiples of the width, one per level."""
    factors: tuple[Grid, ...] = (Grid(1, 2, 2), Grid(2, 2, 2), Grid(2, 2, 2))
    """Downsampling factors along (t, h, w) between levels: 1 or 2."""
    blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    patch: int = 1
    """Side of the square cells of pixels that the first convolution sees as channels."""
    shortcuts: bool = False
    """True adds a path without parameters parallel to each level."""
    std: float | None = None
    """Fixed standard deviation of the latents in training; None learns one for each (the usual VAE). 0 is a plain
    autoencoder, whose latents have noise of about 3e-7: train it without a divergence."""
    bfloat16: bool = False
    """True stores features in bfloat16, with products summed in float32; parameters, norms and latents stay float32."""
    form: ConvForm = field(default="auto", metadata={"how": True})
    """Algorithm of convolutions: see `CausalConv`. To find the fastest for a device and width, run
    `tools/benchmark.py autoencoder --config CONFIG --set autoencoder.model.form=FORM`."""
    remat: bool = field(default=False, metadata={"how": True})
    """True recomputes residual blocks in the backward pass, which then stores only their inputs."""

    def __post_init__(self):
        if len(self.factors) != len(self.multipliers) - 1:
            raise UserError(f"{len(self.factors)} factors do not fit {len(self.multipliers)} multipliers: use one less")
        for factors in self.factors:
            if not set(factors) <= {1, 2} or factors.h != factors.w or factors.volume == 1:
                raise UserError(f"factors={tuple(factors)} is invalid: use 1 or 2, the same in h and w, not all 1")
        if min(self.channels, self.width, self.blocks, self.patch, *self.multipliers) < 1:
            raise UserError(f"{self} is invalid: use channels, width, blocks, patch and multipliers of at least 1")
        decoder_widths = self.widths(self.decoder_width or self.width)[1:]
        if not self.shortcuts and any(width % 2 for width in decoder_widths):
            raise UserError(f"decoder widths {decoder_widths} are invalid: use even widths, or shortcuts")
        if self.form not in get_args(ConvForm):
            raise UserError(f"form={self.form!r} is invalid: use one of {', '.join(get_args(ConvForm))}")
        check_std(self.std)
        self._check_shortcuts()

    def _check_shortcuts(self) -> None:
        down, up = self.widths(self.width), self.widths(self.decoder_width or self.width)
        levels = (*self.factors, Grid(1, 1, 1))
        for (width_in, width_out), factors in zip(zip((down[0], *down), down, strict=False), levels, strict=True):
            if self.shortcuts and width_in * factors.volume % width_out:
                raise UserError(
                    f"a shortcut from {width_in} to {width_out} channels by {tuple(factors)} does not divide; change "
                    "width or multipliers"
                )
        for width_in, width_out, factors in zip(up[:0:-1], up[-2::-1], self.factors[::-1], strict=True):
            if self.shortcuts and width_out * factors.volume % width_in:
                raise UserError(
                    f"a shortcut from {width_in} to {width_out} channels by {tuple(factors)} does not divide; change "
                    "decoder_width or multipliers"
                )

    @classmethod
    def wan21(cls) -> "CausalVaeConfig":
        """Return the VAE of Wan 2.1: 4×8×8 pixels to 16 channels, 127 M parameters."""
        return cls()

    @classmethod
    def wan22(cls) -> "CausalVaeConfig":
        """Return the VAE of Wan 2.2 TI2V-5B: 4×16×16 pixels to 48 channels, 705 M parameters."""
        return cls(channels=48, width=160, decoder_width=256, patch=2, shortcuts=True)

    @property
    def stride(self) -> Grid:
        """Return the pixels per latent along (t, h, w)."""
        t, h, w = (math.prod(factors[axis] for factors in self.factors) for axis in range(3))
        return Grid(t, h * self.patch, w * self.patch)

    @property
    def last_layer(self) -> str:
        return "decoder/conv_out/kernel"

    @property
    def dtype(self) -> jnp.dtype:
        """Return the dtype of products."""
        return jnp.dtype(jnp.bfloat16 if self.bfloat16 else jnp.float32)

    def widths(self, base: int) -> tuple[int, ...]:
        """Return the channels of every level for a network of `base` channels."""
        return tuple(base * multiplier for multiplier in self.multipliers)

    def list_resolutions(self, base: int) -> list[Resolution]:
        """Return the levels of a network of `base` channels, from the highest resolution to the lowest."""
        return list(map(Resolution, self.widths(base), (*self.factors, None)))

    def make_layers(self, norm: NormFactory, rngs: nnx.Rngs) -> LayerOptions:
        """Return the options of the layers, with these norms."""
        options: dict[str, Any] = {"blocks": self.blocks, "shortcuts": self.shortcuts, "halves": not self.shortcuts}
        options |= {"fused_attention": True, "remat": self.remat, "dtype": self.dtype, "rngs": rngs}
        return LayerOptions(norm=norm, kernel=(3, 3, 3), **options)

    def make(self, rngs: nnx.Rngs) -> ConvVae:
        encoder = CausalVaeEncoder(self, 2 * self.channels, rngs=rngs)
        decoder = CausalVaeDecoder(self, make_position_norm, rngs=rngs)
        return ConvVae(encoder, decoder, self, std=self.std, rngs=rngs)


class CausalVaeEncoder(Encoder):
    """An encoder from pixels to `features` features per latent position."""

    def __init__(self, config: CausalVaeConfig, features: int, *, rngs: nnx.Rngs):
        self.config = config
        sizes = {"channels": 3 * config.patch**2, "width": config.width, "features": features}
        layers = config.make_layers(make_position_norm, rngs)
        super().__init__(layers, config.list_resolutions(config.width), **sizes)
        set_conv_form(self, config.form)

    def __call__(self, pixels: Pixels, inputs: BlockInputs) -> Float[Array, "B t h w _"]:
        side = self.config.patch
        return super().__call__(rearrange(pixels, "B T (h a) (w b) C -> B T h w (C b a)", a=side, b=side), inputs)


class CausalVaeDecoder(Decoder):
    """A decoder from latents to pixels; `norm` makes its norms."""

    def __init__(self, config: CausalVaeConfig, norm: NormFactory, *, rngs: nnx.Rngs):
        self.config = config
        sizes = {"channels": config.channels, "features": 3 * config.patch**2}
        resolutions = config.list_resolutions(config.decoder_width or config.width)
        super().__init__(config.make_layers(norm, rngs), resolutions, **sizes)
        set_conv_form(self, config.form)

    def __call__(self, latents: Latents, inputs: BlockInputs) -> Pixels:
        x, side = super().__call__(latents, inputs), self.config.patch
        return rearrange(x, "B T h w (C b a) -> B T (h a) (w b) C", a=side, b=side)


class PositionNorm(RmsNorm):
    """An RMS norm over the channels of each position."""

    def __call__(self, x: Float[Array, "B t h w D"], inputs: BlockInputs) -> Float[Array, "B t h w D"]:  # type: ignore[override]
        return super().__call__(x)


def make_position_norm(width: int, _rngs: nnx.Rngs) -> PositionNorm:
    """Return a norm of the causal VAE."""
    return PositionNorm(width, eps=_EPSILON)
