"""Packing of clips of any length into rows of one fixed length (NaViT, arXiv 2307.06304).

A row holds up to `segments` clips one after the other, and their text in a second sequence. Segment ids tell which clip
a token belongs to (1, 2, …; 0 is padding); attention never crosses segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Shaped, UInt32

from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray


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


def expand_to_tokens(values: Shaped[Array, "B G *rest"], segments: Int[AnyArray, "B N"]) -> Shaped[Array, "B N *rest"]:
    """Return every token's value from one value per segment; padding gets the first segment's."""
    indices = jax.numpy.maximum(segments - 1, 0)
    is_differentiable = jax.numpy.issubdtype(values.dtype, jax.numpy.inexact)
    return (_gather_differentiable if is_differentiable else _gather)(values, indices)


_MAX_SELECTED_SEGMENTS = 8
"""Segments per row up to which accelerators select among the values instead of gathering them. Selection is fused into
the operation that reads the values, whereas the result of a gather is written to memory first."""


def _gather(values: Shaped[Array, "B G *rest"], indices: Int[Array, "B N"]) -> Shaped[Array, "B N *rest"]:
    count, shape = values.shape[1], (*indices.shape, *values.shape[2:])
    if count == 1:
        return jax.numpy.broadcast_to(values, shape)
    if count > _MAX_SELECTED_SEGMENTS or jax.default_backend() == "cpu":
        return jax.vmap(lambda row, index: row[index])(values, indices)
    indices = indices.reshape(*indices.shape, *(1,) * (values.ndim - 2))
    gathered = jax.numpy.broadcast_to(values[:, :1], shape)
    for segment in range(1, count):
        gathered = jax.numpy.where(indices == segment, values[:, segment : segment + 1], gathered)
    return gathered


_gather_differentiable = jax.custom_jvp(_gather)


@_gather_differentiable.defjvp
def _gather_jvp(primals, tangents):
    # A product with a one-hot matrix, whose transpose is a product too: that of a gather is a scatter, which adds the
    # tokens' gradients one by one.
    values, indices = primals
    one_hot = jax.nn.one_hot(indices, values.shape[1], dtype=values.dtype)
    tangent = jax.numpy.einsum("bng,bg...->bn...", one_hot, tangents[0], precision=jax.lax.Precision.HIGHEST)
    return _gather_differentiable(values, indices), tangent


def segment_mean(
    values: Float[Array, "B N *rest"], segments: Int[AnyArray, "B N"], *, count: int
) -> Float[Array, "B {count} *rest"]:
    """Return the mean over each segment's tokens; zero for a segment without any."""
    member = (segments[..., None] == jax.numpy.arange(1, count + 1)).astype(values.dtype)  # B N G
    total = jax.numpy.einsum("bn...,bng->bg...", values, member)
    number = jax.numpy.maximum(member.sum(axis=1), 1)
    return total / number.reshape(number.shape + (1,) * (values.ndim - 2))


def segment_max(
    values: Float[Array, "B N"], segments: Int[AnyArray, "B N"], *, count: int
) -> Float[Array, "B {count}"]:
    """Return the largest value in each segment, without rounding; zero for a segment without tokens."""
    member = segments[..., None] == jax.numpy.arange(1, count + 1)
    largest = jax.numpy.where(member, values[..., None], -jax.numpy.inf).max(axis=1)
    return jax.numpy.where(member.any(axis=1), largest, 0.0)


def compute_segment_offsets(segments: Int[AnyArray, "B N"]) -> Int[Array, "B N"]:
    """Return the index of every token within its segment, or within its run of padding."""
    index = jax.numpy.arange(segments.shape[1])[None]
    starts = jax.numpy.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1) != segments
    return index - jax.lax.cummax(jax.numpy.where(starts, index, 0), axis=1)
