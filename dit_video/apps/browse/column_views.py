"""Columns of a data set as the page shows them: numbers as histograms, texts of few kinds as bars."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float64, Int, UInt8

from dit_video.curation.export.contents import is_bulky
from dit_video.data.tables import Table

_BINS = 40
_MAX_VALUES = 12
"""Maximum number of values of a text column that have bars of their own."""
_MAX_DISTINCT = 200
"""Number of values above which a text column has no bars, as with names."""
_LOG_RATIO = 1000.0
"""Ratio of a large to a small value, outliers aside, from which on a histogram is logarithmic."""
_HIDDEN = {"id", "name", "hash", "file", "offset", "length", "crc32", "payload", "source_sha256"}
"""Columns that say where a clip is stored, not what it is like."""
_MISSING = 255
"""Number of the bin of rows without a value."""


@dataclass(frozen=True, eq=False)
class ColumnView:
    """A column, and the bin of each row in its chart."""

    name: str
    kind: str
    """`number`, `text`, `flag`, `texts` or `other`."""
    edges: tuple[float, ...] = ()
    """Edges of the bins of numbers."""
    values: tuple[Any, ...] = ()
    """Values of texts and flags, one for each bin."""
    is_log: bool = False
    is_integer: bool = False
    bins: UInt8[np.ndarray, " n"] | None = None
    """Number of the bin of each row, 255 without a value; None if the column has no chart."""

    def describe(self) -> dict[str, Any]:
        """Return the description as JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "edges": self.edges,
            "values": self.values,
            "log": self.is_log,
            "integer": self.is_integer,
            "chart": self.bins is not None,
        }

    def count(self, selected: Bool[np.ndarray, " n"]) -> list[int]:
        """Return the number of selected rows in each bin, and after them that of rows without a value."""
        assert self.bins is not None
        counts = np.bincount(self.bins[selected], minlength=256)
        size = len(self.values) if self.values else len(self.edges) - 1
        return [*map(int, counts[:size]), int(counts[_MISSING])]


def get_kind(type: pa.DataType) -> str:
    """Return how values of a type are shown."""
    if pa.types.is_boolean(type):
        return "flag"
    if pa.types.is_string(type) or pa.types.is_large_string(type):
        return "text"
    if pa.types.is_floating(type) or (pa.types.is_integer(type) and type != pa.uint64()):
        return "number"
    is_list = pa.types.is_list(type) or pa.types.is_large_list(type)
    return "texts" if is_list and get_kind(type.value_type) == "text" else "other"


def make_column_views(table: Table) -> list[ColumnView]:
    """Return the views of all columns that tell something of clips, which vectors and bytes do not."""
    makers: dict[str, Callable[[Table, str], ColumnView]] = {"number": _view_numbers, "text": _view_texts}
    makers["flag"] = _view_texts
    names = [name for name in table.names if name not in _HIDDEN and not is_bulky(table, name)]
    kinds = {name: get_kind(table.types[name]) for name in names}
    return [
        makers.get(kind, lambda _, name: ColumnView(name, kinds[name]))(table, name) for name, kind in kinds.items()
    ]


def _view_numbers(table: Table, name: str) -> ColumnView:
    values = np.asarray(table[name], np.float64)
    finite = np.isfinite(values)
    is_integer = pa.types.is_integer(table.types[name])
    if not finite.any():
        return ColumnView(name, "number", is_integer=is_integer)
    low, high = float(values[finite].min()), float(values[finite].max())
    small, large = np.quantile(values[finite], (0.01, 0.99))
    is_log = low > 0 and bool(large / small >= _LOG_RATIO)
    edges = _make_edges(low, high, is_log=is_log, is_integer=is_integer)
    bins = np.full(len(values), _MISSING, np.uint8)
    bins[finite] = np.clip(np.searchsorted(edges, values[finite], side="right") - 1, 0, len(edges) - 2)
    return ColumnView(name, "number", tuple(edges.tolist()), is_log=is_log, is_integer=is_integer, bins=bins)


def _make_edges(low: float, high: float, *, is_log: bool, is_integer: bool) -> Float64[np.ndarray, " m"]:
    """Return the edges of bins with round borders from below `low` to above `high`."""
    if is_log:
        return np.geomspace(low, high, _BINS + 1)
    if is_integer and high - low < _BINS:
        return np.arange(low, high + 2)
    if high == low:
        return np.array([low, low + (1.0 if is_integer else abs(low) / 10 or 1.0)])
    size = (high - low) / _BINS
    power = 10.0 ** math.floor(math.log10(size))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= size * 0.999)
    first = math.floor(low / step)
    return step * np.arange(first, math.floor(high / step) + 2)


def _view_texts(table: Table, name: str) -> ColumnView:
    kind = get_kind(table.types[name])
    encoded = table.arrow(name).combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    values = encoded.dictionary.to_pylist()
    if not 0 < len(values) <= _MAX_DISTINCT:
        return ColumnView(name, kind)
    codes: Int[np.ndarray, " n"] = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    counts = np.bincount(codes[codes >= 0], minlength=len(values))
    chosen = np.argsort(-counts, kind="stable")[:_MAX_VALUES]
    numbers = np.full(len(values) + 1, _MISSING, np.uint8)  # rows of other values have no bin, as those without one
    numbers[chosen] = np.arange(len(chosen))
    return ColumnView(name, kind, values=tuple(values[index] for index in chosen), bins=numbers[codes])
