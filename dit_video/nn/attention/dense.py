"""Dense attention, which computes all scores at once: the reference of all backends."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Bool, Float, Float32, Int

from dit_video.nn.attention.api import Attention, AttentionInputs, Bias, Keys, Queries, name_calls
from dit_video.nn.attention.masks import Full, Pattern, dense_mask, mask_boxes

# Finite instead of -inf, so that a query that sees nothing gets no NaN weights; its output is set to zero.
MASK_VALUE = -1e30


@dataclass(frozen=True, kw_only=True)
class DenseAttention:
    """Attention with materialised scores and softmax in float32, the fastest for rows of up to about 1,000 tokens."""

    pattern: Pattern = Full()

    @name_calls("dense")
    def __call__(self, q: Queries, k: Keys, v: Keys, inputs: AttentionInputs) -> Queries:
        mask = dense_mask(mask_boxes(self.pattern, inputs))
        q = q * q.shape[-1] ** -0.5
        attend = functools.partial(_attend, mask, _make_bias_reader(inputs.bias))
        table = None if inputs.bias is None else inputs.bias.table
        if jax.default_backend() == "cpu":
            # One head at a time takes a third less time in the backward pass than all heads together.
            heads = range(q.shape[2])
            tables = [None] * len(heads) if table is None else list(table.T)
            return jnp.stack([attend(q[:, :, i], k[:, :, i], v[:, :, i], tables[i]) for i in heads], axis=2)
        return jax.vmap(attend, in_axes=(2, 2, 2, 1), out_axes=2)(q, k, v, table)


def _make_bias_reader(bias: Bias | None) -> Callable[[Float[Array, " T"]], Float[Array, "B N M"]] | None:
    """Return the function from a head's table to the bias of its scores; all heads share the table entries."""
    if bias is None:
        return None
    entries = bias.config.find_entries(bias.q_positions, bias.kv_positions)
    return functools.partial(bias.config.read_bias, entries=entries)


def _attend(
    mask: Bool[Array, "B N M"],
    bias: Callable[[Float[Array, " T"]], Float[Array, "B N M"]] | None,
    q: Float[Array, "B N d"],
    k: Float[Array, "B M d"],
    v: Float[Array, "B M d"],
    table: Float[Array, " T"] | None,
) -> Float[Array, "B N d"]:
    """Compute one head's attention; `q` is already scaled."""
    scores = jnp.einsum("bnd,bmd->bnm", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        assert table is not None
        scores = scores + bias(table)
    scores = scores + jnp.where(mask, 0.0, MASK_VALUE)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = jnp.einsum("bnm,bmd->bnd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    sees_any = mask.any(axis=-1, keepdims=True)
    return jnp.where(sees_any, total / weights.sum(axis=-1, keepdims=True), 0.0).astype(v.dtype)


def dot(left: Float[Array, "_ _"], right: Float[Array, "_ _"], left_axis: int, right_axis: int) -> Float[Array, "_ _"]:
    """Return the matrix product over these axes, summed in float32."""
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)


WeightsCallback = Callable[[Float32[np.ndarray, "B K Q M"]], None]
"""A callback that receives the weights of one attention layer."""


def compute_attention_weights(
    q: Queries, k: Keys, inputs: AttentionInputs, *, pattern: Pattern = Full()
) -> Float[Array, "B K N M"]:
    """Return the softmax of `Attention` in float32; a query's weights sum to 1, or are zero if it sees nothing."""
    mask = dense_mask(mask_boxes(pattern, inputs))[:, None]
    scores = jnp.einsum("bnkd,bmkd->bknm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if (bias := inputs.bias) is not None:
        entries = bias.config.find_entries(bias.q_positions, bias.kv_positions)
        read_bias = jax.vmap(lambda table: bias.config.read_bias(table, entries), in_axes=1, out_axes=1)
        scores = scores + read_bias(bias.table)
    weights = jax.nn.softmax(jnp.where(mask, scores, MASK_VALUE), axis=-1)
    return jnp.where(mask, weights, 0.0)


@dataclass(frozen=True, kw_only=True)
class RecordedAttention:
    """A wrapper around an attention function that also reports the weights of some queries.

    The weights are computed separately, so any backend can be wrapped. It works inside loops and compiled programs:
    `record` is called on the host, in the order of the layers.
    """

    attention: Attention
    pattern: Pattern
    queries: tuple[int, ...]
    """Row indices of the Q tokens whose weights are recorded."""
    record: WeightsCallback

    def __call__(self, q: Queries, k: Keys, v: Keys, inputs: AttentionInputs) -> Queries:
        indices = jnp.asarray(self.queries, jnp.int32)
        weights = compute_attention_weights(q[:, indices], k, _select_queries(inputs, indices), pattern=self.pattern)
        io_callback(lambda values: self.record(np.asarray(values)), None, weights, ordered=True)
        return self.attention(q, k, v, inputs)


def _select_queries(inputs: AttentionInputs, queries: Int[Array, " Q"]) -> AttentionInputs:
    bias = inputs.bias
    if bias is not None:
        bias = replace(bias, q_positions=bias.q_positions[:, queries])
    indices = None if inputs.q_indices is None else inputs.q_indices[:, queries]
    return AttentionInputs(inputs.q_segments[:, queries], inputs.kv_segments, indices, inputs.kv_indices, bias)
