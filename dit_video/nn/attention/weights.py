"""Attention weights as an output, which the backends compute and do not keep."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Float, Float32, Int

from dit_video.nn.attention.api import Attention, Keys, Queries
from dit_video.nn.attention.backends.dense import MASKED
from dit_video.nn.attention.bias import Bias
from dit_video.nn.attention.masks import Full, Pattern, sight, visible
from dit_video.nn.attention.tokens import Tokens

Record = Callable[[Float32[np.ndarray, "B K Q M"]], None]
"""A callback that receives the weights of one attention layer."""


def attention_weights(q: Queries, k: Keys, at: Tokens, *, pattern: Pattern = Full()) -> Float[Array, "B K N M"]:
    """Return the softmax of `Attention` in float32; a query's weights sum to 1, or are zero if it sees nothing."""
    mask = visible(sight(pattern, at))[:, None]
    scores = jnp.einsum("bnkd,bmkd->bknm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if at.bias is not None:
        scores = scores + _added(at.bias)
    weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)
    return jnp.where(mask, weights, 0.0)


def _added(bias: Bias) -> Float[Array, "B K N M"]:
    entries = bias.relative.find(bias.q_coordinates, bias.kv_coordinates)
    return jax.vmap(lambda table: bias.relative.read(table, entries), in_axes=1, out_axes=1)(bias.table)


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A wrapper around an attention function that also reports the weights of some queries.

    The weights are computed separately, so any backend can be wrapped. It works inside loops and compiled programs:
    `record` is called on the host, in the order of the layers.
    """

    attention: Attention
    pattern: Pattern
    queries: tuple[int, ...]
    """Indices in the row of the Q tokens whose weights are recorded."""
    record: Record

    def __call__(self, q: Queries, k: Keys, v: Keys, at: Tokens) -> Queries:
        indices = jnp.asarray(self.queries, jnp.int32)
        weights = attention_weights(q[:, indices], k, _of_queries(at, indices), pattern=self.pattern)
        io_callback(lambda values: self.record(np.asarray(values)), None, weights, ordered=True)
        return self.attention(q, k, v, at)


def _of_queries(at: Tokens, chosen: Int[Array, " Q"]) -> Tokens:
    bias = at.bias
    if bias is not None:
        bias = Bias(
            relative=bias.relative,
            table=bias.table,
            q_coordinates=bias.q_coordinates[:, chosen],
            kv_coordinates=bias.kv_coordinates,
        )
    indices = None if at.q_indices is None else at.q_indices[:, chosen]
    return Tokens(at.q_segments[:, chosen], at.kv_segments, indices, at.kv_indices, bias)
