"""Blocks of LTX-Video's autoencoder (arXiv 2501.00103): RMS norms without a scale, noise, and residual resampling.

The encoder is causal, and encodes chunk by chunk. The decoder is not: its convolutions see one later frame each, so it
decodes a clip as a whole. It may also be the last denoising step: then the time modulates its blocks, and its residual
blocks add noise, the same for all frames and, but for a scale, for all channels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Key

from dit_video.models.autoencoders.blocks import BlockInputs, average_downsample
from dit_video.nn import CausalConv, LayerNorm, Linear, make_modulation_table, rms_norm, sinusoidal_embedding
from dit_video.tokens import Grid

NORM_EPSILON = 1e-8
_SHORTCUT_EPSILON, _TIME_FEATURES = 1e-6, 256


class SpatialNoise:
    """A source of noise for a decoder's layers, in the order in which they are called; one object serves one call."""

    def __init__(self, keys: Key[Array, " B"]):
        self._keys, self._drawn = keys, 0

    def draw(self, x: Float[Array, "B t h w D"]) -> Float[Array, "B 1 h w 1"]:
        """Return standard normal noise for the positions of a frame, of each clip by its key."""
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
        # at the last frame before it. Rows and columns are padded before, too, other than `CausalConv` does.
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
    """Two times norm, modulation, SiLU, a convolution and noise, added to the identity or a projection."""

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
    """Downsampling by moving pixels into channels, of a convolution and, averaged, of the features themselves."""

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
    """Upsampling by 2 along all axes by moving channels into pixels, of a convolution and perhaps of the features."""

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
        """Move channels into pixels; of the two frames that the first one makes, the second is kept."""
        return rearrange(x, "B t h w (i a b c) -> B (t a) (h b) (w c) i", a=2, b=2, c=2)[:, 1:]


def modulate_features(
    x: Float[Array, "B t h w D"], shift_scale: Float[Array, "B 2 D"] | None
) -> Float[Array, "B t h w D"]:
    """Return `x * (1 + scale) + shift`, of each clip; the features themselves if there is none."""
    if shift_scale is None:
        return x
    shift, scale = (shift_scale[:, part, None, None, None] for part in range(2))
    return x * (1 + scale) + shift
