"""Statistics of a data set: histograms of columns, to choose limits from, and of the clips' properties; captions."""

import collections
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dit_video.data.clips import ClipSource

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
MAX_VALUES = 20
"""Maximum number of different values that are counted one by one."""
_BLOCKS = " ▁▂▃▄▅▆▇█"
_LIST_CHECKS = (
    *(pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
    *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary),
)


class Bin(NamedTuple):
    """Number of rows with a value, or with one of a range."""

    label: str
    number: int
    low: float | None = None
    """Lower end of a range of numbers, inclusive."""
    high: float | None = None
    """Upper end of a range of numbers, exclusive but for the last one."""


class Histogram(NamedTuple):
    """Counts of a column's values."""

    name: str
    kind: str
    """Kind of the column: `number`, `bool`, `category`, `text`, or `list` (also of bytes), of which the
    lengths are counted."""
    number: int
    """Number of rows with a value."""
    nulls: int
    bins: tuple[Bin, ...]
    """Bins of numbers in order, of categories by their count, and the most frequent texts."""
    quantiles: tuple[tuple[float, float], ...] = ()
    """Shares of the rows, and the values up to which they are."""
    distinct: int = 0
    """Number of different values of a category or text."""

    @property
    def bars(self) -> str:
        """Return a line of one block for each bin."""
        largest = max((each.number for each in self.bins), default=0)
        heights = [math.ceil(8 * each.number / largest) if largest else 0 for each in self.bins]
        return "".join(_BLOCKS[height] for height in heights)


def make_histogram(name: str, column: pa.ChunkedArray | pa.Array | np.ndarray, *, bins: int = 20) -> Histogram:
    """Return the histogram of a column.

    Numbers are counted in bins of equal width from the first to the last hundredth of the rows; what is beyond them
    counts in the outer bins. NaN counts as null.

    Args:
      name: Name of the column.
      column: Values.
      bins: Number of bins of numbers.
    """
    values = pa.chunked_array([pa.array(column, from_pandas=True)]) if isinstance(column, np.ndarray) else column
    if isinstance(values, pa.Array):
        values = pa.chunked_array([values])
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    nulls, kind = values.null_count, _find_kind(values.type)
    if kind == "list":
        count = pc.list_value_length if hasattr(values.type, "value_type") else pc.binary_length
        return make_histogram(name, count(values), bins=bins)._replace(kind=kind)
    values = values.drop_null()
    if kind == "number":
        numbers = values.to_numpy().astype(np.float64)
        is_finite = np.isfinite(numbers)
        return _count_numbers(name, numbers[is_finite], nulls + int((~is_finite).sum()), bins)
    if kind == "bool":
        true = pc.sum(values).as_py() or 0
        pair = (Bin("true", true), Bin("false", len(values) - true))
        return Histogram(name, kind, len(values), nulls, pair)
    counts = pc.value_counts(values)  # chunk by chunk: joined texts may not exceed 2 GB
    pairs = _sort_by_count(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True))
    kind = "category" if len(pairs) <= MAX_VALUES else "text"
    most = tuple(Bin(str(value), count) for value, count in pairs[:MAX_VALUES])
    return Histogram(name, kind, len(values), nulls, most, distinct=len(pairs))


