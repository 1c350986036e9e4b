"""A data set as the page shows it: columns as charts, selected and ordered rows, and their values as JSON."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float64, Int, Int64, UInt8

from dit_video.core.errors import UserError
from dit_video.curation.export.contents import find_caption_columns, is_bulky
from dit_video.data.clips import find_kept
from dit_video.data.tables import Table, take_rows

LISTED = ("name", "outcome", "reason", "split", "captions", "height", "width", "frames", "fps", "seconds")
"""Columns that tiles show."""
SHOWN = ("kept", "left_out", "all")
MAX_ROWS = 500
"""Maximum number of rows of a page."""


@dataclass(frozen=True, kw_only=True)
class RowQuery:
    """Rows that a page shows.

    Raises:
      UserError: If `show` is no kind of rows.
    """

    where: str = ""
    """Condition on columns, see `dit_video.data.where`; empty for all rows."""
    search: str = ""
    """Words that the name or a caption has, in any case."""
    show: str = "kept"
    """`kept` for clips that are trained on, `left_out` for other rows, `all` for both."""
    sort: str = ""
    """Column by which rows are ordered; the table's order if empty."""
    descending: bool = False

    def __post_init__(self):
        if self.show not in SHOWN:
            raise UserError(f"show={self.show!r} is invalid: use {', '.join(SHOWN)}.")


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
        """Return the number of selected rows in each bin, then the number of rows without a value."""
        assert self.bins is not None
        counts = np.bincount(self.bins[selected], minlength=256)
        size = len(self.values) if self.values else len(self.edges) - 1
        return [*map(int, counts[:size]), int(counts[_MISSING])]


class TableView:
    """A table whose rows are selected, ordered and counted; the results of the latest queries are kept.

    Args:
      table: The table.
    """

    def __init__(self, table: Table):
        self.table = table
        self.columns: list[ColumnView] = make_column_views(table)
        self.kept: Bool[np.ndarray, " n"] = find_kept(table)
        """Whether the row is a clip that is trained on."""
        self.captions: tuple[str, ...] = find_caption_columns(table.types)
        """Columns of captions."""
        self._seconds = np.nan_to_num(np.asarray(table["seconds"], np.float64))
        self._match = functools.lru_cache(_CACHED_MASKS)(self._compute_match)
        self._search = functools.lru_cache(_CACHED_MASKS)(self._compute_search)
        self._order = functools.lru_cache(_CACHED_ORDERS)(self._compute_order)

    def select(self, query: RowQuery) -> Int64[np.ndarray, " m"]:
        """Return the numbers of the rows in their order; rows without a value of the column come last.

        Raises:
          UserError: If the condition is invalid, or the column does not exist or has no order.
        """
        mask = self._make_mask(query)
        if not query.sort:
            return np.flatnonzero(mask)
        order = self._order(query.sort, query.descending)
        return order[mask[order]]

    def count(self, query: RowQuery) -> dict[str, list[int]]:
        """Return the numbers of selected rows in the bins of each column's chart."""
        return self.count_bins(self._make_mask(query))

    def count_bins(self, selected: Bool[np.ndarray, " n"]) -> dict[str, list[int]]:
        """Return the numbers of these rows in the bins of each column's chart."""
        return {column.name: column.count(selected) for column in self.columns if column.bins is not None}

    def summarize(self, where: str) -> dict[str, Any]:
        """Return the number and the seconds of the clips that are trained on with a condition."""
        return self.summarize_rows(self._match(where.strip()))

    def summarize_rows(self, selected: Bool[np.ndarray, " n"]) -> dict[str, Any]:
        """Return the number and the seconds of the selected rows that are trained on."""
        mask = selected & self.kept
        return {"clips": int(mask.sum()), "seconds": float(self._seconds[mask].sum())}

    def _make_mask(self, query: RowQuery) -> Bool[np.ndarray, " n"]:
        mask = self._match(query.where.strip()) & self._search(query.search.strip())
        return mask if query.show == "all" else mask & (self.kept == (query.show == "kept"))

    def _compute_match(self, where: str) -> Bool[np.ndarray, " n"]:
        mask = np.full(len(self.table), not where)
        if where:
            mask[self.table.select(where)] = True
        return mask

    def _compute_search(self, search: str) -> Bool[np.ndarray, " n"]:
        mask = np.ones(len(self.table), bool)
        names = [name for name in (*_SEARCHED, *self.captions) if search and name in self.table.types]
        texts = [self._read_texts(name) for name in names if get_kind(self.table.types[name]) in ("text", "texts")]
        for word in search.split():
            matches = (pc.match_substring(text, word, ignore_case=True) for text in texts)
            mask &= functools.reduce(pc.or_, matches).to_numpy()
        return mask

    def _read_texts(self, name: str) -> pa.ChunkedArray:
        column = self.table.arrow(name)
        if get_kind(column.type) == "texts":
            column = pc.binary_join(column.cast(pa.list_(pa.string())), "\n")  # which knows no large lists
        return pc.fill_null(column, "")

    def _compute_order(self, name: str, descending: bool) -> Int64[np.ndarray, " n"]:
        column = self.table.arrow(name)
        if get_kind(column.type) == "texts":
            column = self._read_texts(name)
        order = "descending" if descending else "ascending"
        try:
            return (
                pc.array_sort_indices(column.combine_chunks(), order=order, null_placement="at_end")
                .to_numpy()
                .astype(np.int64)
            )
        except pa.ArrowException as error:
            raise UserError(f"sort={name!r} is invalid: {column.type} has no order. Use another column.") from error


