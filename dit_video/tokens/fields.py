"""Fields: named arrays of an example besides its tokens and its text, such as conditioning latents or a camera path."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dit_video.core.errors import UserError
from dit_video.core.grid import Grid
from dit_video.tokens.patchify import patchify
from dit_video.tokens.shapes import TokenIndices

Alignment = Literal["example", "frame", "grid", "sequence", "extra"]


@dataclass(frozen=True, kw_only=True)
class Field:
    """The description of a field, whose arrays have the same shape in all examples except for the size of the clip.

    An example's array has one value per example (`example`), per latent frame (`frame`) or per token (`grid`), or a
    fixed number of tokens of its own: a `sequence` that the model attends to, or `extra` tokens, which join the clip's
    tokens but are not predicted. In packed rows the values of frames are repeated for their tokens.

    Raises:
      UserError: If the name is not an identifier, or a field with its own tokens has no length.
    """

    name: str
    alignment: Alignment
    shape: tuple[int, ...] = ()
    """Shape of one value: `()` for a number, `(width,)` for a vector."""
    dtype: Literal["float32", "int32"] = "float32"
    length: int = 0
    """Number of tokens of an example's sequence, or of its extra tokens; 0 for other alignments."""

    def __post_init__(self):
        if not self.name.isidentifier():
            raise UserError(f"name={self.name!r} of a field is invalid: it must be an identifier. Use letters and _.")
        if (self.length > 0) != (self.alignment in ("sequence", "extra")):
            rule = "a field with tokens of its own has one or more, other fields have none"
            raise UserError(f"length={self.length} of the field {self.name} ({self.alignment}) is invalid: {rule}.")

    def get_shape(self, latents: Grid) -> tuple[int, ...]:
        """Return the array's shape for a clip whose latents have this size, such as `t h w *shape` for a grid."""
        counts = {"example": (), "frame": (latents.t,), "grid": tuple(latents)}
        return (*counts.get(self.alignment, (self.length,)), *self.shape)

    def to_rows(self, patch: Grid) -> "Field":
        """Return the field as rows hold it: a field on the latents' grid is cut into patches."""
        if self.alignment != "grid":
            return self
        return dataclasses.replace(self, shape=(patch.volume * math.prod(self.shape),))

    def patchify(self, values: np.ndarray, patch: Grid) -> np.ndarray:
        """Return a clip's array as rows hold it: an array on the latents' grid is cut into patches."""
        if self.alignment != "grid":
            return values
        return np.ascontiguousarray(patchify(values.reshape(*values.shape[:3], -1), patch))

    def get_row_shape(self, *, tokens: int, segments: int) -> tuple[int, ...]:
        """Return the shape of the field in a packed row of this many tokens and segments."""
        counts = {"example": segments, "frame": tokens, "grid": tokens}
        return (counts.get(self.alignment, segments * self.length), *self.shape)

    def get_slots(self, index: int, tokens: TokenIndices) -> TokenIndices:
        """Return where the values of the row's segment `index` (from 0) lie, given that its tokens are at `tokens`."""
        if self.alignment in ("frame", "grid"):
            return tokens
        count = self.length or 1
        return slice(index * count, (index + 1) * count)

    def spread(self, values: np.ndarray | None, *, tokens: int) -> np.ndarray:
        """Return the array of an example with this many tokens as a packed row holds it.

        Raises:
          UserError: If the array is missing or has another shape.
        """
        counts: dict[str, tuple[int, ...]] = {"example": (), "grid": (tokens,)}
        if values is not None and self.alignment == "frame":
            counts["frame"] = (len(values),) if values.ndim and len(values) and tokens % len(values) == 0 else (-1,)
        if values is None or values.shape != (*counts.get(self.alignment, (self.length,)), *self.shape):
            shape = "missing" if values is None else f"of shape {list(values.shape)}"
            raise UserError(
                f"the clips of a row must have the same fields: {self.name} of a clip of {tokens} tokens is {shape}, "
                f"but must be a {self}; pack only clips that have it"
            )
        if self.alignment == "frame":
            return np.repeat(values, tokens // len(values), axis=0)
        return values[None] if self.alignment == "example" else values
