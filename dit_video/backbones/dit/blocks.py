"""Transformer blocks: attention and an MLP, with shift, scale and gate from the conditioning.

The residual stream is float32; only matrix products are in the config's dtype.
"""

from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.backbones.dit.conditioning import CrossAttention, JointAttention
from dit_video.backbones.dit.config import DitConfig
from dit_video.nn import (
    Attention,
    AttentionInputs,
    FusedConstraint,
    Init,
    Linear,
    RmsNorm,
    gelu,
    layer_norm,
    make_attention,
    modulate,
)
from dit_video.nn.attention import BiasTable
from dit_video.tokens import expand_to_tokens, rotate


class BlockMetadata(NamedTuple):
    """Inputs that all blocks share, besides the tokens."""

    segments: Int[Array, "B N"]
    attention_inputs: AttentionInputs
    """Metadata for self-attention; the tokens of a joint context follow those of the row."""
    angles: Float[Array, "B N half"] | None
    bias_positions: Float[Array, "B T 3"] | None = None
    """Coordinates for a relative bias, of all tokens in self-attention."""


def make_block(config: DitConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """Build the kind of block that fits the config's context."""
    if isinstance(config.context, JointAttention):
        return JointBlock(config, rngs=rngs)
    return Block(config, rngs=rngs)


def expand_modulation(
    values: Float[Array, "B M *rest"], segments: Int[Array, "B N"], *, per_token: bool
) -> Float[Array, "B N *rest"]:
    """Return every token's value from values per segment, or per token already."""
    return values if per_token else expand_to_tokens(values, segments)


class Stream(nnx.Module):
    """Layers of a block for one kind of tokens: modulation, attention's input and output projections, and an MLP."""

    output_init: ClassVar[Init] = "xavier"
    """Initialisation of the layers whose output is added to the residual stream."""
    fused_constraint: FusedConstraint | None = None
    """Sharding constraint on the fused weights of queries, keys and values, on several devices."""

    def __init__(self, config: DitConfig, *, per_token: bool, rngs: nnx.Rngs):
        self._add_modulation(config, per_token, rngs)
        self._add_attention(config, rngs)
        self._add_mlp(config, rngs)

    def _add_modulation(self, config: DitConfig, per_token: bool, rngs: nnx.Rngs) -> None:
        self.heads, self.per_token = config.heads, per_token
        width, per_block = config.width, config.modulation == "own"
        self.own = Linear(width, 6 * width, init="zero", rngs=rngs) if per_block else None
        self.table = None if per_block else nnx.Param(jnp.zeros((6, width), jnp.float32))

    def _add_attention(self, config: DitConfig, rngs: nnx.Rngs) -> None:
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.qkv = Linear(width, 3 * width, bias=config.bias, dtype=dtype, rngs=rngs)
        self.query_norm, self.key_norm = _make_qk_norm(config), _make_qk_norm(config)
        self.out = Linear(width, width, bias=config.bias, init=self.output_init, dtype=dtype, rngs=rngs)

    def _add_mlp(self, config: DitConfig, rngs: nnx.Rngs) -> None:
        width, hidden, dtype = config.width, config.mlp_dim, jnp.dtype(config.dtype)
        self.up = Linear(width, hidden, bias=config.bias, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, bias=config.bias, init=self.output_init, dtype=dtype, rngs=rngs)
        self.mlp_norm_eps = config.mlp_norm_eps
        gated = config.mlp == "swiglu"
        self.gate = Linear(width, hidden, bias=config.bias, dtype=dtype, rngs=rngs) if gated else None

    def compute_modulation(
        self, modulation: Float[Array, "B M 6 D"] | Float[Array, "B M D"], segments: Int[Array, "B N"]
    ) -> tuple[Float[Array, "B N D"], ...]:
        """Return shift, scale and gate of attention, then those of the MLP.

        `modulation` is the shared one, per segment or per token, or the condition, which this stream then projects.
        """
        if self.own is None:
            assert self.table is not None
            shared = [modulation[:, :, index] + self.table[...][index] for index in range(6)]
            return tuple(expand_modulation(part, segments, per_token=self.per_token) for part in shared)
        projected = expand_modulation(self.own(modulation), segments, per_token=self.per_token)
        return tuple(jnp.split(projected, 6, axis=-1))

    def project_qkv(
        self, x: Float[Array, "B N D"], angles: Float[Array, "B N half"] | None
    ) -> tuple[Float[Array, "B N K d"], Float[Array, "B N K d"], Float[Array, "B N K d"]]:
        """Return queries, keys and values; queries and keys are not rotated if `angles` is None."""
        qkv = self.qkv.project_parts(x, 3, self.fused_constraint)
        q = split_heads(qkv[:, :, 0], self.query_norm, self.heads)
        k = split_heads(qkv[:, :, 1], self.key_norm, self.heads)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        return q, k, split_heads(qkv[:, :, 2], None, self.heads)

    def project_out(self, mixed: Float[Array, "B N K d"]) -> Float[Array, "B N D"]:
        """Project attention's output, to be added to the residual stream."""
        return self.out(mixed.reshape(*mixed.shape[:2], -1)).astype(jnp.float32)

    def apply_mlp(
        self, x: Float[Array, "B N D"], shift: Float[Array, "B N D"], scale: Float[Array, "B N D"]
    ) -> Float[Array, "B N D"]:
        """Apply modulation, linear, tanh-GELU, linear; or SwiGLU, `down(silu(gate(x)) * up(x))` (arXiv 2002.05202)."""
        x = modulate(x, shift, scale, eps=self.mlp_norm_eps)
        up = self.up(x)
        hidden = gelu(up) if self.gate is None else nnx.silu(self.gate(x)) * up
        return self.down(hidden).astype(jnp.float32)


class Block(Stream):
    """A block with self-attention within segments, cross-attention to the context if there is one, and an MLP."""

    def __init__(self, config: DitConfig, *, rngs: nnx.Rngs):
        self.parallel = config.order == "parallel"
        # The order of these calls decides which random numbers each parameter gets.
        self._add_modulation(config, config.time == "token", rngs)
        self._add_attention(config, rngs)
        self.has_cross_attention = isinstance(config.context, CrossAttention)
        if self.has_cross_attention:
            width, dtype = config.width, jnp.dtype(config.dtype)
            self.cross: Attention = make_attention(config.attention)
            self.cross_query = Linear(width, width, bias=config.bias, dtype=dtype, rngs=rngs)
            self.cross_key_value = Linear(width, 2 * width, bias=config.bias, dtype=dtype, rngs=rngs)
            self.cross_query_norm, self.cross_key_norm = _make_qk_norm(config), _make_qk_norm(config)
            self.cross_out = Linear(width, width, bias=config.bias, init="zero", dtype=dtype, rngs=rngs)
        self._add_mlp(config, rngs)
        self.relative = _make_bias_table(config, rngs)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        modulation: Float[Array, "B M 6 D"] | Float[Array, "B M D"],
        metadata: BlockMetadata,
        context: Float[Array, "B S D"] | None,
        context_segments: Int[Array, "B S"] | None,
        attention: Attention,
    ) -> Float[Array, "B N D"]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.compute_modulation(modulation, metadata.segments)
        start = x
        q, k, v = self.project_qkv(modulate(x, shift, scale), metadata.angles)
        x = x + gate * self.project_out(attention(q, k, v, _add_bias(metadata, self.relative)))
        if self.has_cross_attention:
            cross_input = layer_norm(start if self.parallel else x)
            x = x + self._cross_attention(cross_input, metadata.segments, context, context_segments)
        return x + mlp_gate * self.apply_mlp(start if self.parallel else x, mlp_shift, mlp_scale)

    def _cross_attention(self, x, segments, context, context_segments):
        q = split_heads(self.cross_query(x), self.cross_query_norm, self.heads)
        key_value = self.cross_key_value.project_parts(context, 2, self.fused_constraint)
        k = split_heads(key_value[:, :, 0], self.cross_key_norm, self.heads)
        v = split_heads(key_value[:, :, 1], None, self.heads)
        mixed = self.cross(q, k, v, AttentionInputs(segments, context_segments))
        return self.cross_out(mixed.reshape(x.shape)).astype(jnp.float32)


