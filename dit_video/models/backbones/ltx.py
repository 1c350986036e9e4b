"""LTX-Video's transformer (arXiv 2501.00103) over packed rows.

It differs from `DiT` as follows: norms before attention and MLP are RMS norms without a scale, and there is none before
cross-attention; queries and keys are normalised over the full width; the rotary embedding spreads its frequencies over
the full width, so that every head has frequencies of its own, and rotates by a position's fraction of a fixed extent in
seconds and pixels; the time is projected once for all blocks, and the head's table is added to it before that.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError
from dit_video.models.backbones.blocks import TokenConditions, split_heads
from dit_video.models.backbones.protocol import BackboneConfig, ClipTokens, TimeCoordinate, count_tokens
from dit_video.models.backbones.transformer import TIME_FEATURES, TIME_SCALE, check_attention_patterns
from dit_video.models.conditioning import Conditioning, TextTokens
from dit_video.nn import (
    ONE_DEVICE,
    Attention,
    AttentionInputs,
    Backend,
    LayerGroup,
    LayerWrapper,
    Linear,
    Partitioner,
    Remat,
    RmsNorm,
    gelu,
    make_modulation_table,
    make_stack,
    modulate,
    rms_norm,
    scan_layers,
    sinusoidal_embedding,
)
from dit_video.nn.attention import Full, PatternChoice, check_attention, compute_grid_indices
from dit_video.tokens import Grid, PackedRows, rotate, take_tokens

_ROTARY_PERIOD, _QK_EPSILON = 10_000.0, 1e-5


@dataclass(frozen=True, kw_only=True)
class LtxDitConfig(BackboneConfig):
    """Configuration of LTX-Video's transformer; the defaults are for the versions with 2 billion parameters.

    Raises:
      UserError: If a size is below 1, the heads do not divide the width into even parts, an extent is not positive, or
        patterns do not divide the layers or the attention backend does not support them.
    """

    channels: int = 128
    context_width: int = 4096
    patch: Grid = Grid(1, 1, 1)
    width: int = 2048
    layers: int = 28
    heads: int = 32
    time: Literal["segment", "token"] = "token"
    """Diffusion time per token, as conditioning latents have times of their own; or per segment."""
    time_coordinate: TimeCoordinate = "seconds"
    """Time coordinate of positions: `frame seconds` from version 0.9.5 on."""
    extents: tuple[float, float, float] = (20.0, 64.0, 64.0)
    """Extents along (t, h, w) by which the rotary embedding divides positions, in the same units: 20 seconds, and 2048
    pixels, which are 64 latents of 32 pixels."""
    pattern: PatternChoice | tuple[PatternChoice, ...] = Full()
    attention: Backend = "auto"
    dtype: str = "float32"
    """Dtype of the matrix products; norms, modulation and the residual stream are float32."""
    remat: Remat = "none"

    def __post_init__(self):
        self.check_sizes()
        if self.width % self.heads or self.width // self.heads % 2:
            raise UserError(f"width {self.width} must be divisible by its {self.heads} heads in even parts; change one")
        if min(self.extents) <= 0:
            raise UserError(f"extents={self.extents} is invalid: they must be positive. Use (20, 64, 64).")
        check_attention_patterns(self.patterns, self.layers)
        check_attention(self.attention, *self.patterns)

    def count_multiplications(self, clip: ClipTokens, *, text: int, image: int) -> int:
        if image:
            raise UserError(f"LTX-Video reads no image tokens; leave out images, of which this clip has {image}")
        width, square, tokens = self.width, self.width**2, count_tokens(clip)
        block = 6 * square + 2 * width * self.mlp_dim
        times = tokens if self.time == "token" else 1
        conditions = times * (TIME_FEATURES * width + 7 * square)
        context = text * (self.context_width * width + square + self.layers * 2 * square)
        ends = tokens * width * 2 * self.token_width
        pairs = self.count_pairs(clip, text=text)
        return tokens * self.layers * block + ends + conditions + context + 2 * width * pairs

    def make(self, rngs: nnx.Rngs, partitioner: Partitioner = ONE_DEVICE) -> "LtxDit":
        return LtxDit(self, partitioner=partitioner, rngs=rngs)

    @classmethod
    def ltx_2b(cls, **fields: Any) -> "LtxDitConfig":
        """Return the config of LTX-Video 0.9.0 to 0.9.8 with 2 billion parameters."""
        return cls(**fields)

    @classmethod
    def ltx_13b(cls, **fields: Any) -> "LtxDitConfig":
        """Return the config of LTX-Video 0.9.7 and 0.9.8 with 13 billion parameters."""
        return cls(**{"width": 4096, "layers": 48} | fields)


class LtxInputs(NamedTuple):
    """Inputs of all blocks besides the tokens and the attention function."""

    condition: TokenConditions
    """Embedded times, from which the head is modulated."""
    modulation: TokenConditions
    """Modulation of the blocks, `B M 6 D`."""
    angles: Float[Array, "B N K half"]
    """Rotary angles of each head's queries and keys."""
    attention_inputs: AttentionInputs
    """Metadata for self-attention."""
    text: TextTokens
    """Embedded texts."""

    def take(self, kept: Int[Array, "B K"]) -> "LtxInputs":
        """Return the inputs of some of the tokens; see `TransformerInputs`."""
        return self._replace(
            condition=self.condition.take(kept),
            modulation=self.modulation.take(kept),
            angles=take_tokens(self.angles, kept),
            attention_inputs=self.attention_inputs.take(kept),
        )


