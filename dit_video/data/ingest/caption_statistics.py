"""Statistics of the captions of a data set."""

import collections
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MAX_LISTED = 20
"""Number of the most frequent words and captions that are listed."""
MAX_SHOWN_CHARACTERS = 200
"""Number of characters of a repeated caption that are listed; the rest is replaced by an ellipsis."""
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """Quantiles of integers; each is the smallest value that is not exceeded by this share of the values."""

    least: int
    q10: int
    median: int
    q90: int
    most: int
    mean: float


@dataclass(frozen=True, kw_only=True)
class CaptionStatistics:
    """Counts of captions, converted to JSON by `dataclasses.asdict`; lists are sorted by count, then alphabetically."""

    clips: int
    captions: int
    uncaptioned: int
    """Number of clips without a caption that is not blank."""
    per_clip: tuple[tuple[int, int], ...]
    """Pairs of (number of captions, number of clips with that many)."""
    words: Quantiles | None
    """Words per caption: runs of letters and digits, with apostrophes and hyphens inside; None without captions."""
    characters: Quantiles | None
    """Characters per caption; None without captions."""
    vocabulary: int
    """Number of distinct words, ignoring case."""
    frequent_words: tuple[tuple[str, int], ...]
    """The twenty most frequent words, case-folded, with their counts."""
    distinct: int
    """Number of distinct captions."""
    repeated: tuple[tuple[str, int], ...]
    """The twenty most frequent captions that occur more than once, cut to 200 characters, with their counts."""


def compute_caption_statistics(captions: Sequence[tuple[str, ...]]) -> CaptionStatistics:
    """Return statistics of the captions of all clips; blank captions do not count.

    Args:
      captions: captions of every clip, any number.
    """
    non_blank = [tuple(text for text in texts if text.strip()) for texts in captions]
    texts = [text for clip in non_blank for text in clip]
    words = [_WORD.findall(text.casefold()) for text in texts]
    vocabulary = collections.Counter(word for caption_words in words for word in caption_words)
    repeats = collections.Counter(texts)
    return CaptionStatistics(
        clips=len(captions),
        captions=len(texts),
        uncaptioned=sum(not clip for clip in non_blank),
        per_clip=tuple(sorted(collections.Counter(len(clip) for clip in non_blank).items())),
        words=_compute_quantiles([len(caption_words) for caption_words in words]),
        characters=_compute_quantiles([len(text) for text in texts]),
        vocabulary=len(vocabulary),
        frequent_words=tuple(_get_most_frequent(vocabulary.items())),
        distinct=len(repeats),
        repeated=tuple(
            (text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "…", count)
            for text, count in _get_most_frequent((text, count) for text, count in repeats.items() if count > 1)
        ),
    )


def _get_most_frequent(counts: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    return sorted(counts, key=lambda entry: (-entry[1], entry[0]))[:MAX_LISTED]


def _compute_quantiles(values: list[int]) -> Quantiles | None:
    if not values:
        return None
    smallest, q10, median, q90, largest = np.quantile(values, [0, 0.1, 0.5, 0.9, 1], method="inverted_cdf").tolist()
    return Quantiles(least=smallest, q10=q10, median=median, q90=q90, most=largest, mean=sum(values) / len(values))
