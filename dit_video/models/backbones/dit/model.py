"""Spacetime diffusion transformer over packed rows: an embedding, blocks and a head.

Published designs are fields of one config:

- DiT (arXiv 2212.09748) and SiT: `modulation="own"`, `context=NoContext()`, `labels=ClassLabels(...)`;
- PixArt's cross-attention to text (arXiv 2310.00426), with a modulation that is projected once and shared, each block
  adding its own table, as in Wan 2.1: the default;
- MMDiT of Stable Diffusion 3 (arXiv 2403.03206): `modulation="own"`, `context=JointAttention()`;
- Latte (arXiv 2401.03048): `pattern=SpaceOnly()`, `temporal=TemporalLayers()`;
- a causal model that predicts frame by frame: `pattern=CausalFrames()`, `absolute_position=None`.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.models.backbones.dit.blocks import Block, DitInputs, JointBlock, TemporalBlock, TokenConditions
from dit_video.models.backbones.dit.cache import KvCache, apply_blocks_with_cache
from dit_video.models.backbones.dit.conditioning import CrossAttention, JointAttention
from dit_video.models.backbones.dit.config import TIME_FEATURES, DitArchitecture
from dit_video.models.backbones.dit.positions import BoundaryEmbedding
from dit_video.models.backbones.protocol import ClipTimes
from dit_video.models.conditioning import ClassIds, Conditioning, ConditioningLatents, TextTokens
from dit_video.nn import (
    ONE_DEVICE,
    AttentionInputs,
    LayerGroup,
    LayerWrapper,
    Linear,
    Partitioner,
    make_stack,
    modulate,
    scan_layers,
    sinusoidal_embedding,
)
from dit_video.nn.attention import GLOBAL, Full, TimeOnly, compute_grid_indices
from dit_video.tokens import PackedRows, Rotary3d, compute_rotary_angles, expand_to_tokens, segment_mean

_TIME_AXIS = np.asarray([1, 0, 0], np.float32)
"""Mask of the time axis in positions (t, h, w)."""


class _Tokens(NamedTuple):
    """Embedded tokens of rows: the clips' own, or further ones that follow them."""

    x: Float[Array, "B N D"]
    segments: Int[Array, "B N"]
    positions: Float[Array, "B N 3"]
    conditions: Int[Array, "B N"]
    """Segment of each token, plus G for a token that is always at time 0."""