class LtxDit(nnx.Module):
    """LTX-Video's transformer on packed rows, see `BlockBackbone`; its velocity points from data to noise."""

    def __init__(self, config: LtxDitConfig, *, partitioner: Partitioner = ONE_DEVICE, rngs: nnx.Rngs):
        self.config, self.partitioner = config, partitioner
        width, dtype = config.width, jnp.dtype(config.dtype)
        linear = functools.partial(Linear, partitioner=partitioner, rngs=rngs)
        self.embed = linear(config.token_width, width, dtype=dtype)
        self.text_in = linear(config.context_width, width, init="normal", dtype=dtype)
        self.text_out = linear(width, width, init="normal", dtype=dtype)
        self.time_in = linear(TIME_FEATURES, width, init="normal", precision="highest")
        self.time_out = linear(width, width, init="normal", precision="highest")
        # With a time per token, this is a large product.
        self.modulation = linear(width, 6 * width, precision="highest" if config.time == "segment" else None)
        self.blocks = make_stack(lambda r: LtxBlock(config, partitioner=partitioner, rngs=r), config.layers, rngs=rngs)
        self.head_table = make_modulation_table(2, width, rngs)
        self.head = linear(width, config.token_width, init="zero", precision="highest")

    def __call__(
        self,
        noisy: Float[Array, "B N p"],
        time: Float[Array, "B _"],
        layout: PackedRows,
        conditioning: Conditioning,
        state: Any = None,
    ) -> tuple[Float[Array, "B N p"], Any]:
        """Predict from noisy tokens; see `Backbone`."""
        conditioning.check(self.config.conditioning_kinds)
        x, inputs = self.embed_inputs(noisy, time, layout, conditioning)
        x, _ = self.apply_blocks(x, inputs)
        return self.apply_head(x, inputs), state

    def embed_inputs(
        self, noisy: Float[Array, "B N p"], time: Float[Array, "B _"], layout: PackedRows, conditioning: Conditioning
    ) -> tuple[Float[Array, "B N D"], LtxInputs]:
        """Return the embedded tokens, and the blocks' other inputs."""
        config, text = self.config, conditioning[TextTokens]
        segments, positions = jnp.asarray(layout.segments), jnp.asarray(layout.positions)
        embedded = self.time_out(nnx.silu(self.time_in(sinusoidal_embedding(TIME_SCALE * time, TIME_FEATURES))))
        condition = TokenConditions(embedded, segments if config.time == "segment" else None)
        modulation = self.modulation(nnx.silu(embedded)).reshape(*time.shape, 6, -1)
        indices = None if config.patterns == (Full(),) else compute_grid_indices(positions, segments)
        angles = compute_fraction_angles(positions, config.extents, width=config.width)
        inputs = LtxInputs(
            condition=condition,
            modulation=condition._replace(values=modulation),
            angles=angles.reshape(*angles.shape[:2], config.heads, -1),
            attention_inputs=AttentionInputs.self_attention(segments, indices, segment_count=layout.count),
            text=text._replace(values=self.text_out(gelu(self.text_in(text.values)))),
        )
        return self.embed(noisy).astype(jnp.float32), inputs

    def apply_blocks(
        self,
        x: Float[Array, "B N D"],
        inputs: LtxInputs,
        *,
        layers: slice = slice(None),
        wrapper: LayerWrapper | None = None,
        values: Any = None,
    ) -> tuple[Float[Array, "B N D"], Any]:
        """Apply all blocks, or a range of them; see `BlockBackbone`."""
        config = self.config
        contexts = [(inputs, self.partitioner.make_attention(config.attention, pattern)) for pattern in config.patterns]
        group = LayerGroup(self.blocks, contexts, wrapper, values)
        x, (outputs,) = scan_layers(x, [group], layers=layers, remat=config.remat)
        return x, outputs

    def apply_head(self, x: Float[Array, "B N D"], inputs: LtxInputs) -> Float[Array, "B N p"]:
        """Return the prediction."""
        shift_scale = inputs.condition.expand(inputs.condition.values[:, :, None] + self.head_table[...])
        return self.head(modulate(x, shift_scale[:, :, 0], shift_scale[:, :, 1]))


