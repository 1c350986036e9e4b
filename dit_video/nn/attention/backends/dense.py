"""Dense attention, which computes all scores at once: the reference of all backends."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dit_video.nn.attention.api import Keys, Queries
from dit_video.nn.attention.bias import Bias
from dit_video.nn.attention.inputs import AttentionInputs
from dit_video.nn.attention.masks import Full, Pattern, dense_mask, mask_boxes

# Finite instead of -inf: the weights of a query that sees nothing are then not NaN, and its output is set to zero.
MASK_VALUE = -1e30


@dataclass(frozen=True, kw_only=True)
class DenseAttention:
    """Attention with materialised scores and softmax in float32, the fastest for rows of up to about 1,000 tokens."""

    pattern: Pattern = Full()

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
    """Return the function from a head's table to the bias of its scores; the table entries are found once for all."""
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
    """Compute attention of one head; `q` is already scaled."""
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
