"""Diffusion transformer over packed rows: an embedding, blocks and a head.

DiT (arXiv 2212.09748) and SiT (arXiv 2401.08740) are conditioned on classes, with `modulation="own"`, `context_width=0`
and `classes=1000`. By default blocks attend to text by cross-attention (PixArt, arXiv 2310.00426), with a modulation
that is projected once and shared, each block adding its own table, as in Wan 2.1. With `pattern=CausalFrames()` and
`absolute_position=None` the model predicts frame by frame.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.models.backbones.blocks import Block, DiTInputs, TokenConditions
from dit_video.models.backbones.cache import KvCache, apply_blocks_with_cache
from dit_video.models.backbones.positions import BoundaryEmbedding, PositionEmbedding
from dit_video.models.backbones.protocol import ClipTimes
from dit_video.models.backbones.transformer import (
    TIME_FEATURES,
    CrossAttention,
    PooledContext,
    TimeEmbedding,
    TransformerConfig,
)
from dit_video.models.conditioning import ClassIds, ClipConditioning, Conditioning, ConditioningLatents, TextTokens
from dit_video.nn import (
    ONE_DEVICE,
    AttentionInputs,
    Backend,
    LayerGroup,
    LayerWrapper,
    Linear,
    Partitioner,
    Remat,
    make_stack,
    modulate,
    scan_layers,
    sinusoidal_embedding,
)
from dit_video.nn.attention import GLOBAL, Full, PatternChoice, RelativeBias, compute_grid_indices
from dit_video.tokens import Grid, PackedRows, Rotary3d, expand_to_tokens


class DiTSize(TypedDict):
    """Fields of a config that tell a model's size."""

    width: int
    layers: int
    heads: int


DIT_SIZES: dict[str, DiTSize] = {
    "S": {"width": 384, "layers": 12, "heads": 6},
    "B": {"width": 768, "layers": 12, "heads": 12},
    "L": {"width": 1024, "layers": 24, "heads": 16},
    "XL": {"width": 1152, "layers": 28, "heads": 16},
    "1B": {"width": 1536, "layers": 28, "heads": 12},
    "5B": {"width": 3072, "layers": 32, "heads": 24},
    "14B": {"width": 5120, "layers": 33, "heads": 40},
}
"""Named sizes: DiT-S to DiT-XL (arXiv 2212.09748, table 1), and sizes with about as many billion parameters with
cross-attention as their names say."""


