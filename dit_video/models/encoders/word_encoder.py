"""A small word-level text encoder that is trained with the denoiser and needs no vocabulary.

A word is an embedding of its hash (the hashing trick, arXiv 0902.2206). Unlike in `ByteEncoder`, spelling need not be
learned; but similar words, and words that training never saw, have nothing in common with known ones.
"""

import re
import zlib
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Int32

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.encoders.block import TextBlock, check_width
from dit_video.models.encoders.interface import Context, Tokenizer
from dit_video.models.encoders.tokenizer import cut_tokens
from dit_video.nn import LayerNorm, apply_stack, make_stack, sinusoidal_embedding
from dit_video.tokens import compute_segment_offsets

_END, _SPECIAL = 1, 2
"""Id of the end token, and number of ids that are no words; 0 is padding."""


@dataclass(frozen=True, kw_only=True)
class WordEncoderConfig:
    """Configuration of a pre-norm transformer over words.

    Raises:
      UserError: an odd width, or one not divisible by the heads, no tokens or too few buckets.
    """

    width: int = 96
    layers: int = 2
    heads: int = 4
    max_tokens: int = 64
    """Maximum words and punctuation marks of a text, including its end token."""
    buckets: int = 4096
    """Number of embeddings; words with the same hash share one."""

    def __post_init__(self):
        check_width(self.width, self.heads)
        check_at_least(1, max_tokens=self.max_tokens)
        if self.buckets <= _SPECIAL:
            raise UserError(f"buckets={self.buckets} is invalid: two are no words. Use {_SPECIAL + 1} or more.")

    def make(self, rngs: nnx.Rngs) -> "WordEncoder":
        return WordEncoder(self, rngs=rngs)

    def make_tokenizer(self) -> Tokenizer:
        return WordTokenizer(self.max_tokens, self.buckets)


class WordTokenizer:
    """A tokenizer of words and punctuation marks; letter case and spaces do not matter."""

    def __init__(self, max_tokens: int, buckets: int):
        self.max_tokens, self.buckets = max_tokens, buckets

    def __call__(self, text: str) -> Int32[np.ndarray, " s"]:
        """Return the hashes of the words, and the end token.

        A text of more than `max_tokens` tokens is cut, with a warning.
        """
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        ids = [_SPECIAL + zlib.crc32(word.encode()) % (self.buckets - _SPECIAL) for word in words]
        return np.asarray(cut_tokens([*ids, _END], self.max_tokens, text), np.int32)


class WordEncoder(nnx.Module):
    """An encoder of words to context; texts packed in a row do not see each other."""

    def __init__(self, config: WordEncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.buckets, config.width)))
        self.blocks = make_stack(lambda r: TextBlock(config.width, config.heads, rngs=r), config.layers, rngs=rngs)
        self.norm = LayerNorm(config.width)

    def __call__(self, ids: Int[Array, "B S"], segments: Int[Array, "B S"]) -> Context:
        x = self.embedding[...][ids] + sinusoidal_embedding(compute_segment_offsets(segments), self.config.width)
        return Context(self.norm(apply_stack(self.blocks, x, segments)), segments)
