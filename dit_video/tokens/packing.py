"""Packing of clips of any length into rows of one fixed length (NaViT, arXiv 2307.06304).

A row holds up to `segments` clips one after the other, and their text in a second sequence. Segment ids tell which clip
a token belongs to (1, 2, …; 0 is padding); attention never crosses segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32, UInt32

from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray
from dit_video.tokens.layouts import PackedRows


@dataclass(frozen=True, kw_only=True)
class PackedShape:
    """Capacity of one row: it fixes every array shape of a batch, so one compiled program serves all clips."""

    tokens: int
    """Maximum number of video tokens (N)."""
    text: int
    """Maximum number of text tokens (S)."""
    segments: int
    """Maximum number of clips (G)."""


class PackedExample(NamedTuple):
    """One clip, ready to be packed."""

    tokens: Float32[np.ndarray, "n p"]
    positions: Float32[np.ndarray, "n 3"]
    text: Int32[np.ndarray, " s"] | Float32[np.ndarray, "s E"]
    """Token ids, or embeddings of a frozen text encoder."""
    example: int
    """Identity of the example for random numbers: its rank in the epoch's plan, or a sample's number."""
    shown: Float32[np.ndarray, "n _"] | None = None
    """Patches of the clip's latents, encoded with all frames after the first one grey."""
    image: Float32[np.ndarray, "i F"] | None = None
    """Image encoder's tokens of the clip's first frame."""


class PackedBatch(NamedTuple):
    """A batch of packed rows; `B` is absent in a single row. Arrays are NumPy in the loader and JAX in the step."""

    tokens: Float[AnyArray, "*B N p"]
    segments: Int[AnyArray, "*B N"]
    positions: Float[AnyArray, "*B N 3"]
    text: Int[AnyArray, "*B S"] | Float[AnyArray, "*B S E"]
    """Token ids, or embeddings."""
    text_segments: Int[AnyArray, "*B S"]
    examples: UInt32[AnyArray, "*B G"]
    """Identity of the example in segment g+1; undefined if `valid` is false."""
    valid: Bool[AnyArray, "*B G"]
    """True for segments that exist and count in the loss."""
    shown: Float[AnyArray, "*B N _"]
    """Values of `PackedExample.shown` for every token; of width 0 if the clips have none."""
    image: Float[AnyArray, "*B I F"]
    """Image tokens, the same number reserved for every segment; I is 0 if the clips have none."""
    image_segments: Int[AnyArray, "*B I"]

    @property
    def layout(self) -> PackedRows:
        """Return where the examples lie."""
        return PackedRows(segments=self.segments, positions=self.positions, count=self.examples.shape[-1])


def pack(examples: Sequence[PackedExample], shape: PackedShape, *, width: int, text_width: int = 0) -> PackedBatch:
    """Pack examples into one row (no batch axis), in order.

    Args:
      examples: clips to pack.
      shape: capacity of the row.
      width: number of values of a video token.
      text_width: number of values of a text token's embedding; 0 if texts are token ids.

    Raises:
      UserError: the examples do not fit into the row, or their conditioning differs in presence or size.
    """
    tokens, text = sum(len(example.tokens) for example in examples), sum(len(example.text) for example in examples)
    used = PackedShape(tokens=tokens, text=text, segments=len(examples))
    for name in ("tokens", "text", "segments"):
        room, needed = getattr(shape, name), getattr(used, name)
        if needed > room:
            raise UserError(f"a row has room for {room} {name}, the clips have {needed}; raise it or pack fewer clips")
    row = make_empty_row(shape, width=width, text_width=text_width, given=examples[0] if examples else None)
    start = text_start = 0
    for index, example in enumerate(examples):
        stop, text_stop = start + len(example.tokens), text_start + len(example.text)
        row.tokens[start:stop] = example.tokens
        row.segments[start:stop] = index + 1
        row.positions[start:stop] = example.positions
        row.text[text_start:text_stop] = example.text
        row.text_segments[text_start:text_stop] = index + 1
        row.examples[index] = example.example
        row.valid[index] = True
        _write_conditioning(row, index, example, slice(start, stop))
        start, text_start = stop, text_stop
    return row


def _write_conditioning(row: PackedBatch, index: int, example: PackedExample, tokens: slice) -> None:
    """Write an example's conditioning into the row, whose examples must all have the same kind."""
    shown = np.zeros((len(example.tokens), 0), np.float32) if example.shown is None else example.shown
    image = np.zeros((0, row.image.shape[1]), np.float32) if example.image is None else example.image
    count = len(row.image) // len(row.examples)
    if shown.shape[1] != row.shown.shape[1] or image.shape != (count, row.image.shape[1]):
        raise UserError(
            f"the clips of a row must have the same conditioning: one has shown frames {list(shown.shape)} and image "
            f"tokens {list(image.shape)}, another shown frames of width {row.shown.shape[1]} and image tokens "
            f"{[count, row.image.shape[1]]}; pack them into different rows"
        )
    row.shown[tokens] = shown
    row.image[index * count : (index + 1) * count] = image
    row.image_segments[index * count : (index + 1) * count] = index + 1


def make_empty_row(
    shape: PackedShape, *, width: int, text_width: int = 0, given: PackedExample | None = None
) -> PackedBatch:
    """Return a row of padding with the shapes of `pack`; `given` is an example with the conditioning of other rows."""
    shown = 0 if given is None or given.shown is None else given.shown.shape[1]
    images, image_width = (0, 0) if given is None or given.image is None else given.image.shape
    return PackedBatch(
        tokens=np.zeros((shape.tokens, width), np.float32),
        segments=np.zeros((shape.tokens,), np.int32),
        positions=np.zeros((shape.tokens, 3), np.float32),
        text=np.zeros((shape.text, text_width), np.float32) if text_width else np.zeros((shape.text,), np.int32),
        text_segments=np.zeros((shape.text,), np.int32),
        examples=np.zeros((shape.segments,), np.uint32),
        valid=np.zeros((shape.segments,), bool),
        shown=np.zeros((shape.tokens, shown), np.float32),
        image=np.zeros((shape.segments * images, image_width), np.float32),
        image_segments=np.zeros((shape.segments * images,), np.int32),
    )


def unpack(tokens: Float[np.ndarray, "N p"], segments: Int[np.ndarray, " N"]) -> list[Float[np.ndarray, "n p"]]:
    """Return the tokens of each segment of one row, in order."""
    return [tokens[segments == index] for index in range(1, int(segments.max(initial=0)) + 1)]
