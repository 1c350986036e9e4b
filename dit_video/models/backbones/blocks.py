"""Blocks of transformers: attention and an MLP, with shift, scale and gate from the conditioning.

The residual stream is float32; only matrix products are in the config's dtype.
"""

import functools
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.models.backbones.transformer import TransformerConfig
from dit_video.models.conditioning import TextTokens
from dit_video.nn import (
    Attention,
    AttentionInputs,
    Init,
    Linear,
    Partitioner,
    RmsNorm,
    gelu,
    layer_norm,
    modulate,
)
from dit_video.nn.attention import BiasTable
from dit_video.tokens import expand_to_tokens, rotate, take_tokens


class TokenConditions(NamedTuple):
    """Conditions (time, class, pooled text) that modulate tokens, and which of them each token has."""

    values: Float[Array, "B M *rest"]
    indices: Int[Array, "B N"] | None
    """Number of each token's condition, from 1 on; padding, with 0, gets the first. None if each token has its own."""

    def expand(self, values: Float[Array, "B M *rest"]) -> Float[Array, "B N *rest"]:
        """Return every token's value from one value per condition."""
        return values if self.indices is None else expand_to_tokens(values, self.indices)

    def take(self, kept: Int[Array, "B K"]) -> "TokenConditions":
        """Return the conditions of the tokens with these numbers."""
        if self.indices is None:
            return self._replace(values=take_tokens(self.values, kept))
        return self._replace(indices=take_tokens(self.indices, kept))


class DiTInputs(NamedTuple):
    """Inputs of all blocks besides the tokens and the attention function."""

    condition: TokenConditions
    """Conditions of width D; the head, and blocks with their own modulation, project their modulation from them."""
    modulation: TokenConditions
    """Shared modulation `B M 6 D`, or `condition` if each block projects it itself."""
    angles: Float[Array, "B N half"] | None
    """Rotary angles of queries and keys; None for no rotation."""
    attention_inputs: AttentionInputs
    """Metadata for self-attention."""
    bias_positions: Float[Array, "B N 3"] | None = None
    """Coordinates for a relative bias."""
    context: TextTokens | None = None
    """Embedded text for cross-attention."""

    def take(self, kept: Int[Array, "B K"]) -> "DiTInputs":
        """Return the inputs of some of the tokens; see `TransformerInputs`."""
        return self._replace(
            condition=self.condition.take(kept),
            modulation=self.modulation.take(kept),
            angles=None if self.angles is None else take_tokens(self.angles, kept),
            attention_inputs=self.attention_inputs.take(kept),
            bias_positions=None if self.bias_positions is None else take_tokens(self.bias_positions, kept),
        )


