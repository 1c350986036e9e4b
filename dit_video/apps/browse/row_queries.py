"""Selection of a table's rows: those that meet a condition and a search, in the order of a column."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int64

from dit_video.apps.browse.column_views import ColumnView, get_kind, make_column_views
from dit_video.core.errors import UserError
from dit_video.curation.export.contents import find_caption_columns
from dit_video.data.clips import find_kept
from dit_video.data.tables import Table

SHOWN = ("kept", "left_out", "all")
MAX_ROWS = 500
"""Maximum number of rows of a page."""
_SEARCHED = ("name", "source", "reason", "why")
_CACHED_MASKS, _CACHED_ORDERS = 16, 4


@dataclass(frozen=True, kw_only=True)
class RowQuery:
    """Rows that a page shows.

    Raises:
      UserError: an unknown kind of rows.
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


class TableView:
    """A table whose rows are selected, ordered and counted; the results of the latest queries are kept.

    Args:
      table: the table.
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
          UserError: an invalid condition, or a column that does not exist or has no order.
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
        """Return the number and the seconds of those of these rows that are trained on."""
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