class TemporalBlock(Stream):
    """A block with attention over the frames at one position, and an MLP; it is the identity until it is trained.

    Its output layers start at zero, so gates are `1 + gate`: if both were zero in a new model, neither would get a
    gradient.
    """

    output_init: ClassVar[Init] = "zero"

    def __init__(self, config: DitConfig, *, rngs: nnx.Rngs):
        super().__init__(config, per_token=config.time == "token", rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        modulation: Float[Array, "B M 6 D"] | Float[Array, "B M D"],
        metadata: BlockMetadata,
        attention: Attention,
    ) -> Float[Array, "B N D"]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.compute_modulation(modulation, metadata.segments)
        q, k, v = self.project_qkv(modulate(x, shift, scale), metadata.angles)
        x = x + (1 + gate) * self.project_out(attention(q, k, v, metadata.attention_inputs))
        return x + (1 + mlp_gate) * self.apply_mlp(x, mlp_shift, mlp_scale)


class JointBlock(nnx.Module):
    """A block with two streams and joint attention; in `x` the context's tokens follow those of the video."""

    def __init__(self, config: DitConfig, *, rngs: nnx.Rngs):
        self.parallel = config.order == "parallel"
        self.video = Stream(config, per_token=config.time == "token", rngs=rngs)
        self.context = Stream(config, per_token=False, rngs=rngs)
        self.relative = _make_bias_table(config, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        modulation: Float[Array, "B M 6 D"] | Float[Array, "B M D"],
        metadata: BlockMetadata,
        context_modulation: Float[Array, "B G 6 D"] | Float[Array, "B G D"],
        context_segments: Int[Array, "B S"],
        attention: Attention,
    ) -> Float[Array, "B T D"]:
        length = metadata.segments.shape[1]
        streams = (self.video, self.context)
        starts = [x[:, :length], x[:, length:]]
        parts = [
            self.video.compute_modulation(modulation, metadata.segments),
            self.context.compute_modulation(context_modulation, context_segments),
        ]
        heads = [
            stream.project_qkv(modulate(start, shift, scale), angles)
            for stream, start, (shift, scale, *_), angles in zip(
                streams, starts, parts, (metadata.angles, None), strict=True
            )
        ]
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(*heads, strict=True))
        mixed = attention(q, k, v, _add_bias(metadata, self.relative))
        ends = []
        for stream, start, (_, _, gate, mlp_shift, mlp_scale, mlp_gate), part in zip(
            streams, starts, parts, (mixed[:, :length], mixed[:, length:]), strict=True
        ):
            residual = start + gate * stream.project_out(part)
            mlp_input = start if self.parallel else residual
            ends.append(residual + mlp_gate * stream.apply_mlp(mlp_input, mlp_shift, mlp_scale))
        return jnp.concatenate(ends, axis=1)


def split_heads(x: Float[Array, "B N D"], norm: RmsNorm | None, heads: int) -> Float[Array, "B N {heads} d"]:
    """Split the width into heads; a norm of the full width is applied before the split, one of a head's width after."""
    if norm is not None and norm.scale.shape[-1] == x.shape[-1]:
        x, norm = norm(x), None
    x = x.reshape(*x.shape[:2], heads, -1)
    return x if norm is None else norm(x)


def _make_bias_table(config: DitConfig, rngs: nnx.Rngs) -> BiasTable | None:
    return None if config.relative_bias is None else BiasTable(config.relative_bias, config.heads, rngs=rngs)


def _add_bias(metadata: BlockMetadata, bias_table: BiasTable | None) -> AttentionInputs:
    if bias_table is None:
        return metadata.attention_inputs
    assert metadata.bias_positions is not None
    return metadata.attention_inputs._replace(bias=bias_table(metadata.bias_positions))


def _make_qk_norm(config: DitConfig) -> RmsNorm | None:
    if config.qk_norm == "none":
        return None
    return RmsNorm(config.width if config.qk_norm == "full" else config.width // config.heads)
