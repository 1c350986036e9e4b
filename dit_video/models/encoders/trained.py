"""Text encoders that are trained with the denoiser: for bytes, words and class names."""

import re
import zlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.encoders.interface import Context, Tokenizer
from dit_video.models.encoders.tokenizer import cut_tokens
from dit_video.nn import (
    AttentionInputs,
    LayerNorm,
    Linear,
    apply_stack,
    gelu,
    make_attention,
    make_stack,
    sinusoidal_embedding,
)
from dit_video.tokens import compute_segment_offsets


class TextBlock(nnx.Module):
    """A pre-norm block of attention within each text and an MLP."""

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
        mixed = self.attention(q, k, v, AttentionInputs.self_attention(segments))
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.down(gelu(self.up(self.norm_mlp(x))))


def check_width(width: int, heads: int) -> None:
    """Check the width of an encoder.

    Raises:
      UserError: If the width is odd or not divisible by the heads.
    """
    if heads < 1 or width % heads or width % 2:
        raise UserError(f"width={width}, heads={heads} is invalid: use heads that divide an even width")


_BYTE_END, _FIRST_BYTE = 1, 3
"""Ids of the end token and of byte 0."""
_BYTE_VOCABULARY = _FIRST_BYTE + 256


@dataclass(frozen=True, kw_only=True)
class ByteEncoderConfig:
    """Configuration of a pre-norm transformer over patches of bytes.

    Raises:
      UserError: If the width is odd or not divisible by the heads, or the limit is not divisible by the patch.
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

    It does not use `transformers`, whose import takes 2.5 s at each start. A text that spells `</s>` has the bytes of
    these letters, as with its `split_special_tokens`.
    """

    def __init__(self, max_tokens: int, patch: int):
        self.max_tokens, self.patch = max_tokens, patch

    def __call__(self, text: str) -> Int32[np.ndarray, " s"]:
        """Return UTF-8 bytes, the end token and padding up to a multiple of the patch.

        A text of more than `max_tokens` tokens is cut, with a warning.
        """
        ids = cut_tokens([*(_FIRST_BYTE + byte for byte in text.encode()), _BYTE_END], self.max_tokens, text)
        return np.asarray(ids + [0] * (-len(ids) % self.patch), np.int32)


class ByteEncoder(nnx.Module):
    """An encoder of bytes to context; texts packed in a row do not see each other. Rows are multiples of the patch."""

    def __init__(self, config: ByteEncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, patch = config.width, config.patch
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (_BYTE_VOCABULARY, width)))
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


_WORD_END, _SPECIAL = 1, 2
"""Id of the end token, and number of ids that are no words; 0 is padding."""


@dataclass(frozen=True, kw_only=True)
class WordEncoderConfig:
    """Configuration of a pre-norm transformer over words.

    Raises:
      UserError: If the width is odd or not divisible by the heads, or there are no tokens or too few buckets.
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
        return np.asarray(cut_tokens([*ids, _WORD_END], self.max_tokens, text), np.int32)


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


@dataclass(frozen=True, kw_only=True)
class ClassNamesConfig:
    """Configuration of the classes, for a denoiser with `classes` of the same number.

    Raises:
      UserError: If there is no class, or there are more names than classes.
    """

    classes: int
    """Number of classes."""
    names: tuple[str, ...] = ()
    """Names of the classes in order; synonyms of one class are separated by commas."""

    def __post_init__(self):
        check_at_least(max(1, len(self.names)), classes=self.classes)

    @property
    def width(self) -> int:
        """Return the width of the context: 0, as there is none."""
        return 0

    @property
    def max_tokens(self) -> int:
        """Return the tokens of a caption: 1, its class."""
        return 1

    def make(self, rngs: nnx.Rngs) -> "ClassNames":
        return ClassNames()

    def make_tokenizer(self) -> Tokenizer:
        return ClassTokenizer(self)


class ClassTokenizer:
    """A tokenizer whose only token is a caption's class; the empty caption is the number of classes, for no class."""

    def __init__(self, config: ClassNamesConfig):
        self._classes = config.classes
        self._classes_by_name: dict[str, list[int]] = {}
        for number, names in enumerate(config.names):
            for name in {synonym.strip() for synonym in (names, *names.split(","))}:
                self._classes_by_name.setdefault(name, []).append(number)

    def __call__(self, text: str) -> Int32[np.ndarray, " 1"]:
        """Return the class of a caption.

        Raises:
          UserError: If no class has this name or number, or several have it.
        """
        return np.asarray([self._find_class(text.strip())], np.int32)

    def _find_class(self, text: str) -> int:
        if not text:
            return self._classes
        names = self._classes_by_name
        matches = [int(text)] if text.isdecimal() and int(text) < self._classes else names.get(text, [])
        if len(matches) == 1:
            return matches[0]
        if matches:
            numbers = ", ".join(map(str, matches))
            raise UserError(f"the caption {text!r} is ambiguous: it names classes {numbers}. Use the number")
        named = f", or one of {len(names)} names such as {next(iter(names))!r}" if names else ""
        raise UserError(f"the caption {text!r} is no class: use a number from 0 to {self._classes - 1}{named}")


class ClassNames(nnx.Module):
    """A text encoder without parameters that passes class labels on, and no context."""

    def __call__(self, labels: Int[Array, "B S"], segments: Int[Array, "B S"]) -> Context:
        return Context(None, None, labels, segments)
