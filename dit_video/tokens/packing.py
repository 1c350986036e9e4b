"""Packing of clips of any length into rows of one fixed length (NaViT, arXiv 2307.06304).

A row holds up to `segments` clips one after the other, and their text in a second sequence. Segment ids tell which clip
a token belongs to (1, 2, …; 0 is padding); attention never crosses segments.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32, UInt32

from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray
from dit_video.tokens.fields import Field
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
    fields: Mapping[str, np.ndarray] = {}
    """Arrays of further fields, by name; see `Field`."""


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
    fields: dict[str, Any]
    """Further fields by name: per token (`*B N *shape`), per segment (`*B G *shape`), or with as many tokens for every
    segment (`*B G*length *shape`; see `PackedRows.get_sequence_segments`). Padding is zero."""

    @property
    def layout(self) -> PackedRows:
        """Return where the examples lie."""
        return PackedRows(segments=self.segments, positions=self.positions, count=self.examples.shape[-1])


def pack(
    examples: Sequence[PackedExample],
    shape: PackedShape,
    *,
    width: int,
    text_width: int = 0,
    fields: Sequence[Field] = (),
) -> PackedBatch:
    """Pack examples into one row (no batch axis), in order.

    Args:
      examples: clips to pack.
      shape: capacity of the row.
      width: number of values of a video token.
      text_width: number of values of a text token's embedding; 0 if texts are token ids.
      fields: further fields of the row, which every example must have.

    Raises:
      UserError: the examples do not fit into the row, or an example lacks a field or has one of another shape.
    """
    tokens, text = sum(len(example.tokens) for example in examples), sum(len(example.text) for example in examples)
    used = PackedShape(tokens=tokens, text=text, segments=len(examples))
    for name in ("tokens", "text", "segments"):
        room, needed = getattr(shape, name), getattr(used, name)
        if needed > room:
            raise UserError(f"a row has room for {room} {name}, the clips have {needed}; raise it or pack fewer clips")
    row = make_empty_row(shape, width=width, text_width=text_width, fields=fields)
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
        for field in fields:
            values = field.spread(example.fields.get(field.name), tokens=stop - start)
            row.fields[field.name][field.get_slots(index, slice(start, stop))] = values
        start, text_start = stop, text_stop
    return row


def make_empty_row(shape: PackedShape, *, width: int, text_width: int = 0, fields: Sequence[Field] = ()) -> PackedBatch:
    """Return a row of padding with the shapes of `pack`."""
    return PackedBatch(
        tokens=np.zeros((shape.tokens, width), np.float32),
        segments=np.zeros((shape.tokens,), np.int32),
        positions=np.zeros((shape.tokens, 3), np.float32),
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
