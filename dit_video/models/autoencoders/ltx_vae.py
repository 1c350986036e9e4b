"""LTX-Video's autoencoder (arXiv 2501.00103, section 2): 8×32×32 pixels to 128 channels, one token of a transformer.

From version 0.9.1 on, the decoder is also the last denoising step: latents get a little noise, and the decoder gets
their time.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Key

from dit_video.core.errors import UserError
from dit_video.models.autoencoders.config import AutoencoderConfig
from dit_video.models.autoencoders.interface import Latents, Normalizer, Pixels, Posterior, SegmentIds, Vae
from dit_video.models.autoencoders.vae import BlockInputs, average_downsample, make_encoder_inputs
from dit_video.nn import CausalConv, ConvCache, LayerNorm, Linear, make_modulation_table, rms_norm, sinusoidal_embedding
from dit_video.tokens import Grid

NORM_EPSILON = 1e-8
_SHORTCUT_EPSILON, _TIME_FEATURES = 1e-6, 256


class SpatialNoise:
    """A source of noise for a decoder's layers, in the order in which they are called; one object serves one call."""

    def __init__(self, keys: Key[Array, " B"]):
        self._keys, self._drawn = keys, 0

    def draw(self, x: Float[Array, "B t h w D"]) -> Float[Array, "B 1 h w 1"]:
        """Return standard normal noise for the positions of a frame, drawn for each clip from its key."""
        keys = jax.vmap(jax.random.fold_in, (0, None))(self._keys, self._drawn)
        self._drawn += 1
        return jax.vmap(lambda key: jax.random.normal(key, (1, *x.shape[2:4], 1)))(keys)


class DecoderInputs(NamedTuple):
    """Inputs of a decoder's blocks in addition to the features."""

    model_time: Float[Array, " B"] | None = None
    """Time of each clip in the unit of the time embeddings; None for a decoder that is not conditioned on it."""
    noise: SpatialNoise | None = None
    """Source of noise for the layers that add it; None adds none."""


class EncoderConv(CausalConv):
    """A causal convolution of an encoder, with a kernel of 3 or 1, or `step` 2 along all axes, padded on both sides."""

    def __init__(self, width_in: int, width_out: int, *, size: int = 3, step: int = 1, rngs: nnx.Rngs):
        super().__init__(width_in, width_out, (size, size, size), stride=2 if step == 2 else 1, rngs=rngs)
        self.step = step

    def apply(self, x: Float[Array, "B t h w i"], inputs: BlockInputs) -> Float[Array, "B _ _ _ o"]:
        """Convolve a clip or a chunk of it; gaps between the clips of a canvas are seen as zeros."""
        x = inputs.mask_gaps(x)
        if self.step == 1:
            return self(x, inputs.cache)
        # A window begins at every second frame: the first one at two copies of the first frame, a later chunk's first
        # at the last frame before it. Rows and columns are padded before, too, unlike in `CausalConv`.
        if inputs.is_first:
            x = jnp.concatenate([x[:, :1], x], axis=1)
        x = jnp.concatenate([x[:, :1], x], axis=1) if inputs.cache is None else inputs.cache.prepend(x[:, :1], x)
        return self.convolve_valid(jnp.pad(x, ((0, 0), (0, 0), (1, 0), (1, 0), (0, 0))), step=2)


class DecoderConv(CausalConv):
    """A convolution of a decoder, padded with copies of the first and of the last frame."""

    def __init__(self, width_in: int, width_out: int, *, size: int = 3, rngs: nnx.Rngs):
        super().__init__(width_in, width_out, (size, size, size), rngs=rngs)

    def apply(self, x: Float[Array, "B t h w i"], inputs: DecoderInputs) -> Float[Array, "B t h w o"]:
        """Convolve a clip."""
        if self.kernel.shape[0] == 1:
            return self.convolve_valid(x)
        return self.convolve_valid(jnp.concatenate([x[:, :1], x, x[:, -1:]], axis=1))