def read_rows(table: Table, rows: Int64[np.ndarray, " n"], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the values of rows in columns, and the rows' numbers as `row`.

    Columns that do not exist, or hold vectors or bytes, are left out.

    `media` is a part of the address of a row's clip, with which the address changes when the clip does; absent if there
    is no clip.
    """
    names = [name for name in dict.fromkeys((*LISTED, *columns, *_ALWAYS)) if name in table.types]
    names = [name for name in names if not is_bulky(table, name)]
    ascending, places = np.unique(rows, return_inverse=True)
    values = {name: take_rows(table.arrow(name), ascending).to_pylist() for name in names}
    result = []
    for row, index in zip(rows, places, strict=True):
        described = {name: _simplify(values[name][index]) for name in names if name != "payload"}
        payload = values["payload"][index] if "payload" in values else None
        result.append({"row": int(row), **described} | ({"media": payload[:16]} if payload else {}))
    return result


def read_row(table: Table, row: int) -> dict[str, Any]:
    """Return all values of a row that are not missing, but for vectors and bytes."""
    values = read_rows(table, np.array([row]), table.names)[0] | {"payload": table.arrow("payload")[row].as_py()}
    return {name: value for name, value in values.items() if value is not None}


def make_column_views(table: Table) -> list[ColumnView]:
    """Return the views of all columns that tell something of clips, which vectors and bytes do not."""
    makers: dict[str, Callable[[Table, str], ColumnView]] = {"number": _view_numbers, "text": _view_texts}
    makers["flag"] = _view_texts
    names = [name for name in table.names if name not in _HIDDEN and not is_bulky(table, name)]
    kinds = {name: get_kind(table.types[name]) for name in names}
    return [
        makers.get(kind, lambda _, name: ColumnView(name, kinds[name]))(table, name) for name, kind in kinds.items()
    ]


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


_SEARCHED = ("name", "source", "reason", "why")
_CACHED_MASKS, _CACHED_ORDERS = 16, 4
_MAX_TEXT = 4000
_MAX_LIST = 24
"""Number of values from which on a list is shown as its length."""
_ALWAYS = {"payload", "chosen", "why"}


def _simplify(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bool | None):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 53 else str(value)  # JavaScript's numbers are exact below 2^53
    if isinstance(value, str):
        return value if len(value) <= _MAX_TEXT else value[:_MAX_TEXT] + "…"
    if isinstance(value, list):
        if len(value) > _MAX_LIST and not isinstance(value[0], str):
            return f"{len(value)} values"
        return [_simplify(each) for each in value]
    return str(value)[:_MAX_TEXT]
