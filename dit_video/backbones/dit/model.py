"""Spacetime diffusion transformer over packed rows.

By default the blocks are those of DiT (arXiv 2212.09748) with cross-attention to text as in PixArt (arXiv 2310.00426),
and the modulation is projected once and shared, each block adding its own table, as in Wan 2.1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.backbones.dit.blocks import BlockMetadata, TemporalBlock, make_block
from dit_video.backbones.dit.conditioning import CrossAttention, JointAttention
from dit_video.backbones.dit.config import TIME_FEATURES, DitConfig
from dit_video.backbones.dit.positions import BoundaryEmbedding
from dit_video.conditioning import ClassIds, Conditioning, ConditioningLatents, TextTokens
from dit_video.nn import (
    Attention,
    AttentionInputs,
    LayerGroup,
    Linear,
    make_stack,
    modulate,
    scan_layers,
    sinusoidal_embedding,
)
from dit_video.nn.attention import GLOBAL, AttentionFactory, Full, Pattern, TimeOnly, compute_grid_indices
from dit_video.tokens import PackedRows, Rotary3d, compute_rotary_angles, expand_to_tokens, segment_mean

_TIME_AXIS = np.asarray([1, 0, 0], np.float32)
"""Mask of the time axis in positions (t, h, w)."""


class _Sequence(NamedTuple):
    """Embedded tokens of packed rows, followed by the registers of every segment."""

    x: Float[Array, "B N D"]
    segments: Int[Array, "B N"]
    positions: Float[Array, "B N 3"]
    token_time: Float[Array, "B N"] | None


class Dit(nnx.Module):
    """A diffusion transformer on packed rows; see `Backbone`."""

    def __init__(self, config: DitConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.attention: Callable[[Pattern], Attention] = AttentionFactory(config.attention)
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.embed = Linear(config.token_width, width, dtype=dtype, rngs=rngs)
        if config.absolute_position is not None:
            self.position = config.absolute_position.make(width, dtype=dtype, rngs=rngs)
        self.time_in, self.time_out = Linear(TIME_FEATURES, width, rngs=rngs), Linear(width, width, rngs=rngs)
        if isinstance(config.context, CrossAttention | JointAttention):
            self.context_in = Linear(config.context_width, width, dtype=dtype, rngs=rngs)
        if config.context.pooled:
            self.context_pooled = Linear(config.context_width, width, rngs=rngs)
        if config.modulation == "shared":
            self.modulation = Linear(width, 6 * width, init="zero", rngs=rngs)
        self.blocks = make_stack(lambda r: make_block(config, rngs=r), config.layers, rngs=rngs)
        self.head_modulation = Linear(width, 2 * width, init="zero", rngs=rngs)
        self.head = Linear(width, config.output_width, init="zero", rngs=rngs)
        normal = nnx.initializers.normal(0.02)
        if config.cond_channels:
            # Zero weights, so that a trained model that is extended by this input predicts as before.
            self.cond_embed = Linear(config.cond_width, width, bias=False, init="zero", dtype=dtype, rngs=rngs)
        if config.registers:
            self.registers = nnx.Param(normal(rngs.params(), (config.registers, width), jnp.float32))
        if config.labels is not None:
            self.labels = nnx.Param(normal(rngs.params(), (config.labels.classes + 1, width), jnp.float32))
        if config.temporal is not None:
            self.temporal_position = BoundaryEmbedding().make(width, init="zero", dtype=dtype, rngs=rngs)
            temporal_layers = config.layers // config.temporal.spatial_layers * config.temporal.layers
            self.temporal_blocks = make_stack(lambda r: TemporalBlock(config, rngs=r), temporal_layers, rngs=rngs)

    def __call__(
        self,
        noisy: Float[Array, "B N p"],
        time: Float[Array, "B _"],
        layout: PackedRows,
        conditioning: Conditioning,
        state: Any = None,
    ) -> tuple[Float[Array, "B N prediction"], Any]:
        """Predict from noisy tokens; see `Backbone`."""
        config = self.config
        conditioning.check(config.conditioning_kinds)
        token_time = time if config.time == "token" else None
        # Known tokens of a segment are at time 0: its time is that of the others.
        segment_time = time if token_time is None else layout.max(time)
        text = conditioning.get(TextTokens)
        static = self._embed_static_condition(layout, text, conditioning.get(ClassIds))
        segment_condition = token_condition = nnx.silu(self._embed_time(segment_time) + static)
        row = self._embed_tokens(noisy, token_time, layout, conditioning.get(ConditioningLatents))
        if config.registers:
            row = self._append_registers(row, segment_time)
        if row.token_time is not None:
            token_condition = nnx.silu(self._embed_time(row.token_time) + expand_to_tokens(static, row.segments))
        x = self._apply_blocks(row, noisy.shape[1], segment_condition, token_condition, text)
        shift_scale = self.head_modulation(token_condition)
        if row.token_time is None:
            shift_scale = layout.expand(shift_scale)
        shift, scale = jnp.split(shift_scale[:, : noisy.shape[1]], 2, axis=-1)
        return self._finish_prediction(self.head(modulate(x[:, : noisy.shape[1]], shift, scale))), state

    def _finish_prediction(self, head: Float[Array, "B N o"]) -> Float[Array, "B N prediction"]:
        """Drop the variance from the head's output and negate it, if the config says so."""
        config = self.config
        if config.variance == "dropped":
            by_position = head.reshape(*head.shape[:2], config.patch.volume, -1)
            head = by_position[..., : config.channels].reshape(*head.shape[:2], -1)
        return -head if config.time_embedding.reversed else head

    def _embed_time(self, time: Float[Array, "*batch"]) -> Float[Array, "*batch D"]:
        embedding = self.config.time_embedding
        features = sinusoidal_embedding(embedding.model_time(time), 256, max_period=embedding.max_period)
        return self.time_out(nnx.silu(self.time_in(features)))

    def _embed_static_condition(
        self, layout: PackedRows, text: TextTokens | None, classes: ClassIds | None
    ) -> Float[Array, "B G D"]:
        """Embed the part of a segment's condition that does not depend on time: the mean of its text, and its class.

        An unknown class gives NaN.
        """
        condition: Array = jnp.zeros((layout.segments.shape[0], layout.count, self.config.width), jnp.float32)
        if self.config.context.pooled:
            assert text is not None  # by `Conditioning.check`
            values = text.values.astype(jnp.float32)
            condition = self.context_pooled(segment_mean(values, text.segments, count=layout.count))
        if classes is not None:
            condition = condition + self.labels[...].at[classes.values].get(mode="fill", fill_value=jnp.nan)
        return condition

    def _embed_tokens(
        self,
        noisy: Float[Array, "B N p"],
        token_time: Float[Array, "B N"] | None,
        layout: PackedRows,
        cond_latents: ConditioningLatents | None,
    ) -> _Sequence:
        config = self.config
        x = self.embed(noisy)
        if cond_latents is not None:
            x = x + self.cond_embed(cond_latents.values)
        segments, positions = jnp.asarray(layout.segments), jnp.asarray(layout.positions)
        count, width = layout.count, config.width
        if config.temporal is not None:
            # Time has an embedding of its own, so that all other parts process every frame as an image.
            features = BoundaryEmbedding().compute_features(positions * _TIME_AXIS, segments, count=count, width=width)
            x = x + self.temporal_position(features)
        if config.absolute_position is not None:
            embedded = positions if config.temporal is None else positions * (1 - _TIME_AXIS)
            features = config.absolute_position.compute_features(embedded, segments, count=count, width=width)
            x = x + (features if self.position is None else self.position(features))
        return _Sequence(x.astype(jnp.float32), segments, positions, token_time)

    def _append_registers(self, row: _Sequence, time: Float[Array, "B G"]) -> _Sequence:
        """Append the registers of every segment, at its time and with positions of zero, which rotate nothing."""
        rows, count = time.shape
        ids = jnp.repeat(jnp.arange(1, count + 1, dtype=row.segments.dtype), self.config.registers)
        ids = jnp.tile(ids, (rows, 1))
        zeros = jnp.zeros((*ids.shape, 3), row.positions.dtype)
        token_time = row.token_time
        if token_time is not None:
            token_time = jnp.concatenate([token_time, expand_to_tokens(time, ids)], axis=1)
        return _Sequence(
            jnp.concatenate([row.x, jnp.tile(self.registers[...], (rows, count, 1))], axis=1),
            jnp.concatenate([row.segments, ids], axis=1),
            jnp.concatenate([row.positions, zeros], axis=1),
            token_time,
        )

    def _apply_blocks(
        self,
        row: _Sequence,
        length: int,
        segment_condition: Float[Array, "B G D"],
        token_condition: Float[Array, "B M D"],
        text: TextTokens | None,
    ) -> Float[Array, "B T D"]:
        """Apply all blocks to the row's tokens, of which the first `length` have a position, and to a joint context."""
        config = self.config
        modulation = self._project_modulation(token_condition)
        # Blocks take the embedded context, or, if it is part of the sequence, the modulation of its tokens.
        x, context_input, joint_segments = row.x, None, None
        text_segments = None if text is None else text.segments
        if isinstance(config.context, CrossAttention | JointAttention):
            assert text is not None  # by `Conditioning.check`
            context_input = self.context_in(text.values)
            if isinstance(config.context, JointAttention):
                x = jnp.concatenate([x, context_input.astype(jnp.float32)], axis=1)
                context_input, joint_segments = self._project_modulation(segment_condition), text_segments
        metadata = self._make_block_metadata(row, length, joint_segments)
        attentions = [self.attention(pattern) for pattern in config.layer_patterns]
        spatial = [(modulation, metadata, context_input, text_segments, attention) for attention in attentions]
        if config.temporal is None:
            return scan_layers(x, [LayerGroup(self.blocks, spatial)], remat=config.remat)
        temporal_metadata = metadata._replace(angles=compute_rotary_angles(row.positions, config.time_rotary))
        temporal = (modulation, temporal_metadata, self.attention(TimeOnly()))
        blocks = LayerGroup(self.blocks, spatial * config.temporal.spatial_layers)
        temporal_blocks = LayerGroup(self.temporal_blocks, [temporal] * config.temporal.layers)
        return scan_layers(x, [blocks, temporal_blocks], remat=config.remat)

    def _make_block_metadata(
        self, row: _Sequence, length: int, joint_segments: Int[Array, "B S"] | None
    ) -> BlockMetadata:
        """Return the metadata that all blocks share: segments, grid indices, rotary angles and bias positions."""
        config = self.config
        positions = row.positions if config.temporal is None else row.positions * (1 - _TIME_AXIS)
        segments = row.segments
        if joint_segments is not None:
            segments = jnp.concatenate([segments, joint_segments], axis=1)

        def pad(positions: Array, fill: float | int) -> Array:
            """Pad with the fill value for tokens without a position: registers and a joint context."""
            return jnp.pad(positions, ((0, 0), (0, segments.shape[1] - length), (0, 0)), constant_values=fill)

        indices = None
        if config.layer_patterns != (Full(),):
            indices = pad(compute_grid_indices(row.positions[:, :length], row.segments[:, :length]), GLOBAL)
        return BlockMetadata(
            row.segments,
            AttentionInputs.self_attention(segments, indices),
            compute_rotary_angles(positions, config.rotary) if isinstance(config.rotary, Rotary3d) else None,
            None if config.relative_bias is None else pad(positions[:, :length], jnp.inf),
        )

    def _project_modulation(self, condition: Float[Array, "B M D"]) -> Float[Array, "B M 6 D"] | Float[Array, "B M D"]:
        """Return the shared modulation, or the condition if each block projects it itself."""
        if self.config.modulation == "own":
            return condition
        return self.modulation(condition).reshape(*condition.shape[:2], 6, -1)