class LtxResidualBlock(nnx.Module):
    """Norm, modulation, SiLU, a convolution and noise, twice, added to the identity or a projection."""

    def __init__(
        self,
        conv: type[EncoderConv | DecoderConv],
        width_in: int,
        width_out: int,
        *,
        has_noise: bool = False,
        has_time: bool = False,
        rngs: nnx.Rngs,
    ):
        self.conv_in, self.conv_out = conv(width_in, width_out, rngs=rngs), conv(width_out, width_out, rngs=rngs)
        self.noise_in, self.noise_out = (
            nnx.Param(jnp.zeros((width_out,), jnp.float32)) if has_noise else None for _ in range(2)
        )
        self.table = make_modulation_table(4, width_in, rngs) if has_time else None
        has_projection = width_in != width_out
        self.shortcut_norm = LayerNorm(width_in, eps=_SHORTCUT_EPSILON) if has_projection else None
        self.shortcut = conv(width_in, width_out, size=1, rngs=rngs) if has_projection else None

    def __call__(
        self, x: Float[Array, "B t h w i"], inputs: Any, modulation: Float[Array, "B 4 i"] | None = None
    ) -> Float[Array, "B t h w o"]:
        y, first, second = rms_norm(x, eps=NORM_EPSILON), None, None
        if self.table is not None and modulation is not None:
            shifts_scales = modulation + self.table[...]
            first, second = shifts_scales[:, :2], shifts_scales[:, 2:]
        y = self.conv_in.apply(jax.nn.silu(modulate_features(y, first)), inputs)
        y = rms_norm(self._add_noise(y, self.noise_in, inputs), eps=NORM_EPSILON)
        y = self.conv_out.apply(jax.nn.silu(modulate_features(y, second)), inputs)
        y = self._add_noise(y, self.noise_out, inputs)
        if self.shortcut_norm is not None and self.shortcut is not None:
            x = self.shortcut.apply(self.shortcut_norm(x), inputs)
        return x + y

    def _add_noise(
        self, x: Float[Array, "B t h w D"], scale: nnx.Param | None, inputs: Any
    ) -> Float[Array, "B t h w D"]:
        return x if scale is None or inputs.noise is None else x + inputs.noise.draw(x) * scale[...]


