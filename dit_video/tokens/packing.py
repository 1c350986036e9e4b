"""Rows: sequences of any length packed into one fixed length (NaViT, arXiv 2307.06304).

A row holds up to `segments` clips one after the other, with their text in a row of its own. Segment ids say which token
belongs to which clip (1, 2, …; 0 is padding); attention never crosses them.
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
class RowShape:
    """What one row has room for: it fixes every array shape of a batch, so one program serves all clips."""

    tokens: int
    """video tokens (N)"""
    text: int
    """text tokens (S)"""
    segments: int
    """clips (G)"""


class Item(NamedTuple):
    """One clip to be packed."""

    tokens: Float32[np.ndarray, "n p"]
    coordinates: Float32[np.ndarray, "n 3"]
    text: Int32[np.ndarray, " s"] | Float32[np.ndarray, "s E"]
    """token ids, or embeddings of a text encoder that is not trained"""
    example: int
    """Identity of the example for randomness: its rank in the epoch's plan, or a sample's number."""
    shown: Float32[np.ndarray, "n _"] | None = None
    """patches of the same clip's latents with all that comes after the first frame grey"""
    image: Float32[np.ndarray, "i F"] | None = None
    """an image encoder's tokens of its first frame"""


class Rows(NamedTuple):
    """A batch of packed rows. `B` is absent in a single row; arrays are NumPy in the loader and JAX in the step."""

    tokens: Float[AnyArray, "*B N p"]
    segments: Int[AnyArray, "*B N"]
    coordinates: Float[AnyArray, "*B N 3"]
    text: Int[AnyArray, "*B S"] | Float[AnyArray, "*B S E"]
    """token ids, or embeddings"""
    text_segments: Int[AnyArray, "*B S"]
    examples: UInt32[AnyArray, "*B G"]
    """The example of segment g+1; meaningless where `valid` is false."""
    valid: Bool[AnyArray, "*B G"]
    """Which segments exist and count in the loss."""
    shown: Float[AnyArray, "*B N _"]
    """what `Item.shown` is of every token; of width 0 where clips have none"""
    image: Float[AnyArray, "*B I F"]
    """image tokens: as many for each segment that there is room for; none where clips have none"""
    image_segments: Int[AnyArray, "*B I"]


def pack(items: Sequence[Item], shape: RowShape, *, width: int, text_width: int = 0) -> Rows:
    """One row (no batch axis) with `items` in order.

    Args:
      items: what the row is to hold.
      shape: what it has room for.
      width: values of a video token.
      text_width: values of a text token's embedding; 0 where texts are token ids.

    Raises:
      UserError: the items do not fit the row, or one has an image that others lack, or larger ones.
    """
    used = RowShape(
        tokens=sum(len(item.tokens) for item in items),
        text=sum(len(item.text) for item in items),
        segments=len(items),
    )
    for name in ("tokens", "text", "segments"):
        if getattr(used, name) > getattr(shape, name):
            raise UserError(
                f"a row has room for {getattr(shape, name)} {name}, {getattr(used, name)} were given; "
                f"raise the row's {name} or give it fewer clips"
            )
    row = empty_row(shape, width=width, text_width=text_width, given=items[0] if items else None)
    start = text_start = 0
    for index, item in enumerate(items):
        stop, text_stop = start + len(item.tokens), text_start + len(item.text)
        row.tokens[start:stop] = item.tokens
        row.segments[start:stop] = index + 1
        row.coordinates[start:stop] = item.coordinates
        row.text[text_start:text_stop] = item.text
        row.text_segments[text_start:text_stop] = index + 1
        row.examples[index] = item.example
        row.valid[index] = True
        _put_given(row, index, item, slice(start, stop))
        start, text_start = stop, text_stop
    return row


def _put_given(row: Rows, index: int, item: Item, tokens: slice) -> None:
    """What an item is given, into its place; all items of a row are given alike."""
    shown = np.zeros((len(item.tokens), 0), np.float32) if item.shown is None else item.shown
    image = np.zeros((0, row.image.shape[1]), np.float32) if item.image is None else item.image
    each = len(row.image) // len(row.examples)
    if shown.shape[1] != row.shown.shape[1] or image.shape != (each, row.image.shape[1]):
        raise UserError(
            f"the clips of a row are given alike; one has {list(shown.shape)} shown values and {list(image.shape)} of "
            f"an image, another width {row.shown.shape[1]} and {[each, row.image.shape[1]]}"
        )
    row.shown[tokens] = shown
    row.image[index * each : (index + 1) * each] = image
    row.image_segments[index * each : (index + 1) * each] = index + 1


