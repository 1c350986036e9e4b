"""Conditioning of a denoiser: all its inputs other than noisy tokens and time, one record per kind."""

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray
from dit_video.tokens import compute_segment_offsets, expand_to_tokens, segment_mean

RecordT = TypeVar("RecordT")


class TextTokens(NamedTuple):
    """Context tokens of texts, packed like the clips."""

    values: Float[Array, "B S E"]
    segments: Int[Array, "B S"]
    """Segment id of each token; 0 is padding."""

    def mean(self, count: int) -> Float[Array, "B {count} E"]:
        """Return the mean token of each text, in float32, of rows with up to `count`; zero for a clip without text."""
        return segment_mean(self.values.astype(jnp.float32), self.segments, count=count)


class ImageTokens(NamedTuple):
    """Tokens of an image encoder, packed like the clips."""

    values: Float[Array, "B I F"]
    segments: Int[Array, "B I"]
    """Segment id of each token; 0 is padding."""


class ClassIds(NamedTuple):
    """Class of each clip; the number of classes stands for no class."""

    values: Int[Array, "B G"]


class ConditioningLatents(NamedTuple):
    """Clean latents and their mask, at the tokens of the clips."""

    values: Float[Array, "B N g"]
    """Mask channels and latents, patchified like the noisy latents: see `make_cond_latents`."""


class TrainingKeys(NamedTuple):
    """Random keys of a training step, for a model whose config says `draws_in_training`.

    They are functions of the seed, the step and the clips, not of the mesh. In sampling and validation there are none.
    """

    step: Key[Array, ""]
    """Key of the step, the same for all rows."""
    rows: Key[Array, " B"]
    """Key of each row, which is that of its first clip."""


@jax.tree_util.register_pytree_node_class
class Conditioning:
    """The conditioning of a batch: a set of records, at most one of each kind. A kind is the record's class.

    Raises:
      UserError: If two records are of one kind.
    """

    def __init__(self, *records: Any):
        self._records: dict[type, Any] = {type(record): record for record in records}
        if len(self._records) < len(records):
            kinds = ", ".join(type(record).__name__ for record in records)
            raise UserError(f"conditioning has two records of one kind: {kinds}; give one of each")

    @property
    def kinds(self) -> frozenset[type]:
        """Return the kinds of its records."""
        return frozenset(self._records)

    def get(self, kind: type[RecordT]) -> RecordT | None:
        """Return the record of a kind; None if there is none."""
        return self._records.get(kind)

    def __getitem__(self, kind: type[RecordT]) -> RecordT:
        """Return the record of a kind.

        Raises:
          KeyError: If there is none.
        """
        return self._records[kind]

    def add(self, *records: Any) -> "Conditioning":
        """Return the conditioning with further records, which replace existing records of the same kinds."""
        return Conditioning(*(self._records | {type(record): record for record in records}).values())

    def check(self, required: Iterable[type]) -> None:
        """Check that there is a record of each of the required kinds, and no other but `TrainingKeys`.

        Raises:
          UserError: If a required record is missing, or there is a record of another kind.
        """
        required = frozenset(required)
        for kind in sorted(required ^ self.kinds - {TrainingKeys}, key=lambda kind: kind.__name__):
            verb = "needs" if kind in required else "does not take"
            raise UserError(f"this denoiser {verb} {kind.__name__} according to its config; give the inputs it names")

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[type, ...]]:
        """Return the records, and their kinds: the structure of this pytree."""
        kinds = tuple(sorted(self._records, key=lambda kind: (kind.__module__, kind.__qualname__)))
        return tuple(self._records[kind] for kind in kinds), kinds

    @classmethod
    def tree_unflatten(cls, kinds: tuple[type, ...], records: tuple[Any, ...]) -> "Conditioning":
        """Return the conditioning of these records, which may be placeholders of JAX."""
        conditioning = cls()
        conditioning._records = dict(zip(kinds, records, strict=True))
        return conditioning


def drop_captions(
    text: Shaped[AnyArray, "B S *E"],
    segments: Int[AnyArray, "B S"],
    drop: Bool[Array, "B G"],
    *,
    empty: Shaped[AnyArray, "s *E"],
) -> tuple[Shaped[Array, "B S *E"], Int[Array, "B S"]]:
    """Replace the captions of the dropped segments by the empty caption `empty`: tokens, or embeddings of width `E`.

    The first tokens of a dropped caption become the empty caption's, the others become padding: exactly the input of
    guidance's unconditional branch. A caption has at least as many tokens as the empty one.
    """
    is_dropped = expand_to_tokens(drop, segments) & (segments > 0)
    index = compute_segment_offsets(segments)
    is_kept = index < len(empty)
    replacement = jnp.asarray(empty, text.dtype)[jnp.minimum(index, len(empty) - 1)]
    shape = (*segments.shape, *(1,) * (text.ndim - 2))
    shortened = jnp.where(is_kept.reshape(shape), replacement, 0)
    return jnp.where(is_dropped.reshape(shape), shortened, text), jnp.where(is_dropped & ~is_kept, 0, segments)
