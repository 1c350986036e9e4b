"""Attention among the tokens of a segment.

One function type, `Attention`, is chosen when a model is built; every backend is held equal to `dense`.
"""

from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dit_video.errors import UserError

# Not -inf: a query whose segment has no key gets a uniform average instead of NaN (only padding can be such a query).
_MASKED = -1e30

Backend = Literal["auto", "dense", "chunked"]


class Attention(Protocol):
    """`softmax(q k^T / sqrt(d)) v`, where a query sees the keys with its own segment id and no others."""

    def __call__(
        self,
        q: Float[Array, "B N K d"],
        k: Float[Array, "B M K d"],
        v: Float[Array, "B M K d"],
        *,
        q_segments: Int[Array, "B N"],
        kv_segments: Int[Array, "B M"],
    ) -> Float[Array, "B N K d"]: ...


def make_attention(backend: Backend = "auto", *, chunk: int = 512) -> Attention:
    """The attention function of a backend.

    `dense` materialises the scores, the fastest for rows of up to about a thousand tokens; `chunked` goes through the
    queries in blocks of `chunk`, so that memory is linear in the row's length; `auto` takes `dense` for rows of up to
    `2 * chunk` tokens and `chunked` above.

    Raises:
      UserError: an unknown backend.
    """
    match backend:
        case "dense":
            return dense
        case "chunked":
            return _chunked_by(chunk)
        case "auto":
            return _auto(chunk)
    raise UserError(f"unknown attention backend {backend!r}; use auto, dense or chunked")


def dense(
    q: Float[Array, "B N K d"],
    k: Float[Array, "B M K d"],
    v: Float[Array, "B M K d"],
    *,
    q_segments: Int[Array, "B N"],
    kv_segments: Int[Array, "B M"],
) -> Float[Array, "B N K d"]:
    """The reference: all scores at once, softmax in float32."""
    scores = jnp.einsum("bnkd,bmkd->bknm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    same = q_segments[:, None, :, None] == kv_segments[:, None, None, :]
    weights = jax.nn.softmax(jnp.where(same, scores, _MASKED), axis=-1)
    return jnp.einsum("bknm,bmkd->bnkd", weights.astype(v.dtype), v)


def _chunked_by(chunk: int) -> Attention:
    def chunked(q, k, v, *, q_segments, kv_segments):
        rows, length, heads, width = q.shape
        blocks = -(-length // chunk)
        padding = blocks * chunk - length
        q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
        segments = jnp.pad(q_segments, ((0, 0), (0, padding)))

        # Scores are computed again in the backward pass: keeping them would make memory quadratic after all.
        @jax.checkpoint
        def block(inputs):
            queries, ids = inputs
            return dense(queries, k, v, q_segments=ids, kv_segments=kv_segments)

        q = q.reshape(rows, blocks, chunk, heads, width).swapaxes(0, 1)
        out = jax.lax.map(block, (q, segments.reshape(rows, blocks, chunk).swapaxes(0, 1)))
        return out.swapaxes(0, 1).reshape(rows, blocks * chunk, heads, width)[:, :length]

    return chunked


def _auto(chunk: int) -> Attention:
    chunked = _chunked_by(chunk)

    def auto(q, k, v, *, q_segments, kv_segments):
        function = dense if q.shape[1] <= 2 * chunk else chunked
        return function(q, k, v, q_segments=q_segments, kv_segments=kv_segments)

    return auto
