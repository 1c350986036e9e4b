"""Histograms of columns, to choose limits from: numbers, truth values, texts and lists."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
MAX_VALUES = 20
"""Maximum number of different values of which each is counted."""
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
      name: name of the column.
      column: values.
      bins: number of bins of numbers.
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
    pairs = sorted(
        zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True), key=_by_count
    )
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


def _by_count(pair: tuple[Any, int]) -> tuple[int, str]:
    return -pair[1], str(pair[0])
