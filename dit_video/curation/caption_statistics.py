"""Statistics of the captions of a data set."""

import collections
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

MAX_LISTED = 20
"""Number of the most frequent words and captions that are listed."""
MAX_SHOWN_CHARACTERS = 200
"""Number of characters of a repeated caption that are listed; the rest is replaced by an ellipsis."""
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def compute_caption_statistics(captions: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """Return statistics of the captions of all clips, for JSON; blank captions do not count.

    Lists are sorted by count, then alphabetically. Quantiles are the smallest values that are not exceeded by a share
    of the values, and None without captions.

    - `uncaptioned`: number of clips without a caption that is not blank.
    - `per_clip`: pairs of (number of captions, number of clips with that many).
    - `words`: words per caption: runs of letters and digits, with apostrophes and hyphens inside.
    - `characters`: characters per caption.
    - `vocabulary`: number of distinct words, ignoring case.
    - `frequent_words`: the twenty most frequent words, case-folded, with their counts.
    - `distinct`: number of distinct captions.
    - `repeated`: the twenty most frequent captions that occur more than once, cut to 200 characters, with their counts.

    Args:
      captions: captions of every clip, any number.
    """
    non_blank = [tuple(text for text in texts if text.strip()) for texts in captions]
    texts = [text for clip in non_blank for text in clip]
    words = [_WORD.findall(text.casefold()) for text in texts]
    vocabulary = collections.Counter(word for caption_words in words for word in caption_words)
    repeats = collections.Counter(texts)
    return {
        "clips": len(captions),
        "captions": len(texts),
        "uncaptioned": sum(not clip for clip in non_blank),
        "per_clip": tuple(sorted(collections.Counter(len(clip) for clip in non_blank).items())),
        "words": _compute_quantiles([len(caption_words) for caption_words in words]),
        "characters": _compute_quantiles([len(text) for text in texts]),
        "vocabulary": len(vocabulary),
        "frequent_words": tuple(_get_most_frequent(vocabulary.items())),
        "distinct": len(repeats),
        "repeated": tuple(
            (text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "…", count)
            for text, count in _get_most_frequent((text, count) for text, count in repeats.items() if count > 1)
        ),
    }


def _get_most_frequent(counts: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    return sorted(counts, key=lambda entry: (-entry[1], entry[0]))[:MAX_LISTED]


def _compute_quantiles(values: list[int]) -> dict[str, float | int] | None:
    if not values:
        return None
    quantiles = np.quantile(values, [0, 0.1, 0.5, 0.9, 1], method="inverted_cdf").tolist()
    names = ("least", "q10", "median", "q90", "most")
    return {**dict(zip(names, quantiles, strict=True)), "mean": sum(values) / len(values)}
