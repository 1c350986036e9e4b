"""Text as bytes, read by a small transformer that is trained with the denoiser: needs no download.

The ids are ByT5's (arXiv 2105.13626): 0 is padding, 1 ends a text, byte `b` is `b + 3`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from dit_video.errors import UserError
from dit_video.nn import LayerNorm, Linear, apply_stack, make_attention, make_stack, sinusoidal
from dit_video.text.interface import Tokenizer

VOCABULARY = 256 + 3
END = 1


@dataclass(frozen=True, kw_only=True)
class ByteEncoderConfig:
    """A pre-norm transformer over bytes.

    Raises:
      UserError: the width is not divisible by the heads.
    """

    width: int = 96
    layers: int = 2
    heads: int = 4
    max_tokens: int = 256
    neighbours: int = 4
    """Every byte first sees itself and the `neighbours - 1` bytes before it, so that letters are words early in training."""

    def __post_init__(self):
        if self.width % self.heads:
            raise UserError(f"text width {self.width} must be divisible by its {self.heads} heads")

    def make(self, rngs: nnx.Rngs) -> "ByteEncoder":
        return ByteEncoder(self, rngs=rngs)

    def tokenizer(self) -> Tokenizer:
        return ByteTokenizer(self.max_tokens)


class ByteTokenizer:
    """ByT5's tokenizer from `transformers`, which needs no files."""

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens
        self._tokenizer = None

    def __call__(self, text: str) -> Int32[np.ndarray, " s"]:
        """UTF-8 bytes and the end token, truncated to `max_tokens` tokens."""
        if self._tokenizer is None:
            from transformers.models.byt5.tokenization_byt5 import ByT5Tokenizer

            self._tokenizer = ByT5Tokenizer(extra_ids=0)
        ids = self._tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
        return np.asarray(ids, np.int32)

    def __getstate__(self):
        return {"max_tokens": self.max_tokens, "_tokenizer": None}


class ByteEncoder(nnx.Module):
    """Bytes to context vectors; texts packed in a row do not see each other."""

    def __init__(self, config: ByteEncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        self.embedding = nnx.Param(0.5 * nnx.initializers.normal(1.0)(rngs.params(), (VOCABULARY, width)))
        self.mix = Linear(config.neighbours * width, width, rngs=rngs)
        self.blocks = make_stack(lambda r: _Block(width, config.heads, rngs=r), config.layers, rngs=rngs)
        self.norm = LayerNorm(width)

    def __call__(self, ids: Int[Array, "B S"], segments: Int[Array, "B S"]) -> Float[Array, "B S E"]:
        x = self.embedding[...][ids]
        x = x + self.mix(jnp.concatenate([_shift(x, segments, by) for by in range(self.config.neighbours)], axis=-1))
        x = x + sinusoidal(positions(segments), self.config.width)
        return self.norm(apply_stack(self.blocks, x, segments))


class _Block(nnx.Module):
    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.attention = make_attention("auto")
        self.norm_attention, self.norm_mlp = LayerNorm(width), LayerNorm(width)
        self.qkv = Linear(width, 3 * width, rngs=rngs)
        self.out = Linear(width, width, rngs=rngs)
        self.up, self.down = Linear(width, 4 * width, rngs=rngs), Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "B S E"], segments: Int[Array, "B S"]) -> Float[Array, "B S E"]:
        qkv = self.qkv(self.norm_attention(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        mixed = self.attention(q, k, v, q_segments=segments, kv_segments=segments)
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm_mlp(x))))


def positions(segments: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """The index of every token within its segment."""
    index = jnp.arange(segments.shape[1])[None]
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def _shift(x: Float[Array, "B S E"], segments: Int[Array, "B S"], by: int) -> Float[Array, "B S E"]:
    """The token `by` places before, zero where that is another text's."""
    if by == 0:
        return x
    same = jnp.pad(segments[:, :-by], ((0, 0), (by, 0))) == segments
    return jnp.where(same[..., None], jnp.pad(x[:, :-by], ((0, 0), (by, 0), (0, 0))), 0)
