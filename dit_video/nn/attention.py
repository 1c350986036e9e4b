"""Attention among the tokens of a segment.

One function type, `Attention`, is chosen when a model is built; every backend is held equal to `dense`.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dit_video.errors import UserError

# Not -inf: a query whose segment has no key gets a uniform average instead of NaN (only padding can be such a query).
_MASKED = -1e30

Backend = Literal["auto", "dense", "chunked"]


@runtime_checkable
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
            return Chunked(chunk)
        case "auto":
            return Auto(2 * chunk, Chunked(chunk))
    raise UserError(f"unknown attention backend {backend!r}; use auto, dense or chunked")


def dense(
    q: Float[Array, "B N K d"],
    k: Float[Array, "B M K d"],
    v: Float[Array, "B M K d"],
    *,
    q_segments: Int[Array, "B N"],
    kv_segments: Int[Array, "B M"],
) -> Float[Array, "B N K d"]:
    """The reference: all scores at once, softmax in float32.

    On CPU heads are taken one at a time, a third less time in the backward pass than all heads together.
    """
    bias = jnp.where(q_segments[:, :, None] == kv_segments[:, None, :], 0.0, _MASKED)  # B N M
    q = q * q.shape[-1] ** -0.5
    if jax.default_backend() == "cpu":
        heads = [_attend(q[:, :, head], k[:, :, head], v[:, :, head], bias) for head in range(q.shape[2])]
        return jnp.stack(heads, axis=2)
    return jax.vmap(_attend, in_axes=(2, 2, 2, None), out_axes=2)(q, k, v, bias)


def _attend(
    q: Float[Array, "B N d"], k: Float[Array, "B M d"], v: Float[Array, "B M d"], bias: Float[Array, "B N M"]
) -> Float[Array, "B N d"]:
    """One head; `q` is already scaled."""
    scores = jnp.einsum("bnd,bmd->bnm", q, k, preferred_element_type=jnp.float32) + bias
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    mixed = jnp.einsum("bnm,bmd->bnd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (mixed / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)


@dataclass(frozen=True)
class Chunked:
    """Queries in blocks of `chunk`: memory is linear in the row's length."""

    chunk: int

    def __call__(
        self,
        q: Float[Array, "B N K d"],
        k: Float[Array, "B M K d"],
        v: Float[Array, "B M K d"],
        *,
        q_segments: Int[Array, "B N"],
        kv_segments: Int[Array, "B M"],
    ) -> Float[Array, "B N K d"]:
        rows, length, heads, width = q.shape
        blocks = -(-length // self.chunk)
        padding = blocks * self.chunk - length
        padded = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
        segments = jnp.pad(q_segments, ((0, 0), (0, padding)))

        # Scores are computed again in the backward pass: keeping them would make memory quadratic after all.
        @jax.checkpoint
        def block(inputs):
            queries, ids = inputs
            return dense(queries, k, v, q_segments=ids, kv_segments=kv_segments)

        queries = padded.reshape(rows, blocks, self.chunk, heads, width).swapaxes(0, 1)
        out = jax.lax.map(block, (queries, segments.reshape(rows, blocks, self.chunk).swapaxes(0, 1)))
        return out.swapaxes(0, 1).reshape(rows, blocks * self.chunk, heads, width)[:, :length]


@dataclass(frozen=True)
class Auto:
    """`dense` for rows of up to `limit` tokens, `Chunked` above."""

    limit: int
    chunked: Chunked

    def __call__(
        self,
        q: Float[Array, "B N K d"],
        k: Float[Array, "B M K d"],
        v: Float[Array, "B M K d"],
        *,
        q_segments: Int[Array, "B N"],
        kv_segments: Int[Array, "B M"],
    ) -> Float[Array, "B N K d"]:
        function = dense if q.shape[1] <= self.limit else self.chunked
        return function(q, k, v, q_segments=q_segments, kv_segments=kv_segments)
