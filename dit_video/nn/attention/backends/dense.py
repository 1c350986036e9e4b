"""The reference: all scores at once."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dit_video.nn.attention.api import Keys, Queries
from dit_video.nn.attention.bias import Bias
from dit_video.nn.attention.masks import Full, Pattern, sight, visible
from dit_video.nn.attention.tokens import Tokens

# Not -inf: a query that sees nothing gets finite weights, which are then dropped, instead of NaN.
MASKED = -1e30


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Materialised scores, softmax in float32: the fastest for rows of up to about a thousand tokens."""

    pattern: Pattern = Full()

    def __call__(self, q: Queries, k: Keys, v: Keys, at: Tokens) -> Queries:
        """On CPU heads are taken one at a time, a third less time in the backward pass than all heads together."""
        mask = visible(sight(self.pattern, at))
        q = q * q.shape[-1] ** -0.5
        attend = functools.partial(_attend, mask, _bias(at.bias))
        table = None if at.bias is None else at.bias.table
        if jax.default_backend() == "cpu":
            number = range(q.shape[2])
            tables = [None] * len(number) if table is None else list(table.T)
            return jnp.stack([attend(q[:, :, i], k[:, :, i], v[:, :, i], tables[i]) for i in number], axis=2)
        return jax.vmap(attend, in_axes=(2, 2, 2, 1), out_axes=2)(q, k, v, table)


def _bias(bias: Bias | None) -> Callable[[Float[Array, " T"]], Float[Array, "B N M"]] | None:
    """What is added to the scores of a head with a table of values: all heads find theirs at the same entries."""
    if bias is None:
        return None
    return functools.partial(bias.relative.read, found=bias.relative.find(bias.q_coordinates, bias.kv_coordinates))


def _attend(
    mask: Bool[Array, "B N M"],
    bias: Callable[[Float[Array, " T"]], Float[Array, "B N M"]] | None,
    q: Float[Array, "B N d"],
    k: Float[Array, "B M d"],
    v: Float[Array, "B M d"],
    table: Float[Array, " T"] | None,
) -> Float[Array, "B N d"]:
    """One head; `q` is already scaled."""
    scores = jnp.einsum("bnd,bmd->bnm", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        assert table is not None
        scores = scores + bias(table)
    scores = scores + jnp.where(mask, 0.0, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    mixed = jnp.einsum("bnm,bmd->bnd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    seen = mask.any(axis=-1, keepdims=True)
    return jnp.where(seen, mixed / weights.sum(axis=-1, keepdims=True), 0.0).astype(v.dtype)