class Dit(nnx.Module):
    """A diffusion transformer on packed rows: embeddings, blocks and a head; see `BlockBackbone`."""

    def __init__(self, config: DitArchitecture, *, partitioner: Partitioner = ONE_DEVICE, rngs: nnx.Rngs):
        self.config, self.partitioner = config, partitioner
        width, dtype = config.width, jnp.dtype(config.dtype)
        options: dict[str, Any] = {"partitioner": partitioner, "rngs": rngs}
        linear: Any = functools.partial(Linear, **options)
        self.embed = linear(config.token_width, width, dtype=dtype)
        if config.absolute_position is not None:
            self.position = config.absolute_position.make(width, dtype=dtype, **options)
        precise: Any = functools.partial(linear, precision="highest")
        # With a time per token, these are large products.
        modulation = precise if config.time == "segment" else linear
        self.time_in, self.time_out = precise(TIME_FEATURES, width), precise(width, width)
        if isinstance(config.context, CrossAttention | JointAttention):
            self.context_in = linear(config.context_width, width, dtype=dtype)
        if config.context.pooled:
            self.context_pooled = precise(config.context_width, width)
        if config.modulation == "shared":
            self.modulation = modulation(width, 6 * width, init="zero")
        kind = JointBlock if isinstance(config.context, JointAttention) else Block
        block = functools.partial(kind, config, partitioner=partitioner)
        self.blocks = make_stack(lambda r: block(rngs=r), config.layers, rngs=rngs)
        self.head_modulation = modulation(width, 2 * width, init="zero")
        self.head = precise(width, config.output_width, init="zero")
        normal = nnx.initializers.normal(0.02)
        if config.cond_channels:
            # Zero weights, so that extending a trained model by this input leaves its predictions unchanged.
            self.cond_embed = linear(config.cond_width, width, bias=False, init="zero", dtype=dtype)
        for each in config.conditioning:
            embedding = each.make_embedding(width, patch=config.patch, dtype=dtype, **options)
            setattr(self, f"cond_{each.field.name}", embedding)
        if config.registers:
            self.registers = nnx.Param(normal(rngs.params(), (config.registers, width), jnp.float32))
        if config.labels is not None:
            self.labels = nnx.Param(normal(rngs.params(), (config.labels.classes + 1, width), jnp.float32))
        if config.temporal is not None:
            self.temporal_position = BoundaryEmbedding().make(width, init="zero", dtype=dtype, **options)
            layers = config.layers // config.temporal.spatial_layers * config.temporal.layers
            temporal = functools.partial(TemporalBlock, config, partitioner=partitioner)
            self.temporal_blocks = make_stack(lambda r: temporal(rngs=r), layers, rngs=rngs)

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

    def embed_inputs(
        self,
        noisy: Float[Array, "B N p"],
        time: Float[Array, "B _"] | ClipTimes,
        layout: PackedRows,
        conditioning: Conditioning,
    ) -> tuple[Float[Array, "B T D"], DitInputs]:
        """Return the embedded tokens, the clips' first, and the blocks' other inputs."""
        config = self.config
        clips = self._embed_clips(noisy, layout, conditioning)
        tokens = self._append_extras(clips, layout, conditioning)
        condition, segment_condition = self._embed_conditions(tokens, time, layout, conditioning)
        x, segments, context, context_modulation = tokens.x, tokens.segments, None, None
        if isinstance(config.context, CrossAttention | JointAttention):
            text = conditioning[TextTokens]
            context = TextTokens(self.context_in(text.values), text.segments)
        if isinstance(config.context, JointAttention):
            assert context is not None
            x = jnp.concatenate([x, context.values.astype(jnp.float32)], axis=1)
            segments = jnp.concatenate([segments, context.segments], axis=1)
            context_modulation = self._project_modulation(TokenConditions(segment_condition, context.segments))

        def pad(values: Array, fill: float | int) -> Array:
            """Pad with the value for tokens without a place in a clip: extra ones, registers and a joint context."""
            missing = segments.shape[1] - values.shape[1]
            return jnp.pad(values, ((0, 0), (0, missing), (0, 0)), constant_values=fill)

        needs_indices, space = config.layer_patterns != (Full(),), self._drop_time(tokens.positions)
        indices = pad(compute_grid_indices(clips.positions, clips.segments), GLOBAL) if needs_indices else None
        count = layout.count if config.has_contiguous_clips else None
        return x, DitInputs(
            condition=condition,
            modulation=self._project_modulation(condition),
            segments=tokens.segments,
            positions=tokens.positions,
            angles=compute_rotary_angles(space, config.rotary) if isinstance(config.rotary, Rotary3d) else None,
            attention_inputs=AttentionInputs.self_attention(segments, indices, segment_count=count),
            bias_positions=None if config.relative_bias is None else pad(self._drop_time(clips.positions), jnp.inf),
            context=context,
            context_modulation=context_modulation,
        )

    def apply_blocks(
        self, x: Float[Array, "B T D"], inputs: DitInputs, *, wrapper: LayerWrapper | None = None, values: Any = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Apply all blocks; see `BlockBackbone`. Temporal blocks are not wrapped."""
        config = self.config
        contexts = [(inputs, self.partitioner.make_attention(config.attention, each)) for each in config.layer_patterns]
        groups = [LayerGroup(self.blocks, contexts, wrapper, values)]
        if (temporal := config.temporal) is not None:
            in_time = inputs._replace(angles=compute_rotary_angles(inputs.positions, config.time_rotary))
            time_context = (in_time, self.partitioner.make_attention(config.attention, TimeOnly()))
            groups = [groups[0]._replace(contexts=contexts * temporal.spatial_layers)]
            groups.append(LayerGroup(self.temporal_blocks, [time_context] * temporal.layers))
        x, outputs = scan_layers(x, groups, remat=config.remat)
        return x, outputs[0]

    def apply_head(self, x: Float[Array, "B N D"], inputs: DitInputs) -> Float[Array, "B N prediction"]:
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

    def _embed_conditions(
        self, tokens: _Tokens, time: Float[Array, "B _"] | ClipTimes, layout: PackedRows, conditioning: Conditioning
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

    def _embed_time(self, time: Float[Array, "*batch"]) -> Float[Array, "*batch D"]:
        embedding = self.config.time_embedding
        features = sinusoidal_embedding(embedding.model_time(time), TIME_FEATURES, max_period=embedding.max_period)
        return self.time_out(nnx.silu(self.time_in(features)))

    def _embed_static_condition(self, layout: PackedRows, conditioning: Conditioning) -> Float[Array, "B G D"]:
        """Embed the part of a segment's condition that does not depend on time: mean text, class, values per clip.

        An unknown class gives NaN.
        """
        condition: Array = jnp.zeros((layout.segments.shape[0], layout.count, self.config.width), jnp.float32)
        if self.config.context.pooled:
            text = conditioning[TextTokens]
            values = text.values.astype(jnp.float32)
            condition = self.context_pooled(segment_mean(values, text.segments, count=layout.count))
        if (classes := conditioning.get(ClassIds)) is not None:
            condition = condition + self.labels[...].at[classes.values].get(mode="fill", fill_value=jnp.nan)
        return self._add_conditioning(condition, conditioning, ("example",))

    def _add_conditioning(
        self, x: Float[Array, "B M D"], conditioning: Conditioning, alignments: tuple[str, ...]
    ) -> Float[Array, "B M D"]:
        """Add the embeddings of the fields with one of the alignments."""
        for each in self.config.conditioning:
            if each.field.alignment in alignments:
                x = x + getattr(self, f"cond_{each.field.name}")(conditioning[each.record].values)
        return x

    def _embed_clips(self, noisy: Float[Array, "B N p"], layout: PackedRows, conditioning: Conditioning) -> _Tokens:
        config = self.config
        x = self.embed(noisy)
        if (cond_latents := conditioning.get(ConditioningLatents)) is not None:
            x = x + self.cond_embed(cond_latents.values)
        x = self._add_conditioning(x, conditioning, ("frame", "grid"))
        segments, positions = jnp.asarray(layout.segments), jnp.asarray(layout.positions)
        sizes = {"count": layout.count, "width": config.width}
        if config.temporal is not None:
            # Time has an embedding of its own, so that all other parts process every frame as an image.
            features = BoundaryEmbedding().compute_features(positions * _TIME_AXIS, segments, **sizes)
            x = x + self.temporal_position(features)
        if config.absolute_position is not None:
            features = config.absolute_position.compute_features(self._drop_time(positions), segments, **sizes)
            x = x + (features if self.position is None else self.position(features))
        return _Tokens(x.astype(jnp.float32), segments, positions, segments)

    def _append_extras(self, clips: _Tokens, layout: PackedRows, conditioning: Conditioning) -> _Tokens:
        """Return the clips' tokens, followed by the tokens that join them.

        The tokens of `extra` fields are at time 0 and have positions of their own. Registers are at their clip's time,
        with positions of zero, which rotate nothing.
        """
        parts, (rows, count) = [clips], (len(clips.x), layout.count)

        def append(x: Array, positions: Array | np.ndarray, shift: int) -> None:
            segments = layout.get_sequence_segments(len(positions))
            positions = jnp.tile(jnp.asarray(positions), (rows, count, 1))
            parts.append(_Tokens(x.astype(jnp.float32), segments, positions, segments + shift))

        for each in self.config.conditioning:
            if each.field.alignment == "extra":
                embed = getattr(self, f"cond_{each.field.name}")
                append(embed(conditioning[each.record].values), each.make_positions(), count)
        if number := self.config.registers:
            append(jnp.tile(self.registers[...], (rows, count, 1)), jnp.zeros((number, 3)), 0)
        return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=1), *parts)

    def _drop_time(self, positions: Float[Array, "B N 3"]) -> Float[Array, "B N 3"]:
        """Return the positions that blocks use: in a model with temporal layers, spatial layers ignore time."""
        return positions if self.config.temporal is None else positions * (1 - _TIME_AXIS)

    def _project_modulation(self, condition: TokenConditions) -> TokenConditions:
        """Return the shared modulation, or the condition if each block projects it itself."""
        values = condition.values
        if self.config.modulation == "own":
            return condition
        return condition._replace(values=self.modulation(values).reshape(*values.shape[:2], 6, -1))


@dataclass(frozen=True, kw_only=True)
class DitConfig(DitArchitecture):
    """Configuration of the diffusion transformer, and its named sizes; for the fields see `DitArchitecture`."""

    def make(self, rngs: nnx.Rngs, partitioner: Partitioner = ONE_DEVICE) -> Dit:
        return Dit(self, partitioner=partitioner, rngs=rngs)

    @classmethod
    def small(cls, **fields: Any) -> "DitConfig":
        """Return DiT-S (arXiv 2212.09748, table 1); like all sizes it takes the other fields, such as `channels`."""
        return cls(**{"width": 384, "layers": 12, "heads": 6} | fields)

    @classmethod
    def base(cls, **fields: Any) -> "DitConfig":
        """Return DiT-B."""
        return cls(**{"width": 768, "layers": 12, "heads": 12} | fields)

    @classmethod
    def large(cls, **fields: Any) -> "DitConfig":
        """Return DiT-L."""
        return cls(**{"width": 1024, "layers": 24, "heads": 16} | fields)

    @classmethod
    def extra_large(cls, **fields: Any) -> "DitConfig":
        """Return DiT-XL."""
        return cls(**{"width": 1152, "layers": 28, "heads": 16} | fields)

    @classmethod
    def dit_1b(cls, **fields: Any) -> "DitConfig":
        """Return a config with 1.1 billion parameters, including cross-attention."""
        return cls(**{"width": 1536, "layers": 28, "heads": 12} | fields)

    @classmethod
    def dit_5b(cls, **fields: Any) -> "DitConfig":
        """Return a config with 5 billion parameters, including cross-attention."""
        return cls(**{"width": 3072, "layers": 32, "heads": 24} | fields)

    @classmethod
    def dit_14b(cls, **fields: Any) -> "DitConfig":
        """Return a config with 14 billion parameters, including cross-attention."""
        return cls(**{"width": 5120, "layers": 33, "heads": 40} | fields)