def format_histograms(histograms: Sequence[Histogram]) -> str:
    """Return a table of text with one line for each column."""
    lines = [("column", "values", "nulls", "", "")]
    for each in histograms:
        lines.append((each.name, str(each.number), str(each.nulls), each.bars, _describe(each)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _describe(histogram: Histogram) -> str:
    if histogram.quantiles:
        shares = {0.05: "5 %", 0.5: "half", 0.95: "95 %"}
        parts = [f"{shares[share]} to {value:.4g}" for share, value in histogram.quantiles if share in shares]
        return ("lengths: " if histogram.kind == "list" else "") + ", ".join(parts)
    if histogram.kind == "text":
        return f"{histogram.distinct} different"
    return ", ".join(f"{each.label} {each.number}" for each in histogram.bins[:6])


def _find_kind(type: pa.DataType) -> str:
    if pa.types.is_boolean(type):
        return "bool"
    if any(check(type) for check in _LIST_CHECKS):
        return "list"
    return "number" if pa.types.is_integer(type) or pa.types.is_floating(type) else "category"


def _count_numbers(name: str, numbers: np.ndarray, nulls: int, bins: int) -> Histogram:
    if not len(numbers):
        return Histogram(name, "number", 0, nulls, ())
    low, high = np.quantile(numbers, (QUANTILES[0], QUANTILES[-1]))
    if low == high:
        low, high = float(numbers.min()), float(numbers.max())
    edges = np.linspace(low, high, bins + 1) if high > low else np.array([low, low])
    places = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(places, minlength=len(edges) - 1)
    ends = [float(numbers.min()), *map(float, edges[1:-1]), float(numbers.max())]
    parts = tuple(
        Bin(f"{start:.4g} – {stop:.4g}" if start < stop else f"{start:.4g}", int(count), start, stop)
        for start, stop, count in zip(ends, ends[1:], counts, strict=False)
    )
    quantiles = tuple(zip(QUANTILES, map(float, np.quantile(numbers, QUANTILES)), strict=True))
    return Histogram(name, "number", len(numbers), nulls, parts, quantiles)


def _sort_by_count(counts: Iterable[tuple[Any, int]]) -> list[tuple[Any, int]]:
    """Return values with their counts, sorted by count, then by value."""
    return sorted(counts, key=lambda pair: (-pair[1], str(pair[0])))


MEASURES = ("motion", "black", "frozen", "sharpness", "letterbox")
"""Columns of measures that an ingest takes."""
_MEASURE_BINS = 12
_LENGTH_EDGES = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)
"""Upper edges of the bins of lengths, in seconds."""
_LENGTH_BINS = ("< 1 s", *(f"{low}–{high} s" for low, high in itertools.pairwise(_LENGTH_EDGES)), "≥ 3600 s")
_SHAPE_EDGES = (0.5, 0.9, 1.1, 1.6, 2.0)
"""Upper edges of the bins of width over height."""
_SHAPE_BINS = ("1:2 and narrower", "upright", "square", "4:3 to 8:5", "16:9", "wider")
_FRAME_BINS = ("1", "2", *(f"{2**power + 1}–{2 ** (power + 1)}" for power in range(1, 32)))
"""Names of the bins of numbers of frames, which end at powers of two."""


def make_clip_histograms(clips: ClipSource) -> dict[str, dict[str, int]]:
    """Return the counts of clips by the names of bins, for each property, and for each measure that was taken.

    Lengths and rates are those of videos alone. `transfers` are the transfer functions before HDR is mapped to SDR.
    """
    heights, widths, frames, fps = (clips.column(name) for name in ("height", "width", "frames", "fps"))
    is_video = frames > 1
    lengths = clips.column("duration_us")[is_video] / 1e6
    histograms = {
        "sizes": _count_values(f"{height}×{width}" for height, width in zip(heights, widths, strict=True)),
        "shapes": _count_bins(np.searchsorted(_SHAPE_EDGES, widths / heights, side="right").tolist(), _SHAPE_BINS),
        "lengths": _count_bins(np.searchsorted(_LENGTH_EDGES, lengths, side="right").tolist(), _LENGTH_BINS),
        "frames": _count_bins([(int(count) - 1).bit_length() for count in frames], _FRAME_BINS),
        "rates": _count_values(f"{rate:.4g} fps" for rate in fps[is_video]),
        "codecs": _count_values(clips.column("codec")),
        "transfers": _count_values(clips.column("transfer")),
        "sound": _count_values(codec or "none" for codec in clips.column("audio_codec")),
    }
    for name in MEASURES:
        if bins := make_histogram(name, clips.column(name), bins=_MEASURE_BINS).bins:
            histograms[name] = {each.label: each.number for each in bins}
    return histograms


def _count_values(values: Iterable[str]) -> dict[str, int]:
    return dict(_sort_by_count(collections.Counter(values).items()))


def _count_bins(indices: Iterable[int], names: Sequence[str]) -> dict[str, int]:
    """Return the counts of bins in their order, without empty bins at the ends."""
    counts = collections.Counter(indices)
    return {names[index]: counts[index] for index in range(min(counts), max(counts) + 1)} if counts else {}


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
      captions: Captions of every clip, any number.
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
        "frequent_words": tuple(_sort_by_count(vocabulary.items())[:MAX_LISTED]),
        "distinct": len(repeats),
        "repeated": tuple(
            (text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "…", count)
            for text, count in _sort_by_count(pair for pair in repeats.items() if pair[1] > 1)[:MAX_LISTED]
        ),
    }


def _compute_quantiles(values: list[int]) -> dict[str, float | int] | None:
    if not values:
        return None
    quantiles = np.quantile(values, [0, 0.1, 0.5, 0.9, 1], method="inverted_cdf").tolist()
    names = ("least", "q10", "median", "q90", "most")
    return {**dict(zip(names, quantiles, strict=True)), "mean": sum(values) / len(values)}