class LtxBlock(nnx.Module):
    """A block with self-attention, cross-attention to the text without a norm before it, and a tanh-GELU MLP.

    Rotary embedding rotates the channel pairs (j, j + d/2) of a head; in the files the channels of a pair are
    neighbours.
    """

    def __init__(self, config: LtxDitConfig, *, partitioner: Partitioner, rngs: nnx.Rngs):
        width = config.width
        linear = functools.partial(Linear, dtype=jnp.dtype(config.dtype), partitioner=partitioner, rngs=rngs)
        map_in = functools.partial(linear, width, width, split="outputs")
        map_out = functools.partial(linear, width, width, split="inputs")
        map_context = functools.partial(map_in, is_context=True)
        norm = functools.partial(RmsNorm, width, eps=_QK_EPSILON)
        self.heads = config.heads
        self.cross = partitioner.make_cross_attention(config.attention)
        self.table = make_modulation_table(6, width, rngs)
        self.query, self.key, self.value, self.out = map_in(), map_in(), map_in(), map_out()
        self.query_norm, self.key_norm = norm(), norm()
        self.cross_query, self.cross_key, self.cross_value = map_in(), map_context(), map_context()
        self.cross_out = map_out()
        self.cross_query_norm, self.cross_key_norm = norm(), norm()
        self.up = linear(width, config.mlp_dim, split="outputs")
        self.down = linear(config.mlp_dim, width, split="inputs")

    def __call__(self, x: Float[Array, "B N D"], inputs: LtxInputs, attention: Attention) -> Float[Array, "B N D"]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            inputs.modulation.expand(inputs.modulation.values[:, :, index] + self.table[...][index])
            for index in range(6)
        )
        x = x + gate * self._self_attention(rms_norm(x) * (1 + scale) + shift, inputs, attention)
        x = x + self._cross_attention(x, inputs)
        hidden = gelu(self.up(rms_norm(x) * (1 + mlp_scale) + mlp_shift))
        return x + mlp_gate * self.down(hidden).astype(jnp.float32)

    def _self_attention(self, x: Float[Array, "B N D"], inputs: LtxInputs, attention: Attention) -> Array:
        q = _rotate_heads(split_heads(self.query(x), self.query_norm, self.heads), inputs.angles)
        k = _rotate_heads(split_heads(self.key(x), self.key_norm, self.heads), inputs.angles)
        v = split_heads(self.value(x), None, self.heads)
        mixed = attention(q, k, v, inputs.attention_inputs)
        return self.out(mixed.reshape(x.shape)).astype(jnp.float32)

    def _cross_attention(self, x: Float[Array, "B N D"], inputs: LtxInputs) -> Array:
        text = inputs.text
        q = split_heads(self.cross_query(x), self.cross_query_norm, self.heads)
        k = split_heads(self.cross_key(text.values), self.cross_key_norm, self.heads)
        v = split_heads(self.cross_value(text.values), None, self.heads)
        mixed = self.cross(q, k, v, inputs.attention_inputs.with_context(text.segments))
        return self.cross_out(mixed.reshape(x.shape)).astype(jnp.float32)


def compute_fraction_angles(
    positions: Float[Array, "B N 3"], extents: tuple[float, float, float], *, width: int
) -> Float[Array, "B N half"]:
    """Return the angle of every pair of channels of the full width, in float32.

    Pairs take turns among (t, h, w), with frequencies from 1 to 10000 in units of a quarter turn for half an extent;
    positions run from -1 to 1. The first pairs, by which the width exceeds a multiple of 6, are not rotated.
    """
    count = width // 6
    frequencies = np.float32(_ROTARY_PERIOD) ** np.linspace(0, 1, count, dtype=np.float32) * np.float32(math.pi / 2)
    fractions = positions.astype(jnp.float32) / np.asarray(extents, np.float32) * 2 - 1
    angles = frequencies[:, None] * fractions[..., None, :]
    flat = angles.reshape(*positions.shape[:-1], 3 * count)
    return jnp.pad(flat, ((0, 0), (0, 0), (width // 2 - 3 * count, 0)))


def _rotate_heads(x: Float[Array, "B N K d"], angles: Float[Array, "B N K half"]) -> Float[Array, "B N K d"]:
    """Rotate the channel pairs of each head by its own angles."""
    rows, tokens, heads, half = angles.shape
    flat = rotate(x.reshape(rows, tokens * heads, 1, 2 * half), angles.reshape(rows, tokens * heads, half))
    return flat.reshape(x.shape)
