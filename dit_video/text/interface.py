"""What a text encoder is to the rest: a tokenizer on the host, a module on packed rows of tokens."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

Tokenizer = Callable[[str], Int32[np.ndarray, " s"]]
"""A caption to token ids. The empty caption gives at least one token: it is what an unconditional sample is given."""


class Context(NamedTuple):
    """What a denoiser attends to. An encoder may make fewer context tokens than it was given text tokens."""

    values: Float[Array, "B M E"]
    segments: Int[Array, "B M"]
    """as in `Rows`: 0 is padding"""


@runtime_checkable
class TextEncoder(Protocol):
    """Packed token ids to context."""

    def __call__(self, ids: Int[Array, "B S"], segments: Int[Array, "B S"]) -> Context: ...


@runtime_checkable
class TextEncoderConfig(Protocol):
    """The config of an encoder: makes its two halves, and knows its width and limit."""

    @property
    def width(self) -> int:
        """E"""
        ...

    @property
    def max_tokens(self) -> int:
        """A longer caption is truncated to this many tokens."""
        ...

    def make(self, rngs: nnx.Rngs) -> nnx.Module: ...

    def tokenizer(self) -> Tokenizer: ...
