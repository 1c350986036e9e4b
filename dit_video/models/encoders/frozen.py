"""A frozen pretrained text encoder: captions are embedded once, and rows hold the embeddings."""

from dataclasses import dataclass
from typing import Literal

from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.encoders.interface import Context


@dataclass(frozen=True, kw_only=True)
class FrozenTextConfig:
    """Configuration of a frozen text encoder, and the values that its files must match.

    Raises:
      UserError: no folder, or a width or limit below 1.
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
