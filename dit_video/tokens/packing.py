"""Packing of clips into arrays of one fixed shape: rows (NaViT, arXiv 2307.06304), canvases, or dense arrays.

A row holds up to `segments` clips one after the other, and their text in a second sequence. Segment ids tell which clip
a token belongs to (1, 2, …; 0 is padding); attention never crosses segments. A canvas holds clips side by side in a
dense array, whose positions are its tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32, UInt32

from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray
from dit_video.tokens.fields import Field
from dit_video.tokens.layouts import PackedRows
from dit_video.tokens.shapes import LayoutShape


class PackedExample(NamedTuple):
    """One clip, ready to be packed."""

    tokens: Float32[np.ndarray, "n p"]
    positions: Float32[np.ndarray, "n 3"]
    text: Int32[np.ndarray, " s"] | Float32[np.ndarray, "s E"]
    """Token ids, or embeddings of a frozen text encoder."""
    example: int
    """Identity of the example for random numbers: its rank in the epoch's plan, or a sample's number."""
    fields: Mapping[str, np.ndarray] = {}
    """Arrays of further fields, by name; see `Field`."""
    valid: bool = True
    """Whether it counts in the loss; False for one that could not be read."""


class PackedBatch(NamedTuple):
    """A batch of rows, canvases or dense arrays; `B` is absent in a single one.

    Arrays are NumPy in the loader and JAX in the step.
    """

    tokens: Float[AnyArray, "*B N p"]
    layout: PackedRows
    """Layout of the examples."""
    text: Int[AnyArray, "*B S"] | Float[AnyArray, "*B S E"]
    """Token ids, or embeddings."""
    text_segments: Int[AnyArray, "*B S"]
    examples: UInt32[AnyArray, "*B G"]
    """Identity of the example in segment g+1; undefined if `valid` is false."""
    valid: Bool[AnyArray, "*B G"]
    """True for segments that exist and count in the loss."""
    fields: dict[str, Any]
    """Further fields by name: per token (`*B N *shape`), per segment (`*B G *shape`), or with the same number of tokens
    for every segment (`*B G*length *shape`; see `PackedRows.get_sequence_segments`). Padding is zero."""

    @property
    def segments(self) -> Int[AnyArray, "*B N"]:
        """Return the segment id of each token; 0 is padding."""
        return self.layout.segments

    @property
    def positions(self) -> Float[AnyArray, "*B N 3"]:
        """Return the positions (t, h, w) of each token."""
        return self.layout.positions


def pack(
    examples: Sequence[PackedExample],
    shape: LayoutShape,
    *,
    width: int,
    text_width: int = 0,
    fields: Sequence[Field] = (),
) -> PackedBatch:
    """Pack examples into one row or canvas (no batch axis), in order.

    Args:
      examples: Clips to pack.
      shape: Capacity of the row or canvas.
      width: Number of values of a video token.
      text_width: Number of values of a text token's embedding; 0 if texts are token ids.
      fields: Further fields of the row, which every example must have.

    Raises:
      UserError: If the examples do not fit into the row, or an example lacks a field or has one of another shape.
    """
    needed = {
        "tokens": sum(len(example.tokens) for example in examples),
        "text": sum(len(example.text) for example in examples),
        "segments": len(examples),
    }
    for name, count in needed.items():
        if count > (room := getattr(shape, name)):
            raise UserError(f"a row has room for {room} {name}, the clips have {count}; raise it or pack fewer clips")
    row = make_empty_row(shape, width=width, text_width=text_width, fields=fields)
    text_start = 0
    for index, (example, places) in enumerate(
        zip(examples, shape.place([each.positions for each in examples]), strict=True)
    ):
        text_stop = text_start + len(example.text)
        row.tokens[places] = example.tokens
        row.segments[places] = index + 1
        row.positions[places] = example.positions
        row.text[text_start:text_stop] = example.text
        row.text_segments[text_start:text_stop] = index + 1
        row.examples[index] = example.example
        row.valid[index] = example.valid
        for field in fields:
            values = field.spread(example.fields.get(field.name), tokens=len(example.tokens))
            row.fields[field.name][field.get_slots(index, places)] = values
        text_start = text_stop
    return row


def make_empty_row(shape: LayoutShape, *, width: int, text_width: int = 0, fields: Sequence[Field] = ()) -> PackedBatch:
    """Return a row of padding with the shapes of `pack`."""
    return PackedBatch(
        tokens=np.zeros((shape.tokens, width), np.float32),
        layout=shape.make_layout(np.zeros((shape.tokens,), np.int32), np.zeros((shape.tokens, 3), np.float32)),
        text=np.zeros((shape.text, text_width), np.float32) if text_width else np.zeros((shape.text,), np.int32),
        text_segments=np.zeros((shape.text,), np.int32),
        examples=np.zeros((shape.segments,), np.uint32),
        valid=np.zeros((shape.segments,), bool),
        fields={
            field.name: np.zeros(field.get_row_shape(tokens=shape.tokens, segments=shape.segments), field.dtype)
            for field in fields
        },
    )


def stack_rows(rows: Iterable[PackedBatch]) -> PackedBatch:
    """Return a batch of rows with the same shapes."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def unpack(tokens: Float[np.ndarray, "N p"], segments: Int[np.ndarray, " N"]) -> list[Float[np.ndarray, "n p"]]:
    """Return the tokens of each segment of one row, in order."""
    return [tokens[segments == index] for index in range(1, int(segments.max(initial=0)) + 1)]