class Stream(nnx.Module):
    """Layers of a block for one kind of tokens: modulation, attention's input and output projections, and an MLP."""

    output_init: ClassVar[Init] = "xavier"
    """Initialisation of the layers whose output is added to the residual stream."""

    def __init__(self, config: TransformerConfig, *, partitioner: Partitioner, rngs: nnx.Rngs):
        width, dtype = config.width, jnp.dtype(config.dtype)
        per_block, hidden = config.modulation == "own", config.mlp_dim
        options: dict[str, Any] = {"precision": "highest" if config.time == "segment" else None, "init": "zero"}
        self.own = Linear(width, 6 * width, partitioner=partitioner, rngs=rngs, **options) if per_block else None
        self.table = None if per_block else nnx.Param(jnp.zeros((6, width), jnp.float32))
        self.heads, self.mlp_norm_eps = config.heads, config.mlp_norm_eps
        self.query_norm, self.key_norm = _make_qk_norm(config), _make_qk_norm(config)
        linear = functools.partial(Linear, bias=config.bias, dtype=dtype, partitioner=partitioner, rngs=rngs)
        self.qkv = linear(width, 3 * width, split="fused")
        self.out = linear(width, width, split="inputs", init=self.output_init)
        self.up = linear(width, hidden, split="outputs")
        self.down = linear(hidden, width, split="inputs", init=self.output_init)
        self.gate = linear(width, hidden, split="outputs") if config.mlp == "swiglu" else None

    def compute_modulation(self, modulation: TokenConditions) -> tuple[Float[Array, "B N D"], ...]:
        """Return shift, scale and gate for attention, then for the MLP."""
        if self.own is not None:
            return tuple(jnp.split(modulation.expand(self.own(modulation.values)), 6, axis=-1))
        assert self.table is not None
        shared = [modulation.values[:, :, index] + self.table[...][index] for index in range(6)]
        return tuple(map(modulation.expand, shared))

    def project_qkv(
        self, x: Float[Array, "B N D"], angles: Float[Array, "B N half"] | None
    ) -> tuple[Float[Array, "B N K d"], Float[Array, "B N K d"], Float[Array, "B N K d"]]:
        """Return queries, keys and values; queries and keys are not rotated if `angles` is None."""
        qkv = self.qkv.project_parts(x, 3)
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

    def __init__(self, config: TransformerConfig, *, partitioner: Partitioner, rngs: nnx.Rngs):
        super().__init__(config, partitioner=partitioner, rngs=rngs)
        self.is_parallel = config.order == "parallel"
        bias = config.relative_bias
        self.relative = None if bias is None else BiasTable(bias, config.heads, rngs=rngs)
        self.has_cross_attention = config.has_cross_attention
        if self.has_cross_attention:
            width, dtype = config.width, jnp.dtype(config.dtype)
            linear = functools.partial(Linear, bias=config.bias, dtype=dtype, partitioner=partitioner, rngs=rngs)
            self.cross = partitioner.make_cross_attention(config.attention)
            self.cross_query = linear(width, width, split="outputs")
            self.cross_key_value = linear(width, 2 * width, split="fused", is_context=True)
            self.cross_query_norm, self.cross_key_norm = _make_qk_norm(config), _make_qk_norm(config)
            self.cross_out = linear(width, width, split="inputs", init="zero")

    def __call__(self, x: Float[Array, "B N D"], inputs: DiTInputs, attention: Attention) -> Float[Array, "B N D"]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.compute_modulation(inputs.modulation)
        start = x
        q, k, v = self.project_qkv(modulate(x, shift, scale), inputs.angles)
        x = x + gate * self.project_out(attention(q, k, v, self._add_bias(inputs)))
        if self.has_cross_attention:
            x = x + self._cross_attention(layer_norm(start if self.is_parallel else x), inputs)
        return x + mlp_gate * self.apply_mlp(start if self.is_parallel else x, mlp_shift, mlp_scale)

    def _add_bias(self, inputs: DiTInputs) -> AttentionInputs:
        if self.relative is None or inputs.bias_positions is None:
            return inputs.attention_inputs
        return inputs.attention_inputs._replace(bias=self.relative(inputs.bias_positions))

    def _cross_attention(self, x: Float[Array, "B N D"], inputs: DiTInputs) -> Float[Array, "B N D"]:
        assert inputs.context is not None
        q = split_heads(self.cross_query(x), self.cross_query_norm, self.heads)
        key_value = self.cross_key_value.project_parts(inputs.context.values, 2)
        k = split_heads(key_value[:, :, 0], self.cross_key_norm, self.heads)
        v = split_heads(key_value[:, :, 1], None, self.heads)
        mixed = self.cross(q, k, v, inputs.attention_inputs.with_context(inputs.context.segments))
        return self.cross_out(mixed.reshape(x.shape)).astype(jnp.float32)


def split_heads(x: Float[Array, "B N D"], norm: RmsNorm | None, heads: int) -> Float[Array, "B N {heads} d"]:
    """Split the width into heads; a norm over the full width comes before the split, a norm over a head after it."""
    if norm is not None and norm.scale.shape[-1] == x.shape[-1]:
        x, norm = norm(x), None
    x = x.reshape(*x.shape[:2], heads, -1)
    return x if norm is None else norm(x)


def _make_qk_norm(config: TransformerConfig) -> RmsNorm | None:
    if config.qk_norm == "none":
        return None
    return RmsNorm(config.width if config.qk_norm == "full" else config.width // config.heads)
