"""What the captions of a data set are like."""

import collections
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MOST = 20
"""How many of the most frequent words and captions are listed."""
SHOWN = 200
"""Characters of a repeated caption that are listed; the rest is cut, and an ellipsis says so."""
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """Of whole numbers, each one of them: the least that this share of them doesn't exceed."""

    least: int
    q10: int
    median: int
    q90: int
    most: int
    mean: float


@dataclass(frozen=True, kw_only=True)
class CaptionStatistics:
    """Captions counted; `dataclasses.asdict` makes JSON of it. Listings are by count, then by the alphabet."""

    clips: int
    captions: int
    uncaptioned: int
    """Clips without a caption that says something."""
    per_clip: tuple[tuple[int, int], ...]
    """(number of captions, clips with that many)"""
    words: Quantiles | None
    """in a caption: runs of letters and digits, with apostrophes and hyphens inside of them; None without captions"""
    characters: Quantiles | None
    """in a caption; None without captions"""
    vocabulary: int
    """How many words there are, without regard to case."""
    frequent_words: tuple[tuple[str, int], ...]
    """The twenty most frequent, case-folded, with their counts."""
    distinct: int
    """How many captions there are, each counted once."""
    repeated: tuple[tuple[str, int], ...]
    """The twenty most frequent of the captions that occur more than once, with their counts; cut to 200 characters."""


def caption_statistics(captions: Sequence[tuple[str, ...]]) -> CaptionStatistics:
    """Count the captions of every clip. Captions of white space alone count as none.

    Args:
      captions: of every clip, any number.
    """
    said = [tuple(text for text in texts if text.strip()) for texts in captions]
    texts = [text for clip in said for text in clip]
    words = [_WORD.findall(text.casefold()) for text in texts]
    vocabulary = collections.Counter(word for found in words for word in found)
    repeats = collections.Counter(texts)
    return CaptionStatistics(
        clips=len(captions),
        captions=len(texts),
        uncaptioned=sum(not clip for clip in said),
        per_clip=tuple(sorted(collections.Counter(len(clip) for clip in said).items())),
        words=_quantiles([len(found) for found in words]),
        characters=_quantiles([len(text) for text in texts]),
        vocabulary=len(vocabulary),
        frequent_words=tuple(_most(vocabulary.items())),
        distinct=len(repeats),
        repeated=tuple(
            (text if len(text) <= SHOWN else text[:SHOWN] + "…", count)
            for text, count in _most((text, count) for text, count in repeats.items() if count > 1)
        ),
    )


def _most(counts: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    return sorted(counts, key=lambda entry: (-entry[1], entry[0]))[:MOST]


def _quantiles(values: list[int]) -> Quantiles | None:
    if not values:
        return None
    least, q10, median, q90, most = np.quantile(values, [0, 0.1, 0.5, 0.9, 1], method="inverted_cdf").tolist()
    return Quantiles(least=least, q10=q10, median=median, q90=q90, most=most, mean=sum(values) / len(values))