@dataclass(frozen=True, kw_only=True)
class DiTConfig(TransformerConfig):
    """Configuration of the diffusion transformer.

    Raises:
      UserError: If a size is below 1, the heads do not divide the width, the rotary split does not add up to the head
        width, a count is negative, patterns do not divide the layers, or the attention backend does not support them.
    """

    channels: int
    """Number of latent channels."""
    context_width: int
    """Width of the text encoder's output (E); 0 for a model without text."""
    context: CrossAttention | PooledContext = CrossAttention()
    """How text enters, if there is any."""
    classes: int = 0
    """Number of class labels, each a learned vector that modulates the blocks; one more, the last, stands for no class.
    0 for a model without classes."""
    patch: Grid = Grid(1, 2, 2)
    width: int = 384
    layers: int = 6
    heads: int = 6
    mlp_ratio: float = 4.0
    """Ratio of the MLP's hidden width (for SwiGLU, of each of the two) to the model's width."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    mlp_norm_eps: float = 1e-6
    """Epsilon of the norm before the MLP; in diffusers' `DiTTransformer2DModel` it differs from the one before
    attention."""
    bias: bool = True
    """True if the blocks' linear layers have a bias."""
    qk_norm: Literal["head", "full", "none"] = "head"
    """RMS norm of queries and keys: over each head, or over the full width before the split into heads."""
    order: Literal["sequential", "parallel"] = "sequential"
    """Order of a block's attention and MLP: one after the other, or both on the same input (arXiv 2302.05442)."""
    modulation: Literal["shared", "own"] = "shared"
    """Modulation: projected once, with a table per block (PixArt, Wan), or with a projection per block (DiT)."""
    time_coordinate: Literal["tokens", "seconds"] = "tokens"
    """Unit of the time coordinate; with seconds, `Rotary3d.scale` sets the number of steps per second."""
    rotary: Rotary3d | Literal["even", "none"] = "even"
    """Rotary embedding; "even" is `Rotary3d.even` of the head width."""
    absolute_position: PositionEmbedding | None = BoundaryEmbedding()
    """Position embedding added to the tokens."""
    relative_bias: RelativeBias | None = None
    """Relative position bias, learned per layer; it needs the attention backend auto, dense or chunked."""
    pattern: PatternChoice | tuple[PatternChoice, ...] = Full()
    """Pattern of self-attention, or several that the layers use in turn: `(SpaceOnly(), TimeOnly())` is factorised
    attention. Registers and extra tokens belong to no frame: all tokens of the clip see them, and they see the whole
    clip. With a causal pattern they see only each other, as frames would otherwise depend on later ones."""
    registers: int = 0
    """Number of learned register tokens for each clip (arXiv 2309.16588)."""
    time: Literal["segment", "token"] = "segment"
    """Diffusion time: one for all tokens of a clip, or one per token, which is 0 for tokens of known frames."""
    time_embedding: TimeEmbedding = TimeEmbedding()
    variance: Literal["none", "predicted", "dropped"] = "none"
    """Learned variance (arXiv 2102.09672), for which the head has twice the channels: none, predicted as the second
    half of the channels at each position, or computed and dropped (SiT)."""
    cond_channels: int = 0
    """Number of channels of clean latents and masks that accompany the noisy latents (`ConditioningLatents`)."""
    conditioning: tuple[ClipConditioning, ...] = ()
    """Conditioning on fields of the clips. Embeddings of values per frame or on the grid are added to the tokens,
    embeddings of values per clip modulate the blocks, and tokens of `extra` fields follow the clip's, at time 0."""
    attention: Backend = "auto"
    dtype: str = "float32"
    """Dtype of the matrix products; norms, modulation and the residual stream are float32."""
    remat: Remat = "none"

    def make(self, rngs: nnx.Rngs, partitioner: Partitioner = ONE_DEVICE) -> "DiT":
        return DiT(self, partitioner=partitioner, rngs=rngs)


class Tokens(NamedTuple):
    """Embedded tokens of rows: the clips' own, followed by those that join them."""

    x: Float[Array, "B N D"]
    segments: Int[Array, "B N"]
    positions: Float[Array, "B N 3"]
    conditions: Int[Array, "B N"]
    """Segment of each token, plus G for a token that is always at time 0."""


