"""Interface of text encoders: a tokenizer on the host, and a module on packed rows of tokens.

The tokens of an encoder that is trained with the denoiser are ids, and the module is the whole encoder. A frozen
encoder runs on the host: its tokens are embeddings, and the module passes them on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32

from dit_video.core.errors import UserError, check_at_least

CaptionTokens = Int32[np.ndarray, " s"] | Float32[np.ndarray, "s E"]
"""Tokens of one caption, without padding: ids, or embeddings."""
Tokenizer = Callable[[str], CaptionTokens]
"""Function from a caption to its tokens. The empty caption, for unconditional samples, has at least one token."""


@runtime_checkable
class BatchTokenizer(Protocol):
    """A tokenizer that takes less time, or moves its weights less often, for several captions together."""

    def __call__(self, caption: str, /) -> CaptionTokens: ...

    def encode_many(self, texts: Sequence[str], /) -> Sequence[CaptionTokens]:
        """Return the tokens of each caption."""


class Context(NamedTuple):
    """Context tokens that a denoiser attends to. There may be fewer of them than text tokens."""

    values: Float[Array, "B M E"] | None
    """Context tokens."""
    segments: Int[Array, "B M"] | None
    """Segment ids of the context tokens, as in `PackedBatch`; 0 is padding."""
    labels: Int[Array, "B S"] | None = None
    """Class labels instead of values, one token per caption."""
    label_segments: Int[Array, "B S"] | None = None
    """Segment ids of the labels."""

    def get_classes(self, count: int) -> Int[Array, "B {count}"] | None:
        """Return the class of each of up to `count` segments if captions are classes; 0 for absent segments."""
        if self.labels is None or self.label_segments is None:
            return None
        in_segment = self.label_segments[..., None] == jnp.arange(1, count + 1)
        return jnp.where(in_segment, self.labels[..., None], 0).sum(axis=1)


@dataclass(frozen=True, kw_only=True)
class FrozenTextConfig:
    """Configuration of a frozen text encoder, and the values that its files must match.

    Raises:
      UserError: If there is no folder, or a width or limit is below 1.
    """

    folder: str
    """Folder of the encoder's weights, config and tokenizer, as other projects publish them."""
    width: int
    """Width of its embeddings."""
    max_tokens: int = 512
    """Maximum tokens of a caption; a longer one is cut."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of its matrix products and their weights."""
    cleaned: bool = False
    """True cleans texts before tokenization, as Wan does (`text.clean`)."""
    identity: str = ""
    """Hash of encoder, tokenizer and the three fields above, from `weights.load_embedder`: the folder must hold that
    encoder; empty accepts any. If it is set, training on cached embeddings does not need the folder."""

    def __post_init__(self):
        check_at_least(1, width=self.width, max_tokens=self.max_tokens)
        if not self.folder:
            raise UserError("folder='' is invalid: captions need an encoder. Use the folder of its weights.")

    def make(self, rngs: nnx.Rngs) -> "FrozenText":
        return FrozenText()


class FrozenText(nnx.Module):
    """A text encoder without parameters that passes cached embeddings on."""

    def __call__(self, values: Float[Array, "B S E"], segments: Int[Array, "B S"]) -> Context:
        return Context(values, segments)
