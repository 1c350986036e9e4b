"""Encoders and decoders of levels of residual blocks: those of Stable Diffusion and Wan differ in their options only.

A convolution, one level per resolution, two residual blocks with attention between them in the middle, and a
convolution (arXiv 2112.10752, appendix G; arXiv 2503.20314, section 4.1).
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.models.autoencoders.blocks import (
    BlockInputs,
    Downsample,
    FrameAttention,
    LayerOptions,
    ResidualBlock,
    Upsample,
    average_downsample,
    make_encoder_inputs,
    repeat_upsample,
)
from dit_video.models.autoencoders.interface import AutoencoderConfig, Latents, Pixels, SegmentIds
from dit_video.models.autoencoders.posterior import Normalizer, Posterior, Vae
from dit_video.nn import ConvCache, Linear, rematerialize
from dit_video.tokens import Grid


class Resolution(NamedTuple):
    """Configuration of one level."""

    width: int
    """Channels."""
    factors: Grid | None
    """Factors along (t, h, w) by which the level ends; None keeps the resolution."""
    has_attention: bool = False
    """True adds attention after every residual block."""


class Encoder(nnx.Module):
    """Pixels to features, by levels of ever lower resolution."""

    def __init__(
        self, layers: LayerOptions, resolutions: Sequence[Resolution], *, channels: int = 3, width: int, features: int
    ):
        """Create the encoder of `channels` to `features` channels, with `width` after the first convolution.

        That is the base width whatever the first level's, as in the open models.
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
        """Create the decoder of `channels` to `features` channels; its levels are the reverse of `resolutions`."""
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
    """Residual blocks, then downsampling if it has factors."""

    def __init__(self, widths: Sequence[int], resolution: Resolution, layers: LayerOptions):
        super().__init__(widths, resolution, layers)
        factors = resolution.factors
        self.down = None if factors is None else Downsample(resolution.width, factors, layers)

    def __call__(self, x: Float[Array, "B T H W i"], inputs: BlockInputs) -> Float[Array, "B t h w o"]:
        y = self.apply_blocks(x, inputs)
        y = y if self.down is None else self.down(y, inputs)
        return y + average_downsample(x, self.width, self.factors, is_first=inputs.is_first) if self.shortcuts else y


class _UpLevel(_Level):
    """Residual blocks, then upsampling if it has factors."""

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
    """A variational autoencoder of an encoder and a decoder of levels, with linear maps to and from the latents."""

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
        """Create the model; `std` is that of its posterior, None if it is learned."""
        self.config, self.std, self.encoder, self.decoder = config, std, encoder, decoder
        channels = config.channels
        self.moments = Linear(2 * channels, 2 * channels, rngs=rngs) if has_moments_map else None
        self.latents = Linear(channels, channels, rngs=rngs) if has_latents_map else None
        self.normalizer = Normalizer(channels)

    def posterior(self, pixels: Pixels, segment_ids: SegmentIds = None, cache: ConvCache | None = None) -> Posterior:
        """Return the posterior of the latents, not normalized; arguments as those of `encode`."""
        inputs = make_encoder_inputs(pixels, self.config.stride, segment_ids, cache)
        moments = self.encoder(pixels, inputs).astype(jnp.float32)
        moments = moments if self.moments is None else self.moments(moments)
        return Posterior.from_moments(moments, self.std)

    def reconstruct(self, latents: Latents, cache: ConvCache | None = None) -> Pixels:
        """Return the pixels of latents that are not normalized."""
        x = latents if self.latents is None else self.latents(latents)
        return self.decoder(x, BlockInputs(cache=cache)).astype(jnp.float32)