class DiT(nnx.Module):
    """The diffusion transformer on packed rows; see `BlockBackbone`."""

    block: ClassVar[Callable[..., nnx.Module]] = Block

    def __init__(self, config: TransformerConfig, *, partitioner: Partitioner = ONE_DEVICE, rngs: nnx.Rngs):
        self.config, self.partitioner = config, partitioner
        width, dtype = config.width, jnp.dtype(config.dtype)
        options: dict[str, Any] = {"partitioner": partitioner, "rngs": rngs}
        linear: Any = functools.partial(Linear, **options)
        precise: Any = functools.partial(linear, precision="highest")
        # With a time per token, these are large products.
        modulation = precise if config.time == "segment" else linear
        self.embed = linear(config.token_width, width, dtype=dtype)
        if config.absolute_position is not None:
            self.position = config.absolute_position.make(width, dtype=dtype, **options)
        self.time_in, self.time_out = precise(TIME_FEATURES, width), precise(width, width)
        if config.embeds_text:
            self.context_in = linear(config.context_width, width, dtype=dtype)
        if config.pools_text:
            self.context_pooled = precise(config.context_width, width)
        if config.modulation == "shared":
            self.modulation = modulation(width, 6 * width, init="zero")
        self.blocks = make_stack(
            lambda r: self.block(config, partitioner=partitioner, rngs=r), config.layers, rngs=rngs
        )
        self.head_modulation = modulation(width, 2 * width, init="zero")
        self.head = precise(width, config.output_width, init="zero")
        if config.cond_channels:
            # Zero weights, so that extending a trained model by this input leaves its predictions unchanged.
            self.cond_embed = linear(config.cond_width, width, bias=False, init="zero", dtype=dtype)
        for each in config.conditioning:
            embedding = each.make_embedding(width, patch=config.patch, dtype=dtype, **options)
            setattr(self, f"cond_{each.field.name}", embedding)
        normal = nnx.initializers.normal(0.02)
        if config.registers:
            self.registers = nnx.Param(normal(rngs.params(), (config.registers, width), jnp.float32))
        if config.classes:
            self.labels = nnx.Param(normal(rngs.params(), (config.classes + 1, width), jnp.float32))

    @property
    def added_conditioning(self) -> tuple[ClipConditioning, ...]:
        """Return the conditioning whose embeddings are added to the tokens, or to the conditions of the blocks."""
        return self.config.conditioning

    def __call__(
        self,
        noisy: Float[Array, "B N p"],
        time: Float[Array, "B _"] | ClipTimes,
        layout: PackedRows,
        conditioning: Conditioning,
        state: Any = None,
    ) -> tuple[Float[Array, "B N prediction"], Any]:
        """Predict from noisy tokens; see `Backbone`. The state is None, or the `KvCache` of the clips so far."""
        conditioning.check(self.config.conditioning_kinds)
        x, inputs = self.embed_inputs(noisy, time, layout, conditioning)
        if state is None:
            x, _ = self.apply_blocks(x, inputs)
        else:
            x, _ = apply_blocks_with_cache(self, x, inputs, state, length=noisy.shape[1])
        return self.apply_head(x[:, : noisy.shape[1]], inputs), state

    def embed_inputs(
        self,
        noisy: Float[Array, "B N p"],
        time: Float[Array, "B _"] | ClipTimes,
        layout: PackedRows,
        conditioning: Conditioning,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Return the embedded tokens, the clips' first, and the blocks' other inputs: `DiTInputs`."""
        config = self.config
        tokens = self.append_extras(self.embed_tokens(noisy, layout, conditioning), layout, conditioning)
        condition, _ = self.embed_conditions(tokens, time, layout, conditioning)
        bias_positions = None
        if config.relative_bias is not None:
            bias_positions = _pad(jnp.asarray(layout.positions), tokens.segments, jnp.inf)
        return tokens.x, DiTInputs(
            condition=condition,
            modulation=self.project_modulation(condition),
            angles=config.compute_angles(tokens.positions),
            attention_inputs=self.make_attention_inputs(tokens.segments, layout),
            bias_positions=bias_positions,
            context=self.embed_text(conditioning) if config.embeds_text else None,
        )

    def apply_blocks(
        self,
        x: Float[Array, "B T D"],
        inputs: Any,
        *,
        layers: slice = slice(None),
        wrapper: LayerWrapper | None = None,
        values: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Apply all blocks, or a range of them; see `BlockBackbone`."""
        config = self.config
        contexts = [(inputs, self.partitioner.make_attention(config.attention, each)) for each in config.layer_patterns]
        group = LayerGroup(self.blocks, contexts, wrapper, values)
        x, (outputs,) = scan_layers(x, [group], layers=layers, remat=config.remat)
        return x, outputs

    def apply_head(self, x: Float[Array, "B N D"], inputs: Any) -> Float[Array, "B N prediction"]:
        """Return the prediction for the first tokens of the rows."""
        config, (values, indices) = self.config, inputs.condition
        condition = TokenConditions(values, None if indices is None else indices[:, : x.shape[1]])
        shift_scale = condition.expand(self.head_modulation(values))[:, : x.shape[1]]
        head = self.head(modulate(x, *jnp.split(shift_scale, 2, axis=-1)))
        if config.variance == "dropped":
            by_position = head.reshape(*head.shape[:2], config.patch.volume, -1)
            head = by_position[..., : config.channels].reshape(*head.shape[:2], -1)
        # With a reversed time the network predicts the velocity along its own time.
        return -head if config.time_embedding.reversed else head

    def init_state(self, rows: int, tokens: int) -> KvCache:
        """Return an empty cache; see `CachingBackbone`."""
        config = self.config
        config.check_cache()
        keys = jnp.zeros((config.layers, rows, tokens, config.heads, config.width // config.heads), config.dtype)
        segments, indices = jnp.zeros((rows, tokens), jnp.int32), jnp.zeros((rows, tokens, 3), jnp.int32)
        return KvCache(keys, jnp.zeros_like(keys), segments, indices, length=jnp.zeros((), jnp.int32))

    def extend(
        self, state: KvCache, clean: Float[Array, "B N p"], layout: PackedRows, conditioning: Conditioning
    ) -> KvCache:
        """Return the cache with a finished chunk of the clips; see `CachingBackbone`."""
        rows, length = clean.shape[:2]
        time = jnp.zeros((rows, length if self.config.time == "token" else layout.count))
        x, inputs = self.embed_inputs(clean, time, layout, conditioning)
        return apply_blocks_with_cache(self, x, inputs, state, length=length)[1]

    def embed_tokens(
        self, noisy: Float[Array, "B N p"], layout: PackedRows, conditioning: Conditioning
    ) -> Float[Array, "B N D"]:
        """Return the embedded tokens of the clips."""
        x = self.embed(noisy)
        if (cond_latents := conditioning.get(ConditioningLatents)) is not None:
            x = x + self.cond_embed(cond_latents.values)
        x = self._add_fields(x, conditioning, ("frame", "grid"))
        return self.add_positions(x, jnp.asarray(layout.positions), layout).astype(jnp.float32)

    def add_positions(
        self, x: Float[Array, "B N D"], positions: Float[Array, "B N 3"], layout: PackedRows
    ) -> Float[Array, "B N D"]:
        """Add the absolute position embedding, if there is one."""
        if (embedding := self.config.absolute_position) is None:
            return x
        features = embedding.compute_features(
            positions, jnp.asarray(layout.segments), count=layout.count, width=self.config.width
        )
        return x + (features if self.position is None else self.position(features))

    def append_extras(self, x: Float[Array, "B N D"], layout: PackedRows, conditioning: Conditioning) -> Tokens:
        """Return the clips' tokens, followed by the tokens that join them.

        The tokens of `extra` fields are at time 0 and have positions of their own. Registers are at their clip's time,
        with positions of zero, which rotate nothing.
        """
        segments, count = jnp.asarray(layout.segments), layout.count
        parts = [Tokens(x, segments, jnp.asarray(layout.positions), segments)]

        def append(x: Array, positions: Array | np.ndarray, shift: int) -> None:
            segments = layout.get_sequence_segments(len(positions))
            positions = jnp.tile(jnp.asarray(positions), (len(x), count, 1))
            parts.append(Tokens(x.astype(jnp.float32), segments, positions, segments + shift))

        for each in self.config.conditioning:
            if each.field.alignment == "extra":
                embed = getattr(self, f"cond_{each.field.name}")
                append(embed(conditioning[each.record].values), each.make_positions(), count)
        if number := self.config.registers:
            append(jnp.tile(self.registers[...], (len(x), count, 1)), jnp.zeros((number, 3)), 0)
        return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=1), *parts)

    def embed_conditions(
        self, tokens: Tokens, time: Float[Array, "B _"] | ClipTimes, layout: PackedRows, conditioning: Conditioning
    ) -> tuple[TokenConditions, Float[Array, "B G D"]]:
        """Return the conditions of all tokens, and one for each segment at the time of its noisy tokens."""
        static, conditions = self._embed_static_condition(layout, conditioning), tokens.conditions
        has_clean = self.config.extra_tokens > self.config.registers
        if isinstance(time, ClipTimes):
            numbers, extras = time.get_numbers(layout), slice(time.is_clean.shape[1], None)
            conditions, has_clean = jnp.concatenate([numbers, conditions[:, extras]], axis=1), True
            time = time.values
        elif self.config.time == "token":
            # Known tokens of a segment are at time 0; the others have the segment's time.
            segment_time, extras = layout.max(time), slice(time.shape[1], None)
            extra_time = expand_to_tokens(segment_time, tokens.segments[:, extras])
            extra_time = jnp.where(tokens.conditions[:, extras] > layout.count, 0, extra_time)
            token_condition = self._embed_time(jnp.concatenate([time, extra_time], axis=1))
            token_condition = nnx.silu(token_condition + expand_to_tokens(static, tokens.segments))
            return TokenConditions(token_condition, None), nnx.silu(self._embed_time(segment_time) + static)
        segment_condition = values = nnx.silu(self._embed_time(time) + static)
        if has_clean:
            values = jnp.concatenate([values, nnx.silu(self._embed_time(jnp.zeros_like(time)) + static)], axis=1)
        return TokenConditions(values, conditions), segment_condition

    def project_modulation(self, condition: TokenConditions) -> TokenConditions:
        """Return the shared modulation, or the condition if each block projects it itself."""
        values = condition.values
        if self.config.modulation == "own":
            return condition
        return condition._replace(values=self.modulation(values).reshape(*values.shape[:2], 6, -1))

    def embed_text(self, conditioning: Conditioning) -> TextTokens:
        """Return the embedded text."""
        text = conditioning[TextTokens]
        return TextTokens(self.context_in(text.values), text.segments)

    def make_attention_inputs(self, segments: Int[Array, "B T"], layout: PackedRows) -> AttentionInputs:
        """Return the metadata of self-attention among the clips' tokens and those that follow them."""
        config, indices = self.config, None
        if config.layer_patterns != (Full(),):
            own = compute_grid_indices(jnp.asarray(layout.positions), jnp.asarray(layout.segments))
            indices = _pad(own, segments, GLOBAL)
        count = layout.count if config.has_contiguous_clips else None
        return AttentionInputs.self_attention(segments, indices, segment_count=count)

    def _embed_time(self, time: Float[Array, "*batch"]) -> Float[Array, "*batch D"]:
        embedding = self.config.time_embedding
        features = sinusoidal_embedding(embedding.model_time(time), TIME_FEATURES, max_period=embedding.max_period)
        return self.time_out(nnx.silu(self.time_in(features)))

    def _embed_static_condition(self, layout: PackedRows, conditioning: Conditioning) -> Float[Array, "B G D"]:
        """Embed the part of a segment's condition that does not depend on time: mean text, class, values per clip.

        An unknown class gives NaN.
        """
        condition: Array = jnp.zeros((layout.segments.shape[0], layout.count, self.config.width), jnp.float32)
        if self.config.pools_text:
            condition = self.context_pooled(conditioning[TextTokens].mean(layout.count))
        if (classes := conditioning.get(ClassIds)) is not None:
            condition = condition + self.labels[...].at[classes.values].get(mode="fill", fill_value=jnp.nan)
        return self._add_fields(condition, conditioning, ("example",))

    def _add_fields(
        self, x: Float[Array, "B M D"], conditioning: Conditioning, alignments: tuple[str, ...]
    ) -> Float[Array, "B M D"]:
        """Add the embeddings of the fields with one of the alignments."""
        for each in self.added_conditioning:
            if each.field.alignment in alignments:
                x = x + getattr(self, f"cond_{each.field.name}")(conditioning[each.record].values)
        return x


def _pad(values: Array, segments: Int[Array, "B T"], fill: float | int) -> Array:
    """Pad with the value for tokens without a place in a clip, which follow the clips' tokens."""
    missing = segments.shape[1] - values.shape[1]
    return jnp.pad(values, ((0, 0), (0, missing), (0, 0)), constant_values=fill)
