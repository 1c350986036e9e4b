"""Sources of the captions that rows hold: as token ids, or as embeddings of a frozen encoder.

A plan needs the lengths of all captions, but a row only reads the few captions that it draws: the embeddings of all
captions would not fit into memory.
"""

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int, Int32

from dit_video.core.shared_array import SharesArrays
from dit_video.models.encoders import CaptionTokens

Tokenize = Callable[[str], Int32[np.ndarray, " s"]]
EmbedMany = Callable[[Sequence[str]], list[Float32[np.ndarray, "s E"]]]
_EMBED_BATCH = 64
"""Number of captions that are embedded per call of the encoder."""


class CaptionLengths(SharesArrays):
    """The number of tokens of every caption of every example: `lengths[example][caption]`.

    Args:
      values: Number of tokens of every caption, example after example.
      counts: Number of captions of every example, at least one.
      shares: Probability of every caption among those of its example; None for equal ones.
    """

    def __init__(
        self,
        values: Int[np.ndarray, " c"],
        counts: Int[np.ndarray, " n"],
        shares: Float[np.ndarray, " c"] | None = None,
    ):
        self.values, self.counts, self.shares = values.astype(np.int32), counts.astype(np.int32), shares
        self.starts: Int[np.ndarray, " n"] = np.cumsum(counts) - counts
        """Number of the first caption of every example, among those of all examples."""

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, example: int) -> Int32[np.ndarray, " k"]:
        return self.values[self.starts[example] :][: self.counts[example]]

    @property
    def longest(self) -> Int32[np.ndarray, " n"]:
        """Return the number of tokens of the longest caption of every example."""
        return np.maximum.reduceat(self.values, self.starts) if len(self) else self.values

    @property
    def hash_bytes(self) -> bytes:
        """Return the bytes that identify these lengths."""
        shares = b"" if self.shares is None else self.shares.astype("<f8").tobytes()
        return self.values.astype("<i4").tobytes() + self.counts.astype("<i4").tobytes() + shares

    def draw(self, example: int, make_generator: Callable[[], np.random.Generator]) -> int:
        """Return the number of a random caption of an example."""
        count, start = int(self.counts[example]), int(self.starts[example])
        if count == 1:
            return 0
        if self.shares is None:
            return int(make_generator().integers(count))
        return int(make_generator().choice(count, p=self.shares[start : start + count]))


@runtime_checkable
class CaptionSource(Protocol):
    """Captions of a data set as tokens. An example without captions has one, the empty caption."""

    @property
    def width(self) -> int:
        """Return the width of embeddings; 0 for token ids."""

    @property
    def lengths(self) -> CaptionLengths:
        """Return the number of tokens of every caption of every example."""

    @property
    def empty(self) -> CaptionTokens:
        """Return the empty caption."""

    def iter_hash_bytes(self) -> Iterator[bytes]:
        """Yield the bytes that identify these captions in the hash of a plan."""

    def read(self, example: int, caption: int) -> CaptionTokens:
        """Return one caption of an example.

        Raises:
          DecodeError: If its record is damaged.
        """


class TokenizedCaptions(SharesArrays):
    """Captions as token ids, all kept in memory, in one array.

    Args:
      captions: Captions of every example.
      tokenize: Function from a caption to its token ids. The constructor calls it once per caption, so it need not be
        picklable.
      shares: See `CaptionLengths`.
    """

    width = 0

    def __init__(
        self, captions: Sequence[tuple[str, ...]], tokenize: Tokenize, *, shares: Float[np.ndarray, " c"] | None = None
    ):
        distinct, self._numbers, counts = number_captions(captions)
        tokens = [np.asarray(tokenize(caption), np.int32).reshape(-1) for caption in distinct]
        lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
        self._tokens, self._ends = np.concatenate(tokens), np.cumsum(lengths)
        self.empty = tokens[0]
        self.lengths = CaptionLengths(lengths[self._numbers], counts, shares)

    def iter_hash_bytes(self) -> Iterator[bytes]:
        """Yield the tokens of every different caption, and the captions of every example."""
        yield self._tokens.astype("<i4").tobytes()
        yield self._numbers.astype("<i4").tobytes()
        yield self.lengths.hash_bytes

    def read(self, example: int, caption: int) -> Int32[np.ndarray, " s"]:
        """Return one caption of an example."""
        end = self._ends[self._numbers[self.lengths.starts[example] + caption]]
        return self._tokens[end - self.lengths[example][caption] : end]


class EmbeddedCaptions:
    """Captions that are embedded when they are read, for clips without cached latents.

    The lengths of all captions are known from the tokenizer. Captions are only read in the process that created the
    object: in others only the lengths are known, as `embed` need not be picklable.

    Args:
      captions: Captions of every example.
      embed: Function from captions to their embeddings.
      identity: Identity of the encoder.
      count_tokens: Function from a caption to the length of its embedding; None embeds each caption for its length, so
        that `embed` should cache its results on disk.
      shares: See `CaptionLengths`.
      progress: Called with the number of distinct captions whose lengths are known.
    """

    def __init__(
        self,
        captions: Sequence[tuple[str, ...]],
        embed: EmbedMany,
        *,
        identity: str,
        count_tokens: Callable[[str], int] | None = None,
        shares: Float[np.ndarray, " c"] | None = None,
        progress: Callable[[int], None] = lambda count: None,
    ):
        self._captions, self._embed, self._identity = captions, embed, identity
        (self.empty,) = embed([""])
        self.width: int = self.empty.shape[1]
        distinct, numbers, counts = number_captions(captions)
        lengths = list[int]()
        for first in range(0, len(distinct), _EMBED_BATCH):
            batch = distinct[first : first + _EMBED_BATCH]
            lengths += map(len, embed(batch)) if count_tokens is None else map(count_tokens, batch)
            progress(len(lengths))
        self.lengths = CaptionLengths(np.asarray(lengths)[numbers], counts, shares)

    def iter_hash_bytes(self) -> Iterator[bytes]:
        """Yield the encoder, the captions and the lengths of the embeddings."""
        yield self._identity.encode()
        yield from _iter_caption_bytes(self._captions)
        yield self.lengths.hash_bytes

    def read(self, example: int, caption: int) -> Float32[np.ndarray, "s E"]:
        """Return one caption of an example."""
        group = self._captions[example]
        return self._embed([group[caption]])[0] if group else self.empty

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_embed": None, "_captions": ()}


def get_distinct_captions(captions: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the empty caption, and each other caption once."""
    return tuple(dict.fromkeys(("", *itertools.chain.from_iterable(captions))))


def number_captions(
    captions: Iterable[Sequence[str]],
) -> tuple[tuple[str, ...], Int32[np.ndarray, " c"], Int32[np.ndarray, " n"]]:
    """Return the different captions, the number of every caption among them, and the number of captions of an example.

    An example without captions has one, the empty caption, whose number is 0.
    """
    numbers, values, counts = {"": 0}, array("i"), array("i")
    for group in captions:
        values.extend(numbers.setdefault(caption, len(numbers)) for caption in group or ("",))
        counts.append(len(group) or 1)
    return tuple(numbers), np.asarray(values, np.int32), np.asarray(counts, np.int32)


def _iter_caption_bytes(captions: Sequence[tuple[str, ...]]) -> Iterator[bytes]:
    distinct, numbers, _ = number_captions(captions)
    yield "\0".join(distinct).encode("utf-8", "surrogatepass")
    yield numbers.astype("<i4").tobytes()
