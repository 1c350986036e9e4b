"""Sources of the captions that rows hold: as token ids, or as embeddings of a frozen encoder.

A plan needs the lengths of all captions, but a row only reads the few captions that it draws: the embeddings of all
captions would not fit into memory.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32

from dit_video.core.errors import UserError
from dit_video.data.latents.cache import LatentSource
from dit_video.text import CaptionTokens

Tokenize = Callable[[str], Int32[np.ndarray, " s"]]
EmbedMany = Callable[[Sequence[str]], list[Float32[np.ndarray, "s E"]]]
_EMBED_BATCH = 64
"""Number of captions that are embedded per call of the encoder."""


@runtime_checkable
class CaptionSource(Protocol):
    """Captions of a data set as tokens. An example without captions has one, the empty caption."""

    @property
    def width(self) -> int:
        """Return the width of embeddings; 0 for token ids."""

    @property
    def lengths(self) -> Sequence[tuple[int, ...]]:
        """Return the number of tokens of every caption of every example."""

    @property
    def empty(self) -> CaptionTokens:
        """Return the empty caption."""

    def iter_hash_bytes(self) -> Iterator[bytes]:
        """Yield the bytes that identify these captions in the hash of a plan."""

    def read(self, example: int, caption: int) -> CaptionTokens:
        """Return one caption of an example.

        Raises:
          DecodeError: its record is damaged.
        """


class TokenizedCaptions:
    """Captions as token ids, all of which are kept in memory.

    Args:
      captions: captions of every example.
      tokenize: function from a caption to its token ids. The constructor calls it once per caption, so it need not be
        picklable.
    """

    width = 0

    def __init__(self, captions: Sequence[tuple[str, ...]], tokenize: Tokenize):
        distinct = get_distinct_captions(captions)
        tokens = {caption: np.asarray(tokenize(caption), np.int32).reshape(-1) for caption in distinct}
        self.empty = tokens[""]
        self._tokens = [tuple(tokens[caption] for caption in group or ("",)) for group in captions]
        self.lengths = [tuple(map(len, texts)) for texts in self._tokens]

    def iter_hash_bytes(self) -> Iterator[bytes]:
        """Yield the tokens of every example."""
        for texts in self._tokens:
            yield b"".join(values.astype("<i4").tobytes() + b"|" for values in texts)

    def read(self, example: int, caption: int) -> Int32[np.ndarray, " s"]:
        """Return one caption of an example."""
        return self._tokens[example][caption]


class CachedCaptions:
    """Captions as embeddings that are cached with latents.

    Raises:
      UserError: the data set has no embeddings.
    """

    def __init__(self, source: LatentSource):
        if source.empty_text is None:
            fix = "encode the clips with a text encoder, into another folder"
            raise UserError(f"{source.folder} holds no embeddings of captions; {fix}")
        self.empty, self._source = source.empty_text, source
        self.width: int = self.empty.shape[1]
        self.lengths = [lengths or (len(self.empty),) for lengths in source.text_lengths]

    def iter_hash_bytes(self) -> Iterator[bytes]:
        """Yield the encoder, the captions and the lengths of the embeddings."""
        identity = self._source.identity
        yield repr(identity if isinstance(identity, str) else identity.get("text")).encode()
        yield repr((self._source.all_captions, self.lengths)).encode()

    def read(self, example: int, caption: int) -> Float32[np.ndarray, "s E"]:
        """Return one caption of an example.

        Raises:
          DecodeError: its record is damaged.
        """
        return self._source.read_text(example, caption) if self._source.text_lengths[example] else self.empty


class EmbeddedCaptions:
    """Captions that are embedded when they are read, for clips without cached latents.

    The constructor embeds all captions once, for their lengths, so `embed` should cache its results on disk. Captions
    are only read in the process that created the object: in others only the lengths are known, as `embed` need not be
    picklable.

    Args:
      captions: captions of every example.
      embed: function from captions to their embeddings.
      identity: identity of the encoder.
      progress: called with the number of distinct captions that are embedded.
    """

    def __init__(
        self,
        captions: Sequence[tuple[str, ...]],
        embed: EmbedMany,
        *,
        identity: str,
        progress: Callable[[int], None] = lambda count: None,
    ):
        self._captions, self._embed, self._identity = captions, embed, identity
        (self.empty,) = embed([""])
        self.width: int = self.empty.shape[1]
        distinct, lengths = get_distinct_captions(captions), dict[str, int]()
        for first in range(0, len(distinct), _EMBED_BATCH):
            batch = distinct[first : first + _EMBED_BATCH]
            lengths |= zip(batch, map(len, embed(batch)), strict=True)
            progress(len(lengths))
        self.lengths = [tuple(lengths[caption] for caption in group or ("",)) for group in captions]

    def iter_hash_bytes(self) -> Iterator[bytes]:
        """Yield the encoder, the captions and the lengths of the embeddings."""
        yield repr((self._identity, self._captions, self.lengths)).encode()

    def read(self, example: int, caption: int) -> Float32[np.ndarray, "s E"]:
        """Return one caption of an example."""
        group = self._captions[example]
        return self._embed([group[caption]])[0] if group else self.empty

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_embed": None}


def get_distinct_captions(captions: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the empty caption, and each other caption once."""
    return tuple(dict.fromkeys(("", *(caption for group in captions for caption in group))))
