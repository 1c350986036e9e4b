"""A pretrained text encoder that is not trained: captions are embedded once, and rows hold the embeddings."""

from dataclasses import dataclass
from typing import Literal

from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError
from dit_video.text.interface import Context


@dataclass(frozen=True, kw_only=True)
class FrozenTextConfig:
    """Which encoder, and what is expected of it.

    Raises:
      UserError: no folder, a width or a limit below 1.
    """

    folder: str
    """of the encoder's weights, config and tokenizer, as other projects publish them"""
    width: int
    """of its embeddings"""
    max_tokens: int = 512
    """a longer caption is cut"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of its matrix products and their weights"""
    cleaned: bool = False
    """whether texts are cleaned before they are tokenized, as Wan's are (`text.clean`)"""
    identity: str = ""
    """Of encoder, tokenizer and the three fields above, as `weights.load_embedder` computes it: the folder must hold
    that encoder; empty takes any. Where it is given, training on cached embeddings does without the folder."""

    def __post_init__(self):
        if not self.folder or self.width < 1 or self.max_tokens < 1:
            raise UserError(
                f"a frozen text encoder needs a folder, and a width and max_tokens of at least 1, not {self.folder!r}, "
                f"{self.width} and {self.max_tokens}"
            )

    def make(self, rngs: nnx.Rngs) -> "FrozenText":
        return FrozenText()


class FrozenText(nnx.Module):
    """Embeddings as they are: no parameters."""

    def __call__(self, values: Float[Array, "B S E"], segments: Int[Array, "B S"]) -> Context:
        return Context(values, segments)