class DecoderTimeEmbedding(nnx.Module):
    """An embedding of the decoder's time as shifts and scales of features."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.time_in, self.time_out = Linear(_TIME_FEATURES, width, rngs=rngs), Linear(width, width, rngs=rngs)

    def __call__(self, model_time: Float[Array, " B"], parts: int) -> Float[Array, "B {parts} D"]:
        features = sinusoidal_embedding(model_time, _TIME_FEATURES)
        embedded = self.time_out(nnx.silu(self.time_in(features)))
        return embedded.reshape(len(model_time), parts, -1)


class ResidualDownsample(nnx.Module):
    """Downsampling by moving pixels into channels: a convolution's output plus the averaged features themselves."""

    def __init__(self, width_in: int, width_out: int, factors: Grid, *, rngs: nnx.Rngs):
        self.factors, self.width = factors, width_out
        self.conv = EncoderConv(width_in, width_out // factors.volume, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W i"], inputs: BlockInputs) -> Float[Array, "B t h w o"]:
        t, h, w = self.factors
        if inputs.is_first:  # the first frame fills a cell of its own
            x = jnp.concatenate([x[:, : t - 1], x], axis=1)
        y = self.conv.apply(x, inputs)
        cells = rearrange(y, "B (t a) (h b) (w c) i -> B t h w (i a b c)", a=t, b=h, c=w)
        return cells + average_downsample(x, self.width, self.factors, is_first=False)


class ShuffleUpsample(nnx.Module):
    """Upsampling by 2 along all axes by moving channels into pixels: a convolution's, and perhaps the features' own."""

    def __init__(self, width_in: int, width_out: int, *, is_residual: bool, rngs: nnx.Rngs):
        self.is_residual, self.width = is_residual, width_out
        self.conv = DecoderConv(width_in, 8 * width_out, rngs=rngs)

    def __call__(self, x: Float[Array, "B t h w i"], inputs: DecoderInputs) -> Float[Array, "B T H W o"]:
        y = self._to_pixels(self.conv.apply(x, inputs))
        if not self.is_residual:
            return y
        residual = self._to_pixels(x)
        return y + jnp.tile(residual, self.width // residual.shape[-1])

    def _to_pixels(self, x: Float[Array, "B t h w i"]) -> Float[Array, "B T H W _"]:
        """Move channels into pixels; the first frame makes two, and only the second is kept."""
        return rearrange(x, "B t h w (i a b c) -> B (t a) (h b) (w c) i", a=2, b=2, c=2)[:, 1:]


def modulate_features(
    x: Float[Array, "B t h w D"], shift_scale: Float[Array, "B 2 D"] | None
) -> Float[Array, "B t h w D"]:
    """Return `x * (1 + scale) + shift` for each clip; the features themselves if there is no modulation."""
    if shift_scale is None:
        return x
    shift, scale = (shift_scale[:, part, None, None, None] for part in range(2))
    return x * (1 + scale) + shift


Downsampling = Literal["none", "conv", "spatial", "temporal", "spatiotemporal"]
"""How an encoder's level ends: with nothing or a convolution, followed by a block to the next width; or with residual
downsampling along the named axes."""
_FACTORS: dict[Downsampling, Grid] = {
    "none": Grid(1, 1, 1),
    "conv": Grid(2, 2, 2),
    "spatial": Grid(1, 2, 2),
    "temporal": Grid(2, 1, 1),
    "spatiotemporal": Grid(2, 2, 2),
}


@dataclass(frozen=True, kw_only=True)
class LtxVaeConfig(AutoencoderConfig):
    """Configuration of LTX-Video's autoencoder; the defaults are version 0.9.0's.

    Levels, the decoder's too, are in the order of diffusers' settings: from the highest resolution to the lowest.

    Raises:
      UserError: If numbers of levels differ, widths do not divide, a size is below 1, two kinds of downsampling are
        mixed, the decoder does not undo the encoder's strides, a decoder with a time changes its width in a block, or a
        time or a share of noise is outside [0, 1].
    """

    channels: int = 128
    """Channels of the latents."""
    patch: int = 4
    """Side of the square cells of pixels that the first convolution sees as channels."""
    widths: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of the encoder's levels; with residual downsampling, also those after the last one."""
    blocks: tuple[int, ...] = (4, 3, 3, 3, 4)
    """Residual blocks of the encoder's levels, and of its middle."""
    downsampling: tuple[Downsampling, ...] = ("conv", "conv", "conv", "none")
    """End of each of the encoder's levels."""
    decoder_widths: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of the decoder's levels before they are divided by their `upsample_factors`."""
    decoder_blocks: tuple[int, ...] = (4, 3, 3, 3, 4)
    """Residual blocks of the decoder's levels, and of its middle."""
    upsampling: tuple[bool, ...] = (True, True, True, False)
    """True for the decoder's levels that begin by upsampling by 2 along all axes."""
    upsample_factors: tuple[int, ...] = (1, 1, 1, 1)
    """Factors by which upsampling of each of the decoder's levels divides the channels."""
    upsample_residuals: tuple[bool, ...] = (False, False, False, False)
    """True for the decoder's levels whose upsampling has a path without parameters."""
    noise: tuple[bool, ...] = (False, False, False, False, False)
    """True for the decoder's levels, and its middle, whose residual blocks add noise."""
    has_time: bool = False
    """True for a decoder that is conditioned on a time."""
    decode_time: float = 0.05
    """Diffusion time at which latents are decoded, if the decoder is conditioned on it."""
    decode_noise: float = 0.025
    """Share of noise in decoded latents, if the decoder is conditioned on a time (0.025 at time 0.05 in the authors'
    configs)."""

    is_decoder_symmetric = True

    def __post_init__(self):
        sizes = (self.channels, self.patch, *self.widths, *self.decoder_widths, *self.upsample_factors)
        if min(*sizes) < 1 or min(*self.blocks, *self.decoder_blocks) < 0:
            raise UserError(
                f"{self} is invalid: use channels, patch, widths and factors of at least 1, and blocks >= 0"
            )
        if not (0 <= self.decode_time <= 1 and 0 <= self.decode_noise <= 1):
            values = f"decode_time={self.decode_time}, decode_noise={self.decode_noise}"
            raise UserError(f"{values} is invalid: both must lie in [0, 1]. Use 0.05 and 0.025.")
        self._check_encoder()
        self._check_decoder()

    def _check_encoder(self) -> None:
        kinds, levels = set(self.downsampling), len(self.downsampling)
        if not (kinds <= {"none", "conv"} or kinds <= set(get_args(Downsampling)[2:])):
            raise UserError(
                f"downsampling={self.downsampling} is invalid: use none and conv, or spatial, temporal, spatiotemporal"
            )
        if len(self.widths) != levels + self.has_residual_downsampling or len(self.blocks) != levels + 1:
            raise UserError(f"widths={self.widths}, blocks={self.blocks} do not fit {levels} levels of downsampling")
        residual = self.downsampling if self.has_residual_downsampling else ()
        for kind, width, after in zip(residual, self.widths, self.widths[1:], strict=False):
            volume = _FACTORS[kind].volume
            if after % volume or width * volume % after:
                raise UserError(f"{kind} downsampling of {width} to {after} channels does not divide; change widths")

    def _check_decoder(self) -> None:
        levels = len(self.decoder_widths)
        lengths = (len(self.upsampling), len(self.upsample_factors), len(self.upsample_residuals))
        if {*lengths, len(self.decoder_blocks) - 1, len(self.noise) - 1} != {levels}:
            raise UserError(
                f"decoder_widths={self.decoder_widths} are {levels} levels: upsampling, upsample_factors and "
                "upsample_residuals must be as many, decoder_blocks and noise one more"
            )
        factor = 2 ** sum(self.upsampling)
        if Grid(factor, factor * self.patch, factor * self.patch) != self.stride:
            raise UserError(
                f"upsampling={self.upsampling} undoes strides of {factor} in time and {factor * self.patch} in space, "
                f"not the encoder's {tuple(self.stride)}; use as many levels of each"
            )
        for level, (start, width) in enumerate(self.list_decoder_widths()):
            if (self.has_time or self.noise[-2 - level]) and start != width:
                fix = "keep them, or use neither time nor noise"
                raise UserError(f"decoder level {level} goes from {start} to {width} channels in a block; {fix}")

    @classmethod
    def ltx_090(cls) -> "LtxVaeConfig":
        """Return the autoencoder of LTX-Video 0.9.0."""
        return cls()

    @classmethod
    def ltx_091(cls) -> "LtxVaeConfig":
        """Return the autoencoder of LTX-Video 0.9.1."""
        return cls(
            decoder_widths=(256, 512, 1024),
            decoder_blocks=(5, 6, 7, 8),
            upsampling=(True,) * 3,
            upsample_factors=(2,) * 3,
            upsample_residuals=(True,) * 3,
            noise=(True, True, True, False),
            has_time=True,
        )

    @classmethod
    def ltx_095(cls) -> "LtxVaeConfig":
        """Return the autoencoder of LTX-Video 0.9.5 to 0.9.8."""
        return cls(
            widths=(128, 256, 512, 1024, 2048),
            blocks=(4, 6, 6, 2, 2),
            downsampling=("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
            decoder_widths=(256, 512, 1024),
            decoder_blocks=(5, 5, 5, 5),
            upsampling=(True,) * 3,
            upsample_factors=(2,) * 3,
            upsample_residuals=(True,) * 3,
            noise=(False,) * 4,
            has_time=True,
        )

    @property
    def stride(self) -> Grid:
        """Return the pixels per latent along (t, h, w)."""
        t, h, w = (math.prod(_FACTORS[kind][axis] for kind in self.downsampling) for axis in range(3))
        return Grid(t, h * self.patch, w * self.patch)

    @property
    def last_layer(self) -> str:
        return "decoder/conv_out/kernel"

    @property
    def has_residual_downsampling(self) -> bool:
        """Return True if the encoder's levels end by residual downsampling, without convolutions of their own."""
        return not set(self.downsampling) <= {"none", "conv"}

    def list_decoder_widths(self) -> list[tuple[int, int]]:
        """Return the channels before and in each of the decoder's levels, from the lowest resolution to the highest."""
        widths, start = [], self.decoder_widths[-1]
        for width, factor in zip(self.decoder_widths[::-1], self.upsample_factors[::-1], strict=True):
            widths.append((start // factor, width // factor))
            start = width // factor
        return widths

    def make(self, rngs: nnx.Rngs) -> "LtxVae":
        return LtxVae(self, rngs=rngs)


class LtxVae(Vae):
    """A VAE from pixels in [-1, 1] to normalised latents and back."""

    def __init__(self, config: LtxVaeConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder, self.decoder = LtxEncoder(config, rngs=rngs), LtxDecoder(config, rngs=rngs)
        self.normalizer = Normalizer(config.channels)

    def posterior(self, pixels: Pixels, segment_ids: SegmentIds = None, cache: ConvCache | None = None) -> Posterior:
        """Return the distribution of latents before normalisation, with one variance for all channels of a position."""
        inputs = make_encoder_inputs(pixels, self.config.stride, segment_ids, cache)
        moments = self.encoder(pixels, inputs)
        mean = moments[..., :-1]
        log_variance = jnp.broadcast_to(moments[..., -1:], mean.shape)
        return Posterior.from_moments(jnp.concatenate([mean, log_variance], axis=-1), None)

    def reconstruct(
        self,
        latents: Latents,
        cache: ConvCache | None = None,
        *,
        time: Float[Array, ""] | float | None = None,
        keys: Key[Array, " B"] | None = None,
    ) -> Pixels:
        """Return pixels from latents of a whole clip that are not normalised.

        Args:
          latents: The latents, with noise of `time`.
          cache: Unused, as the decoder sees later frames.
          time: Diffusion time of the latents, if the decoder is conditioned on it; 0 by default.
          keys: Keys of the clips for the noise that layers add; None adds none.
        """
        model_time = jnp.broadcast_to(jnp.asarray(0.0 if time is None else time), latents.shape[:1])
        return self.decoder(latents, model_time, None if keys is None else SpatialNoise(keys))

    def decode(
        self,
        latents: Latents,
        cache: ConvCache | None = None,
        *,
        time: Float[Array, ""] | float | None = None,
        keys: Key[Array, " B"] | None = None,
    ) -> Pixels:
        """Return pixels, approximately in [-1, 1], of the normalised latents of a clip.

        If the decoder is conditioned on a time, latents first get a share `decode_noise` of noise if there are keys.
        """
        latents, share = self.normalizer.denormalize(latents), self.config.decode_noise
        if keys is not None and self.config.has_time:
            noise_keys, keys = jax.vmap(lambda key: jax.random.split(key, 2), out_axes=1)(keys)
            noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(noise_keys)
            latents = (1 - share) * latents + share * noise
        return self.reconstruct(latents, cache, time=time, keys=keys)


class LtxEncoder(nnx.Module):
    """Pixels to the means of latents, followed by one log variance."""

    def __init__(self, config: LtxVaeConfig, *, rngs: nnx.Rngs):
        self.patch = config.patch
        self.conv_in = EncoderConv(3 * config.patch**2, config.widths[0], rngs=rngs)
        starts, ends = config.widths, (*config.widths[1:], config.widths[-1])
        levels = zip(starts, ends, config.blocks, config.downsampling, strict=False)
        self.levels = nnx.List([_EncoderLevel(*level, rngs=rngs) for level in levels])
        last = config.widths[-1]
        self.middle = nnx.List([LtxResidualBlock(EncoderConv, last, last, rngs=rngs) for _ in range(config.blocks[-1])])
        self.conv_out = EncoderConv(last, config.channels + 1, rngs=rngs)

    def __call__(self, pixels: Pixels, inputs: BlockInputs) -> Float[Array, "B t h w _"]:
        x = rearrange(pixels, "B T (h a) (w b) C -> B T h w (C b a)", a=self.patch, b=self.patch)
        x = self.conv_in.apply(x, inputs)
        for block in (*self.levels, *self.middle):
            x = block(x, inputs)
        return self.conv_out.apply(jax.nn.silu(rms_norm(x, eps=NORM_EPSILON)), inputs)


class _EncoderLevel(nnx.Module):
    """Residual blocks of one resolution, then downsampling and, unless that is residual, a block to the next width."""

    def __init__(self, width: int, next_width: int, blocks: int, downsampling: Downsampling, *, rngs: nnx.Rngs):
        factors, is_residual = _FACTORS[downsampling], downsampling not in ("none", "conv")
        self.blocks = nnx.List([LtxResidualBlock(EncoderConv, width, width, rngs=rngs) for _ in range(blocks)])
        self.down = EncoderConv(width, width, step=2, rngs=rngs) if downsampling == "conv" else None
        self.residual_down = ResidualDownsample(width, next_width, factors, rngs=rngs) if is_residual else None
        has_widening = not is_residual and width != next_width
        self.widen = LtxResidualBlock(EncoderConv, width, next_width, rngs=rngs) if has_widening else None

    def __call__(self, x: Float[Array, "B T H W i"], inputs: BlockInputs) -> Float[Array, "B t h w o"]:
        for block in self.blocks:
            x = block(x, inputs)
        x = x if self.down is None else self.down.apply(x, inputs)
        x = x if self.residual_down is None else self.residual_down(x, inputs)
        return x if self.widen is None else self.widen(x, inputs)


class LtxDecoder(nnx.Module):
    """Latents to pixels."""

    def __init__(self, config: LtxVaeConfig, *, rngs: nnx.Rngs):
        self.patch = config.patch
        first, last, has_time = config.decoder_widths[-1], config.list_decoder_widths()[-1][1], config.has_time
        self.conv_in = DecoderConv(config.channels, first, rngs=rngs)
        self.middle = _DecoderBlocks(first, config.decoder_blocks[-1], config.noise[-1], has_time, rngs=rngs)
        self.levels = nnx.List([_DecoderLevel(config, level, rngs=rngs) for level in range(len(config.decoder_widths))])
        self.conv_out = DecoderConv(last, 3 * config.patch**2, rngs=rngs)
        self.time_scale = nnx.Param(jnp.asarray(1000.0)) if has_time else None
        self.time = DecoderTimeEmbedding(2 * last, rngs=rngs) if has_time else None
        self.table = make_modulation_table(2, last, rngs) if has_time else None

    def __call__(self, latents: Latents, time: Float[Array, " B"], noise: SpatialNoise | None) -> Pixels:
        inputs = DecoderInputs(None if self.time_scale is None else time * self.time_scale[...], noise)
        x = self.middle(self.conv_in.apply(latents, inputs), inputs)
        for level in self.levels:
            x = level(x, inputs)
        x, shift_scale = rms_norm(x, eps=NORM_EPSILON), None
        if self.time is not None and self.table is not None and inputs.model_time is not None:
            shift_scale = self.time(inputs.model_time, 2) + self.table[...]
        x = self.conv_out.apply(jax.nn.silu(modulate_features(x, shift_scale)), inputs)
        return rearrange(x, "B T h w (C b a) -> B T (h a) (w b) C", a=self.patch, b=self.patch)


class _DecoderBlocks(nnx.Module):
    """Residual blocks of one width, which share an embedding of the time."""

    def __init__(self, width: int, blocks: int, has_noise: bool, has_time: bool, *, rngs: nnx.Rngs):
        options = {"has_noise": has_noise, "has_time": has_time}
        self.time = DecoderTimeEmbedding(4 * width, rngs=rngs) if has_time else None
        self.blocks = nnx.List(
            [LtxResidualBlock(DecoderConv, width, width, rngs=rngs, **options) for _ in range(blocks)]
        )

    def __call__(self, x: Float[Array, "B t h w D"], inputs: DecoderInputs) -> Float[Array, "B t h w D"]:
        modulation = None
        if self.time is not None and inputs.model_time is not None:
            modulation = self.time(inputs.model_time, 4)
        for block in self.blocks:
            x = block(x, inputs, modulation)
        return x


class _DecoderLevel(nnx.Module):
    """A block to the level's width if it changes, upsampling, then residual blocks."""

    def __init__(self, config: LtxVaeConfig, level: int, *, rngs: nnx.Rngs):
        index = len(config.decoder_widths) - 1 - level
        start, width = config.list_decoder_widths()[level]
        is_residual = config.upsample_residuals[index]
        wide = width * config.upsample_factors[index]
        self.narrow = None if start == width else LtxResidualBlock(DecoderConv, start, width, rngs=rngs)
        self.up = ShuffleUpsample(wide, width, is_residual=is_residual, rngs=rngs) if config.upsampling[index] else None
        self.inner = _DecoderBlocks(
            width, config.decoder_blocks[index], config.noise[index], config.has_time, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B t h w i"], inputs: DecoderInputs) -> Float[Array, "B T H W o"]:
        x = x if self.narrow is None else self.narrow(x, inputs)
        x = x if self.up is None else self.up(x, inputs)
        return self.inner(x, inputs)
