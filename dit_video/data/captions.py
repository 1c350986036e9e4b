"""What rows hold of the captions: token ids, or embeddings of a frozen encoder.

A plan needs the lengths of all texts, and a row the few texts that it draws: embeddings of all captions would not fit
into memory.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32

from dit_video.core.errors import UserError
from dit_video.data.latents.cache import LatentSource

Text = Int32[np.ndarray, " s"] | Float32[np.ndarray, "s E"]
"""One caption's tokens, without padding: ids, or embeddings."""
Tokenize = Callable[[str], Int32[np.ndarray, " s"]]
EmbedMany = Callable[[Sequence[str]], list[Float32[np.ndarray, "s E"]]]
_TOGETHER = 64
"""Captions that are given to an encoder at once."""


@runtime_checkable
class Texts(Protocol):
    """The captions of a data set as tokens. An example without a caption has one, the empty one."""

    @property
    def width(self) -> int:
        """of embeddings; 0 of token ids"""
        ...

    @property
    def lengths(self) -> Sequence[tuple[int, ...]]:
        """of every example, the tokens of each of its captions"""
        ...

    @property
    def empty(self) -> Text:
        """the empty caption"""
        ...

    def facts(self) -> Iterator[bytes]:
        """All that tells these texts from others, for the hash of a plan."""
        ...

    def read(self, example: int, caption: int) -> Text:
        """One caption of an example.

        Raises:
          DecodeError: its record is damaged.
        """
        ...


class TokenizedTexts:
    """Captions as token ids, which all stay in memory.

    Args:
      captions: of every example.
      tokenize: caption to token ids. It is called here, once for each caption: it need not be picklable.
    """

    width = 0

    def __init__(self, captions: Sequence[tuple[str, ...]], tokenize: Tokenize):
        different = different_captions(captions)
        tokens = {caption: np.asarray(tokenize(caption), np.int32).reshape(-1) for caption in different}
        self.empty = tokens[""]
        self._texts = [tuple(tokens[caption] for caption in of_example or ("",)) for of_example in captions]
        self.lengths = [tuple(map(len, texts)) for texts in self._texts]

    def facts(self) -> Iterator[bytes]:
        """The tokens of every example."""
        for texts in self._texts:
            yield b"".join(values.astype("<i4").tobytes() + b"|" for values in texts)

    def read(self, example: int, caption: int) -> Int32[np.ndarray, " s"]:
        """One caption of an example."""
        return self._texts[example][caption]


class CachedTexts:
    """The embeddings that lie beside cached latents.

    Raises:
      UserError: there are none.
    """

    def __init__(self, source: LatentSource):
        if source.empty_text is None:
            raise UserError(
                f"{source.folder} holds no embeddings of captions; encode the clips with a text encoder, into another "
                "folder"
            )
        self.empty, self._source = source.empty_text, source
        self.width: int = self.empty.shape[1]
        self.lengths = [of_example or (len(self.empty),) for of_example in source.text_lengths]

    def facts(self) -> Iterator[bytes]:
        """The encoder, the captions and the embeddings' lengths."""
        identity = self._source.identity
        yield repr(identity if isinstance(identity, str) else identity.get("text")).encode()
        yield repr((self._source.all_captions, self.lengths)).encode()

    def read(self, example: int, caption: int) -> Float32[np.ndarray, "s E"]:
        """One caption of an example.

        Raises:
          DecodeError: its record is damaged.
        """
        return self._source.text(example, caption) if self._source.text_lengths[example] else self.empty


class EmbeddedTexts:
    """Captions that are embedded when they are read, of clips without cached latents.

    All are embedded here once, for their lengths, so `embed` had better remember them on disk. They are read in the
    process that made them: in others, which `embed` need not be fit for, only the lengths are known.

    Args:
      captions: of every example.
      embed: captions to embeddings.
      identity: of the encoder.
      progress: called with how many different captions are done.
    """

    def __init__(
        self,
        captions: Sequence[tuple[str, ...]],
        embed: EmbedMany,
        *,
        identity: str,
        progress: Callable[[int], None] | None = None,
    ):
        self._captions, self._embed, self._identity = captions, embed, identity
        (self.empty,) = embed([""])
        self.width: int = self.empty.shape[1]
        different, lengths = different_captions(captions), dict[str, int]()
        for first in range(0, len(different), _TOGETHER):
            together = different[first : first + _TOGETHER]
            lengths |= zip(together, map(len, embed(together)), strict=True)
            if progress is not None:
                progress(len(lengths))
        self.lengths = [tuple(lengths[caption] for caption in of_example or ("",)) for of_example in captions]

    def facts(self) -> Iterator[bytes]:
        """The encoder, the captions and the embeddings' lengths."""
        yield repr((self._identity, self._captions, self.lengths)).encode()

    def read(self, example: int, caption: int) -> Float32[np.ndarray, "s E"]:
        """One caption of an example."""
        of_example = self._captions[example]
        return self._embed([of_example[caption]])[0] if of_example else self.empty

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_embed": None}


def different_captions(captions: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The empty caption, and each other one once."""
    return tuple(dict.fromkeys(("", *(caption for of_example in captions for caption in of_example))))
