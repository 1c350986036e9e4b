"""The page's HTML, its styles and scripts, and what it shows of a table."""

import importlib.resources
from typing import Any

import numpy as np

from dit_video.apps.browse.row_queries import TableView
from dit_video.apps.reports.template import make_environment

_ENVIRONMENT = make_environment("dit_video.apps.browse")
_SHARED = ("dom.js", "theme.js", "layout.css")
"""Files that the page shares with the studio."""


def read_assets() -> dict[str, bytes]:
    """Return the page's styles and scripts by name, with those that it shares with the studio and with reports."""
    web = importlib.resources.files("dit_video.apps")
    files = [
        *(web / "browse" / "static").iterdir(),
        *(web / "static" / name for name in _SHARED),
    ]
    files.append(importlib.resources.files("dit_video.apps.reports") / "page.css")
    return {file.name: file.read_bytes() for file in files}


def render_browse_page(title: str, **values: Any) -> str:
    """Return the HTML of the page; `styles`, `scripts` and `data` are what a page without a server contains."""
    return _ENVIRONMENT.get_template("browse.html.jinja").render(title=title, **{"static": None, **values})


def describe_table(view: TableView, title: str, rows: np.ndarray | None = None) -> dict[str, Any]:
    """Return what the page shows of a table before its rows.

    Args:
      view: the table.
      title: name of the data set.
      rows: rows that the page has; all if None.
    """
    included = np.ones(len(view.table), bool)
    if rows is not None:
        included[:] = False
        included[rows] = True
    counts = view.count_bins(included)
    columns = [column.describe() | {"all": counts.get(column.name)} for column in view.columns]
    return {
        "title": title,
        "version": view.table.version,
        "rows": int(included.sum()),
        "total": view.summarize_rows(included),
        "columns": columns,
        "captions": view.captions,
    }
