"""Attention weights as an output, which the backends compute and do not keep."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Float, Float32, Int

from dit_video.nn.attention.api import Attention, Keys, Queries
from dit_video.nn.attention.backends.dense import MASK_VALUE
from dit_video.nn.attention.inputs import AttentionInputs
from dit_video.nn.attention.masks import Full, Pattern, dense_mask, mask_boxes

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
    """Indices in the row of the Q tokens whose weights are recorded."""
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