def empty_row(shape: RowShape, *, width: int, text_width: int = 0, given: Item | None = None) -> Rows:
    """A row of padding alone; `given` is one of the items that others like it hold, the rest is as for `pack`."""
    shown = 0 if given is None or given.shown is None else given.shown.shape[1]
    images, image_width = (0, 0) if given is None or given.image is None else given.image.shape
    return Rows(
        tokens=np.zeros((shape.tokens, width), np.float32),
        segments=np.zeros((shape.tokens,), np.int32),
        coordinates=np.zeros((shape.tokens, 3), np.float32),
        text=np.zeros((shape.text, text_width), np.float32) if text_width else np.zeros((shape.text,), np.int32),
        text_segments=np.zeros((shape.text,), np.int32),
        examples=np.zeros((shape.segments,), np.uint32),
        valid=np.zeros((shape.segments,), bool),
        shown=np.zeros((shape.tokens, shown), np.float32),
        image=np.zeros((shape.segments * images, image_width), np.float32),
        image_segments=np.zeros((shape.segments * images,), np.int32),
    )


def unpack(tokens: Float[np.ndarray, "N p"], segments: Int[np.ndarray, " N"]) -> list[Float[np.ndarray, "n p"]]:
    """The tokens of each segment of one row, in order."""
    return [tokens[segments == index] for index in range(1, int(segments.max(initial=0)) + 1)]


def to_tokens(values: Shaped[Array, "B G *rest"], segments: Int[AnyArray, "B N"]) -> Shaped[Array, "B N *rest"]:
    """Give every token its segment's value; padding gets the first segment's."""
    places = jax.numpy.maximum(segments - 1, 0)
    return _read(values, places) if jax.numpy.issubdtype(values.dtype, jax.numpy.inexact) else _gather(values, places)


_CHOSEN = 8
"""Segments of a row up to which accelerators choose among their values, in what reads them: what is gathered is written
to memory first."""


def _gather(values: Shaped[Array, "B G *rest"], places: Int[Array, "B N"]) -> Shaped[Array, "B N *rest"]:
    count, spread = values.shape[1], (*places.shape, *values.shape[2:])
    if count == 1:
        return jax.numpy.broadcast_to(values, spread)
    if count > _CHOSEN or jax.default_backend() == "cpu":
        return jax.vmap(lambda row, at: row[at])(values, places)
    places = places.reshape(*places.shape, *(1,) * (values.ndim - 2))
    found = jax.numpy.broadcast_to(values[:, :1], spread)
    for segment in range(1, count):
        found = jax.numpy.where(places == segment, values[:, segment : segment + 1], found)
    return found


_read = jax.custom_jvp(_gather)


@_read.defjvp
def _read_jvp(primals, tangents):
    """As a product with a matrix of zeros and ones, whose transpose is a product too: a gather's adds one by one."""
    values, places = primals
    member = jax.nn.one_hot(places, values.shape[1], dtype=values.dtype)
    tangent = jax.numpy.einsum("bng,bg...->bn...", member, tangents[0], precision=jax.lax.Precision.HIGHEST)
    return _read(values, places), tangent


def segment_mean(
    values: Float[Array, "B N *rest"], segments: Int[AnyArray, "B N"], *, count: int
) -> Float[Array, "B {count} *rest"]:
    """The mean over each segment's tokens; zero for a segment without any."""
    member = (segments[..., None] == jax.numpy.arange(1, count + 1)).astype(values.dtype)  # B N G
    total = jax.numpy.einsum("bn...,bng->bg...", values, member)
    number = jax.numpy.maximum(member.sum(axis=1), 1)
    return total / number.reshape(number.shape + (1,) * (values.ndim - 2))


def segment_max(
    values: Float[Array, "B N"], segments: Int[AnyArray, "B N"], *, count: int
) -> Float[Array, "B {count}"]:
    """The largest value in each segment, bit for bit; zero for a segment without tokens."""
    member = segments[..., None] == jax.numpy.arange(1, count + 1)
    largest = jax.numpy.where(member, values[..., None], -jax.numpy.inf).max(axis=1)
    return jax.numpy.where(member.any(axis=1), largest, 0.0)


def positions(segments: Int[AnyArray, "B N"]) -> Int[Array, "B N"]:
    """The index of every token within its segment (or within its run of padding)."""
    index = jax.numpy.arange(segments.shape[1])[None]
    starts = jax.numpy.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1) != segments
    return index - jax.lax.cummax(jax.numpy.where(starts, index, 0), axis=1)
