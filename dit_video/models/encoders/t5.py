"""Encoders of T5 (arXiv 1910.10683), T5 v1.1 (arXiv 2002.05202) and UMT5 (arXiv 2304.09151), on packed rows.

Pre-norm blocks without biases: `x += attention(norm(x))`, `x += mlp(norm(x))`, with an RMS norm. The position of a
token enters only as a bias of each attention score, learned per bucket of distances and head. Scores are not divided by
the square root of the head's width.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.encoders.interface import Context
from dit_video.nn import Linear, RmsNorm, apply_stack, gelu, make_stack

# Not -inf: the softmax of a fully masked row would be NaN.
_MASKED = -1e30
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """Configuration of an encoder; `weights.load_text_encoder` reads one from a folder.

    Raises:
      UserError: If a size is below 1, the buckets do not fit the maximum distance, or the dtype is not supported.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    head_width: int = 64
    """Width of each head; heads times this need not be `width`."""
    mlp_width: int
    activation: Literal["gated-gelu", "relu"] = "gated-gelu"
    """MLP: `gelu(x W) * (x V)` with tanh gelu (T5 v1.1, UMT5), or `relu(x W)` (T5 v1.0)."""
    buckets: int = 32
    """Buckets of distances, half of them for each direction."""
    max_distance: int = 128
    """Distance from which on all tokens share a bucket."""
    position_bias: Literal["each layer", "shared"] = "each layer"
    """Table of position biases: one for each layer (UMT5), or one for all (T5)."""
    eps: float = 1e-6
    """Epsilon of RMS norms."""
    dtype: str = "float32"
    """Dtype of matrix products, float32 or bfloat16; norms, softmax and the residual stream are float32."""

    def __post_init__(self):
        sizes = ("vocabulary", "width", "layers", "heads", "head_width", "mlp_width")
        check_at_least(1, **{name: getattr(self, name) for name in sizes})
        if self.buckets < 4 or self.buckets % 2 or self.max_distance <= self.buckets // 4:
            raise UserError(
                f"buckets={self.buckets}, max_distance={self.max_distance} is invalid: use an even number of buckets, "
                "at least 4, and a max_distance above a quarter of them"
            )
        if self.dtype not in _DTYPES:
            raise UserError(f"dtype={self.dtype!r} of a text encoder is invalid: use {' or '.join(_DTYPES)}")

    def make(self, rngs: nnx.Rngs) -> "T5Encoder":
        return T5Encoder(self, rngs=rngs)


class T5Encoder(nnx.Module):
    """An encoder from token ids to context; texts packed in a row do not see each other.

    The tokens of a text are adjacent, as `tokens.pack` places them: the distance between two of them in the row is
    their distance in the text, and one table of biases serves all rows.
    """

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocabulary, config.width)))
        self.position = _PositionBias(config, rngs=rngs) if config.position_bias == "shared" else None
        self.blocks = make_stack(lambda r: _Block(config, rngs=r), config.layers, rngs=rngs)
        self.norm = RmsNorm(config.width, eps=config.eps)

    def __call__(self, ids: Int[Array, "B S"], segments: Int[Array, "B S"]) -> Context:
        x = self.embedding[...][ids].astype(jnp.float32)
        same = segments[:, :, None] == segments[:, None, :]
        shared = None if self.position is None else self.position(ids.shape[1])
        return Context(self.norm(apply_stack(self.blocks, x, same, shared)), segments)


class _Block(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        dtype, inner = jnp.dtype(config.dtype), config.heads * config.head_width

        def linear(features_in: int, features_out: int) -> Linear:
            return Linear(features_in, features_out, bias=False, dtype=dtype, rngs=rngs)

        self.heads = config.heads
        self.norm_attention = RmsNorm(config.width, eps=config.eps)
        self.query, self.key, self.value = (linear(config.width, inner) for _ in range(3))
        self.position = _PositionBias(config, rngs=rngs) if config.position_bias == "each layer" else None
        self.out = linear(inner, config.width)
        self.norm_mlp = RmsNorm(config.width, eps=config.eps)
        self.gate = linear(config.width, config.mlp_width) if config.activation == "gated-gelu" else None
        self.up, self.down = linear(config.width, config.mlp_width), linear(config.mlp_width, config.width)

    def __call__(
        self, x: Float[Array, "B S E"], same_segment: Bool[Array, "B S S"], shared_bias: Float[Array, "K S S"] | None
    ) -> Float[Array, "B S E"]:
        y = self.norm_attention(x)
        q, k, v = (linear(y).reshape(*x.shape[:2], self.heads, -1) for linear in (self.query, self.key, self.value))
        bias = shared_bias if self.position is None else self.position(x.shape[1])
        assert bias is not None  # the encoder has a shared table if its layers have none
        x = x + self.out(_attend(q, k, v, bias=bias, same_segment=same_segment).reshape(*x.shape[:2], -1))
        y = self.norm_mlp(x)
        hidden = jax.nn.relu(self.up(y)) if self.gate is None else gelu(self.gate(y)) * self.up(y)
        return x + self.down(hidden)


class _PositionBias(nnx.Module):
    """A learned bias of attention scores for each bucket of distances and each head."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.buckets, self.max_distance = config.buckets, config.max_distance
        self.table = nnx.Param(jax.random.normal(rngs.params(), (config.buckets, config.heads)))

    def __call__(self, length: int) -> Float[Array, "K S S"]:
        buckets = compute_relative_buckets(length, buckets=self.buckets, max_distance=self.max_distance)
        return self.table[...].astype(jnp.float32).T[:, buckets]


def _attend(
    q: Float[Array, "B S K d"],
    k: Float[Array, "B S K d"],
    v: Float[Array, "B S K d"],
    *,
    bias: Float[Array, "K S S"],
    same_segment: Bool[Array, "B S S"],
) -> Float[Array, "B S K d"]:
    """Return `softmax(q k^T + bias) v`, with the softmax in float32.

    Not `nn.Attention`, which scales the scores and takes no bias; its savings in long rows do not matter for texts of
    a few hundred tokens.
    """
    scores = jnp.einsum("bnkd,bmkd->bknm", q, k, preferred_element_type=jnp.float32) + bias
    weights = jax.nn.softmax(jnp.where(same_segment[:, None], scores, _MASKED), axis=-1)
    return jnp.einsum("bknm,bmkd->bnkd", weights.astype(v.dtype), v)


def compute_relative_buckets(length: int, *, buckets: int, max_distance: int) -> Int32[np.ndarray, "S S"]:
    """Return the bucket of every (query, key): by direction and distance, exact when near and logarithmic when far.

    In each direction, with h = `buckets` / 2 and e = h / 2, distances below e have a bucket each; a distance n of e or
    more has bucket `e + floor((h - e) log(n / e) / log(max_distance / e))`, at most h - 1.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance, half = np.abs(offset), buckets // 2
    exact = half // 2
    # In float32, as in the models' training: if the logarithm is a whole number, rounding decides the bucket.
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / exact) / math.log(max_distance / exact)
    far = np.minimum(exact + (ratio * (half - exact)).astype(np.int32), half - 1)
    return (np.where(offset > 0, half, 0) + np.where(distance < exact, distance, far)).astype(np.int32)
