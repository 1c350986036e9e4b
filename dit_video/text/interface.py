"""What a text encoder is to the rest: a tokenizer on the host, a module on packed rows of tokens.

Of one that is trained with the denoiser the tokens are ids, and the module is all of the encoder. A frozen one has done
its work on the host: its tokens are embeddings, and the module hands them on.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32, Shaped

TextTokens = Int32[np.ndarray, " s"] | Float32[np.ndarray, "s E"]
"""Of one caption, without padding: ids, or embeddings."""
Tokenizer = Callable[[str], TextTokens]
"""A caption to its tokens. The empty caption gives at least one: it is what an unconditional sample is given."""


class Context(NamedTuple):
    """What a denoiser attends to. An encoder may make fewer context tokens than it was given text tokens."""

    values: Float[Array, "B M E"] | None
    segments: Int[Array, "B M"] | None
    """as in `Rows`: 0 is padding"""
    labels: Int[Array, "B S"] | None = None
    """instead of values, of captions that are classes: one token each"""
    label_segments: Int[Array, "B S"] | None = None

    def classes(self, count: int) -> Int[Array, "B {count}"] | None:
        """The class of each of up to `count` segments, where captions are classes; 0 of one that does not exist."""
        if self.labels is None or self.label_segments is None:
            return None
        member = self.label_segments[..., None] == jnp.arange(1, count + 1)
        return jnp.where(member, self.labels[..., None], 0).sum(axis=1)


@runtime_checkable
class TextEncoder(Protocol):
    """Packed tokens to context."""

    def __call__(self, tokens: Shaped[Array, "B S *E"], segments: Int[Array, "B S"], /) -> Context: ...


@runtime_checkable
class TextEncoderConfig(Protocol):
    """The config of an encoder: makes its module, and knows its width and limit."""

    @property
    def width(self) -> int:
        """E"""
        ...

    @property
    def max_tokens(self) -> int:
        """A longer caption is truncated to this many tokens."""
        ...

    def make(self, rngs: nnx.Rngs) -> nnx.Module: ...
