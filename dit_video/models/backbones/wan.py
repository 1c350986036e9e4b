"""Wan's transformer (arXiv 2503.20314; Wan 2.1 and 2.2) over packed rows.

It differs from `DiT` as follows: queries and keys are normalised over the full width; the time is projected once for
all blocks, and the head's table is added to the time before that projection; the norm before the ungated
cross-attention is learned; text is padded with zeros to a fixed length, and the padding is attended to.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.backbones.blocks import TokenConditions, split_heads
from dit_video.models.backbones.protocol import (
    BackboneConfig,
    ClipTimes,
    ClipTokens,
    count_self_pairs,
    count_tokens,
    widen_kernel,
)
from dit_video.models.backbones.transformer import TIME_SCALE, check_attention_patterns
from dit_video.models.conditioning import Conditioning, ConditioningLatents, ImageTokens, TextTokens
from dit_video.nn import (
    ONE_DEVICE,
    Attention,
    AttentionInputs,
    Backend,
    LayerGroup,
    LayerNorm,
    LayerWrapper,
    Linear,
    Partitioner,
    Remat,
    RmsNorm,
    gelu,
    make_modulation_table,
    make_stack,
    modulate,
    scan_layers,
    sinusoidal_embedding,
)
from dit_video.nn.attention import Full, PatternChoice, check_attention, compute_grid_indices
from dit_video.tokens import (
    Grid,
    PackedRows,
    Rotary3d,
    compute_rotary_angles,
    compute_segment_offsets,
    rotate,
    take_tokens,
)


@dataclass(frozen=True, kw_only=True)
class WanDitConfig(BackboneConfig):
    """Configuration of Wan's transformer; the defaults are Wan 2.1 T2V 1.3B's.

    Raises:
      UserError: If a size or the text length is below 1, the heads do not divide the width into even parts, there are
        image positions without an image width, a factor of positions is not positive, or patterns do not divide the
        layers or the attention backend does not support them.
    """

    channels: int = 16
    """Number of latent channels."""
    cond_channels: int = 0
    """Number of channels of clean latents and masks (`ConditioningLatents`); 20 in image-to-video models."""
    context_width: int = 4096
    """Width of the text encoder's output (E)."""
    text_length: int = 512
    """Number of tokens to which a text is padded with zeros."""
    image_width: int | None = None
    """Width of the image encoder's output (F); None for models without image tokens."""
    image_positions: int | None = None
    """Number of learned positions of image tokens, for the first and the last frame together."""
    patch: Grid = Grid(1, 2, 2)
    width: int = 1536
    mlp_dim: int = 8960
    """Hidden width of the MLP."""
    layers: int = 30
    heads: int = 12
    time_width: int = 256
    """Number of sines and cosines of the time."""
    time: Literal["segment", "token"] = "segment"
    """Diffusion time per segment, or per token as in TI2V-5B, whose first latent frame can be known and at time 0."""
    accepts_clip_times: ClassVar[bool] = True
    position_scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Factors of positions (t, h, w), see `Rotary3d.scale`: trained rate / new rate of frames for clips of another
    rate, or trained extent / new extent for clips that are longer or larger than in training (arXiv 2306.15595)."""
    position_stretch: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Ratios new extent / trained extent, see `Rotary3d.stretch`: only slow rotations are slowed, so that longer clips
    repeat less while neighbouring frames stay apart, as RIFLEx does with one of them (arXiv 2502.15894)."""
    pattern: PatternChoice | tuple[PatternChoice, ...] = Full()
    """Pattern of self-attention, or several that the layers use in turn."""
    attention: Backend = "auto"
    dtype: str = "float32"
    """Dtype of the matrix products; norms, modulation and the residual stream are float32."""
    remat: Remat = "none"

    def __post_init__(self):
        self.check_sizes()
        if self.width % self.heads or self.width // self.heads % 2:
            raise UserError(f"width {self.width} must be divisible by its {self.heads} heads in even parts; change one")
        check_at_least(1, text_length=self.text_length)
        if self.image_positions is not None and self.image_width is None:
            raise UserError(f"image_positions={self.image_positions} needs image tokens; set image_width")
        _ = self.rotary_embedding  # Its constructor checks the factors.
        check_attention_patterns(self.patterns, self.layers)
        check_attention(self.attention, *self.patterns)

    @property
    def max_text_tokens(self) -> int:
        return self.text_length

    @property
    def rotary_embedding(self) -> Rotary3d:
        even = Rotary3d.even(self.width // self.heads)
        return dataclasses.replace(even, scale=self.position_scale, stretch=self.position_stretch)

    @property
    def block_count(self) -> int:
        """Return the number of all blocks of the model."""
        return self.layers

    def count_pairs(self, clip: ClipTokens, *, text: int) -> int:
        cross_pairs = count_tokens(clip) * self.text_length  # whatever the text, which is padded
        return round(self.block_count * (count_self_pairs(self, clip, 0) + cross_pairs))

    def count_multiplications(self, clip: ClipTokens, *, text: int, image: int) -> int:
        width, layers, square = self.width, self.block_count, self.width**2
        tokens = count_tokens(clip)
        if image and self.image_width is None:
            raise UserError(f"image_width=None has no image tokens; leave out images, of which this clip has {image}")
        block = 6 * square + 2 * width * self.mlp_dim
        ends = tokens * width * (2 * self.token_width + self.cond_width)
        times = 2 if self.time == "token" else 1  # for noisy and for clean tokens; see `ClipTimes`
        conditions = times * (self.time_width * width + 7 * square)
        context = text * (self.context_width * width + square + layers * 2 * square)
        if self.image_width is not None:
            context += image * (self.image_width**2 + self.image_width * width + layers * 2 * square)
        pairs = self.count_pairs(clip, text=text) + layers * tokens * image
        return tokens * layers * block + ends + conditions + context + 2 * width * pairs

    def widen_conditioning(self, leaves: dict[str, Array], channels: int) -> dict[str, Array]:
        kernel = widen_kernel(leaves["embed/kernel"], self.patch.volume, self.channels + channels)
        return leaves | {"embed/kernel": kernel}

    def make(self, rngs: nnx.Rngs, partitioner: Partitioner = ONE_DEVICE) -> "WanDit":
        return WanDit(self, partitioner=partitioner, rngs=rngs)

    @classmethod
    def t2v_1_3b(cls, **fields: Any) -> "WanDitConfig":
        """Return the config of Wan 2.1 T2V 1.3B."""
        return cls(**fields)

    @classmethod
    def t2v_14b(cls, **fields: Any) -> "WanDitConfig":
        """Return the config of Wan 2.1 T2V 14B, and of both experts of Wan 2.2 T2V A14B."""
        return cls(**{"width": 5120, "mlp_dim": 13824, "layers": 40, "heads": 40} | fields)

    @classmethod
    def i2v_14b(cls, **fields: Any) -> "WanDitConfig":
        """Return the config of Wan 2.1 I2V 14B; with `image_width=None`, of both experts of Wan 2.2 I2V A14B."""
        return cls.t2v_14b(**{"cond_channels": 20, "image_width": 1280} | fields)

    @classmethod
    def ti2v_5b(cls, **fields: Any) -> "WanDitConfig":
        """Return the config of Wan 2.2 TI2V 5B."""
        shape = {"channels": 48, "width": 3072, "mlp_dim": 14336, "layers": 30, "heads": 24}
        return cls(**shape | {"time": "token"} | fields)


class PaddedText(NamedTuple):
    """Embedded texts, padded to a fixed length by reference to a single token of padding."""

    values: Float[Array, "B _ D"]
    """Embedded tokens, followed by one padding token."""
    sources: Int[Array, "B M"]
    """Index of the token in each slot of the padded texts."""
    segments: Int[Array, "B M"]
    """Segment of each slot."""
    fits: Bool[Array, "B G"]
    """False for segments whose text is longer than the fixed length."""


class WanInputs(NamedTuple):
    """Inputs of all blocks besides the tokens and the attention function."""

    condition: TokenConditions
    """Embedded times, from which the head is modulated."""
    modulation: TokenConditions
    """Modulation of the blocks, `B M 6 D`."""
    layout: PackedRows
    angles: Float[Array, "B N half"]
    """Rotary angles of queries and keys."""
    attention_inputs: AttentionInputs
    """Metadata for self-attention."""
    text: PaddedText
    image: ImageTokens | None
    """Embedded image tokens."""
    control: Any = None
    """Inputs of a control stack next to the blocks, in a model that has one."""

    def take(self, kept: Int[Array, "B K"]) -> "WanInputs":
        """Return the inputs of some of the tokens; see `TransformerInputs`."""
        return self._replace(
            condition=self.condition.take(kept),
            modulation=self.modulation.take(kept),
            layout=self.layout.take(kept),
            angles=take_tokens(self.angles, kept),
            attention_inputs=self.attention_inputs.take(kept),
            control=None if self.control is None else self.control.take(kept),
        )


class WanDit(nnx.Module):
    """Wan's transformer on packed rows, see `BlockBackbone`; its velocity points from data to noise."""

    def __init__(self, config: WanDitConfig, *, partitioner: Partitioner = ONE_DEVICE, rngs: nnx.Rngs):
        self.config, self.partitioner = config, partitioner
        width, dtype = config.width, jnp.dtype(config.dtype)
        linear = functools.partial(Linear, partitioner=partitioner, rngs=rngs)
        self.embed = linear(config.token_width + config.cond_width, width, dtype=dtype)
        self.text_in = linear(config.context_width, width, init="normal", dtype=dtype)
        self.text_out = linear(width, width, init="normal", dtype=dtype)
        self.time_in = linear(config.time_width, width, init="normal", precision="highest")
        self.time_out = linear(width, width, init="normal", precision="highest")
        # With a time of every token, this is a large product.
        self.modulation = linear(width, 6 * width, precision="highest" if config.time == "segment" else None)
        self.image = (
            None if config.image_width is None else WanImageEmbedding(config, partitioner=partitioner, rngs=rngs)
        )
        self.blocks = make_stack(lambda r: WanBlock(config, partitioner=partitioner, rngs=r), config.layers, rngs=rngs)
        self.head_table = make_modulation_table(2, width, rngs)
        self.head = linear(width, config.token_width, init="zero", precision="highest")

    def __call__(
        self,
        noisy: Float[Array, "B N p"],
        time: Float[Array, "B _"] | ClipTimes,
        layout: PackedRows,
        conditioning: Conditioning,
        state: Any = None,
    ) -> tuple[Float[Array, "B N p"], Any]:
        """Predict from noisy tokens; see `Backbone`.

        A segment whose text is longer than the config's `text_length` gets NaN; truncation is left to the tokenizer,
        which can warn about it.
        """
        conditioning.check(self.config.conditioning_kinds)
        x, inputs = self.embed_inputs(noisy, time, layout, conditioning)
        x, _ = self.apply_blocks(x, inputs)
        return self.apply_head(x, inputs), state

    def embed_inputs(
        self,
        noisy: Float[Array, "B N p"],
        time: Float[Array, "B _"] | ClipTimes,
        layout: PackedRows,
        conditioning: Conditioning,
    ) -> tuple[Float[Array, "B N D"], WanInputs]:
        """Return the embedded tokens, and the blocks' other inputs."""
        config = self.config
        segments, positions = jnp.asarray(layout.segments), jnp.asarray(layout.positions)
        indices = segments if config.time == "segment" else None
        if isinstance(time, ClipTimes):
            indices = time.get_numbers(layout)
            time = time.distinct
        features = sinusoidal_embedding(TIME_SCALE * time, config.time_width)
        embedded = self.time_out(nnx.silu(self.time_in(features)))
        condition = TokenConditions(embedded, indices)
        modulation = self.modulation(nnx.silu(embedded)).reshape(*time.shape, 6, -1)
        image = conditioning.get(ImageTokens)
        if self.image is not None and image is not None:
            image = image._replace(values=self.image(image.values, image.segments))
        grid_indices = None if config.patterns == (Full(),) else compute_grid_indices(positions, segments)
        inputs = WanInputs(
            condition=condition,
            modulation=condition._replace(values=modulation),
            layout=layout,
            angles=compute_rotary_angles(positions, config.rotary_embedding),
            attention_inputs=AttentionInputs.self_attention(segments, grid_indices, segment_count=layout.count),
            text=self._embed_text(conditioning[TextTokens], count=layout.count),
            image=image,
        )
        channels = self._concatenate(noisy, conditioning.get(ConditioningLatents))
        return self.embed(channels).astype(jnp.float32), inputs

    def apply_blocks(
        self,
        x: Float[Array, "B N D"],
        inputs: WanInputs,
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

    def apply_head(self, x: Float[Array, "B N D"], inputs: WanInputs) -> Float[Array, "B N p"]:
        """Return the prediction."""
        shift_scale = inputs.condition.expand(inputs.condition.values[:, :, None] + self.head_table[...])
        prediction = self.head(modulate(x, shift_scale[:, :, 0], shift_scale[:, :, 1]))
        return jnp.where(inputs.layout.expand(inputs.text.fits)[..., None], prediction, jnp.nan)

    def _concatenate(self, noisy: Float[Array, "B N p"], clean: ConditioningLatents | None) -> Float[Array, "B N _"]:
        """Concatenate the channels of noisy and clean latents at each position in a patch."""
        if clean is None:
            return noisy
        shape = (*noisy.shape[:2], self.config.patch.volume, -1)
        both = jnp.concatenate([noisy.reshape(shape), clean.values.reshape(shape)], axis=-1)
        return both.reshape(*noisy.shape[:2], -1)

    def _embed_text(self, text: TextTokens, *, count: int) -> PaddedText:
        """Embed the texts of `count` segments.

        Padding is a single token of zeros, which is projected once and then read for every position without a token.
        """
        segments, length = text.segments, self.config.text_length
        rows, tokens = segments.shape
        zeros = jnp.zeros((rows, 1, text.values.shape[2]), text.values.dtype)
        values = self.text_out(gelu(self.text_in(jnp.concatenate([text.values, zeros], axis=1))))
        offset = compute_segment_offsets(segments)
        is_kept = (segments > 0) & (offset < length)
        # Tokens that are not kept get a slot beyond the end, which `mode="drop"` ignores; empty slots read padding.
        slots = jnp.where(is_kept, (segments - 1) * length + offset, count * length)
        sources = jnp.full((rows, count * length), tokens)
        sources = sources.at[jnp.arange(rows)[:, None], slots].set(jnp.arange(tokens), mode="drop")
        exceeds = (segments[..., None] == jnp.arange(1, count + 1)) & (offset >= length)[..., None]
        slot_segments = jnp.tile(jnp.repeat(jnp.arange(1, count + 1), length), (rows, 1))
        return PaddedText(values, sources, slot_segments, ~exceeds.any(axis=1))


class WanImageEmbedding(nnx.Module):
    """Projection of an image encoder's tokens to the model's width: norm, linear, GELU, linear, norm."""

    def __init__(self, config: WanDitConfig, *, partitioner: Partitioner, rngs: nnx.Rngs):
        assert config.image_width is not None
        image_width, width, dtype = config.image_width, config.width, jnp.dtype(config.dtype)
        count = config.image_positions
        self.positions = None if count is None else nnx.Param(jnp.zeros((count, image_width), jnp.float32))
        self.norm_in, self.norm_out = LayerNorm(image_width, eps=1e-5), LayerNorm(width, eps=1e-5)
        self.up = Linear(image_width, image_width, dtype=dtype, partitioner=partitioner, rngs=rngs)
        self.down = Linear(image_width, width, dtype=dtype, partitioner=partitioner, rngs=rngs)

    def __call__(self, tokens: Float[Array, "B I F"], segments: Int[Array, "B I"]) -> Float[Array, "B I D"]:
        if self.positions is not None:
            # Tokens beyond the learned positions give NaN, but padding, which may be longer, must not.
            index = jnp.where(segments > 0, compute_segment_offsets(segments), 0)
            tokens = tokens + self.positions[...].at[index].get(mode="fill", fill_value=jnp.nan)
        return self.norm_out(self.down(jax.nn.gelu(self.up(self.norm_in(tokens)), approximate=False)))


class WanBlock(nnx.Module):
    """A block with self-attention, the sum of cross-attention to text and to image tokens, and a tanh-GELU MLP.

    Rotary embedding rotates the channel pairs (j, j + d/2); in Wan's files the channels of a pair are neighbours.
    """

    def __init__(self, config: WanDitConfig, *, partitioner: Partitioner, rngs: nnx.Rngs):
        width = config.width
        linear = functools.partial(Linear, dtype=jnp.dtype(config.dtype), partitioner=partitioner, rngs=rngs)
        map_in = functools.partial(linear, width, width, split="outputs")
        map_out = functools.partial(linear, width, width, split="inputs")
        map_context = functools.partial(map_in, is_context=True)
        self.heads = config.heads
        self.cross = partitioner.make_cross_attention(config.attention)
        self.table = make_modulation_table(6, width, rngs)
        self.query, self.key, self.value, self.out = map_in(), map_in(), map_in(), map_out()
        self.query_norm, self.key_norm = RmsNorm(width), RmsNorm(width)
        self.cross_norm = LayerNorm(width)
        self.cross_query, self.cross_key, self.cross_value = map_in(), map_context(), map_context()
        self.cross_out = map_out()
        self.cross_query_norm, self.cross_key_norm = RmsNorm(width), RmsNorm(width)
        if config.image_width is not None:
            self.image_key, self.image_value, self.image_key_norm = map_context(), map_context(), RmsNorm(width)
        self.up = linear(width, config.mlp_dim, split="outputs")
        self.down = linear(config.mlp_dim, width, split="inputs")

    def __call__(self, x: Float[Array, "B N D"], inputs: WanInputs, attention: Attention) -> Float[Array, "B N D"]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            inputs.modulation.expand(inputs.modulation.values[:, :, index] + self.table[...][index])
            for index in range(6)
        )
        x = x + gate * self._self_attention(modulate(x, shift, scale), inputs, attention)
        x = x + self._cross_attention(self.cross_norm(x), inputs)
        hidden = gelu(self.up(modulate(x, mlp_shift, mlp_scale)))
        return x + mlp_gate * self.down(hidden).astype(jnp.float32)

    def _self_attention(self, x: Float[Array, "B N D"], inputs: WanInputs, attention: Attention) -> Array:
        q = rotate(split_heads(self.query(x), self.query_norm, self.heads), inputs.angles)
        k = rotate(split_heads(self.key(x), self.key_norm, self.heads), inputs.angles)
        v = split_heads(self.value(x), None, self.heads)
        mixed = attention(q, k, v, inputs.attention_inputs)
        return self.out(mixed.reshape(x.shape)).astype(jnp.float32)

    def _cross_attention(self, x: Float[Array, "B N D"], inputs: WanInputs) -> Array:
        text, image = inputs.text, inputs.image
        q = split_heads(self.cross_query(x), self.cross_query_norm, self.heads)
        k = split_heads(self.cross_key(text.values), self.cross_key_norm, self.heads)
        v = split_heads(self.cross_value(text.values), None, self.heads)
        k, v = (jax.vmap(lambda row, index: row[index])(projected, text.sources) for projected in (k, v))
        mixed = self.cross(q, k, v, inputs.attention_inputs.with_context(text.segments))
        if image is not None:
            k = split_heads(self.image_key(image.values), self.image_key_norm, self.heads)
            v = split_heads(self.image_value(image.values), None, self.heads)
            mixed = mixed + self.cross(q, k, v, inputs.attention_inputs.with_context(image.segments))
        return self.cross_out(mixed.reshape(x.shape)).astype(jnp.float32)
