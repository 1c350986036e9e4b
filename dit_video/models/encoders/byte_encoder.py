"""A small byte-level text encoder that is trained with the denoiser and needs no download.

The ids are ByT5's (arXiv 2105.13626): 0 is padding, 1 ends a text, byte `b` is `b + 3`. A text has many bytes with
little information each, so `patch` of them become one context token before the transformer (as in MegaByte, arXiv
2305.07185).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from dit_video.core.errors import UserError
from dit_video.models.encoders.block import TextBlock, check_width
from dit_video.models.encoders.interface import Context, Tokenizer
from dit_video.models.encoders.tokenizer import cut_tokens
from dit_video.nn import LayerNorm, Linear, apply_stack, gelu, make_stack, sinusoidal_embedding
from dit_video.tokens import compute_segment_offsets

_END, _FIRST_BYTE = 1, 3
"""Ids of the end token and of byte 0."""
VOCABULARY = _FIRST_BYTE + 256


@dataclass(frozen=True, kw_only=True)
class ByteEncoderConfig:
    """Configuration of a pre-norm transformer over patches of bytes.

    Raises:
      UserError: an odd width, or one not divisible by the heads, or a limit that is not divisible by the patch.
    """

    width: int = 96
    layers: int = 2
    heads: int = 4
    max_tokens: int = 256
    """Maximum bytes of a text including its end token; padded to whole patches."""
    patch: int = 4
    """Bytes per context token."""

    def __post_init__(self):
        check_width(self.width, self.heads)
        if self.patch < 1 or self.max_tokens < 1 or self.max_tokens % self.patch:
            raise UserError(f"max_tokens={self.max_tokens}, patch={self.patch} is invalid: use a multiple of the patch")

    def make(self, rngs: nnx.Rngs) -> "ByteEncoder":
        return ByteEncoder(self, rngs=rngs)

    def make_tokenizer(self) -> Tokenizer:
        return ByteTokenizer(self.max_tokens, self.patch)


class ByteTokenizer:
    """A tokenizer with the ids of ByT5's, which needs no files; texts are padded to whole patches.

    It is not the one of `transformers`, whose import takes 2.5 s of each start. A text that spells `</s>` has the bytes
    of these letters, as with its `split_special_tokens`.
    """

    def __init__(self, max_tokens: int, patch: int):
        self.max_tokens, self.patch = max_tokens, patch

    def __call__(self, text: str) -> Int32[np.ndarray, " s"]:
        """Return UTF-8 bytes, the end token and padding up to a multiple of the patch.

        A text of more than `max_tokens` tokens is cut, with a warning.
        """
        ids = cut_tokens([*(_FIRST_BYTE + byte for byte in text.encode()), _END], self.max_tokens, text)
        return np.asarray(ids + [0] * (-len(ids) % self.patch), np.int32)


class ByteEncoder(nnx.Module):
    """An encoder of bytes to context; texts packed in a row do not see each other. Rows are multiples of the patch."""

    def __init__(self, config: ByteEncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, patch = config.width, config.patch
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (VOCABULARY, width)))
        self.neighbours = Linear(patch * width, width, rngs=rngs)
        self.merge = Linear(patch * width, width, rngs=rngs)
        self.blocks = make_stack(lambda r: TextBlock(width, config.heads, rngs=r), config.layers, rngs=rngs)
        self.norm = LayerNorm(width)

    def __call__(self, ids: Int[Array, "B S"], segments: Int[Array, "B S"]) -> Context:
        rows, patch, width = ids.shape[0], self.config.patch, self.config.width
        letters = self.embedding[...][ids]
        # Every byte sees those before it, so that a word's features depend less on where a patch begins.
        shifted = jnp.concatenate([_shift(letters, segments, offset) for offset in range(patch)], axis=-1)
        neighbours = self.neighbours(shifted)
        x = self.merge(gelu(letters + neighbours).reshape(rows, -1, patch * width))
        segments = segments[:, ::patch]
        x = x + sinusoidal_embedding(compute_segment_offsets(segments), width)
        return Context(self.norm(apply_stack(self.blocks, x, segments)), segments)


def _shift(x: Float[Array, "B S E"], segments: Int[Array, "B S"], offset: int) -> Float[Array, "B S E"]:
    """Return the token `offset` positions before each, zero if that belongs to another text."""
    if offset == 0:
        return x
    same_segment = jnp.pad(segments[:, :-offset], ((0, 0), (offset, 0))) == segments
    return jnp.where(same_segment[..., None], jnp.pad(x[:, :-offset], ((0, 0), (offset, 0), (0, 0))), 0)
