"""The page of a data set, for the server and as a folder that needs none."""

import importlib.resources
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from dit_video.apps.browse.media import MediaMaker
from dit_video.apps.browse.table_view import RowQuery, TableView, read_rows
from dit_video.core.errors import UserError
from dit_video.core.files import atomic_path, write_text
from dit_video.core.templates import make_environment
from dit_video.curation.export.stored_clips import StoredClips, detect_media_type


def render_browse_page(title: str, **values: Any) -> str:
    """Return the HTML of the page; `styles`, `scripts` and `data` are what a page without a server contains."""
    return _ENVIRONMENT.get_template("browse.html.jinja").render(title=title, **{"static": None, **values})


def describe_table(view: TableView, title: str, rows: np.ndarray | None = None) -> dict[str, Any]:
    """Return what the page shows of a table before its rows.

    Args:
      view: The table.
      title: Name of the data set.
      rows: Rows that the page has; all if None.
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


def read_assets() -> dict[str, bytes]:
    """Return the page's styles and scripts by name, with those that it shares with the studio and with reports."""
    web = importlib.resources.files("dit_video.apps")
    files = [
        *(web / "browse" / "static").iterdir(),
        *(web / "static" / name for name in _SHARED),
    ]
    files.append(importlib.resources.files("dit_video.apps.reports") / "page.css")
    return {file.name: file.read_bytes() for file in files}


_ENVIRONMENT = make_environment("dit_video.apps.browse")
_SHARED = ("dom.js", "theme.js", "layout.css")
"""Files that the page shares with the studio."""
MAX_STATIC_ROWS = 5000
"""Maximum number of rows of a page without a server."""
_MODULES = ("dom", "browse_text", "browse_source", "browse_charts", "browse_rows", "browse_detail", "browse")
"""Modules, each after those that it imports."""
_STYLES = ("page.css", "layout.css", "browse.css")
_POLICY = (
    "default-src 'none'; img-src 'self' data: file:; media-src 'self' file:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)


def write_static_page(
    clips: StoredClips, title: str, folder: Path, media: MediaMaker, *, where: str = "", copy_clips: bool = False
) -> int:
    """Write `index.html`, thumbnails and, if asked for, clips; return the number of rows.

    Args:
      clips: The data set.
      title: Name of the data set.
      folder: Folder, which is created; it may exist if it is empty.
      media: Maker of thumbnails.
      where: Condition that rows meet; empty for all.
      copy_clips: Also write the clips, which the page then plays.

    Raises:
      UserError: If there are more rows than such a page can hold, the folder is not empty or cannot be written, or the
        condition is invalid.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"static={folder} is not an empty folder. Use another one, or remove it.")
    view = TableView(clips.table)
    rows = view.select(RowQuery(where=where, show="all"))
    if len(rows) > MAX_STATIC_ROWS:
        fix = f"Select at most {MAX_STATIC_ROWS:,} with --where, or leave out --static"
        raise UserError(f"{len(rows):,} rows are too many for a page without a server. {fix}.")
    try:
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            documents = _write_media(clips, view, rows, temporary, media, copy_clips)
            data = {"data": describe_table(view, title, rows), "rows": documents}
            write_text(temporary / "index.html", _render_static_page(title, data))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}. Use a folder with space.") from error
    return len(rows)


def _write_media(
    clips: StoredClips, view: TableView, rows: np.ndarray, folder: Path, media: MediaMaker, copy_clips: bool
) -> list[dict[str, Any]]:
    """Write the files of all rows, and return the rows as JSON with the paths of their files."""
    documents = read_rows(clips.table, rows, clips.table.names)
    thumbnails = {row["row"]: media.make("thumbnail", row["row"]) for row in documents if "media" in row}
    for name in ("thumbnails", *(("clips",) if copy_clips else ())):
        (folder / name).mkdir()
    for number, document in enumerate(documents):
        row = document["row"]
        document |= {"row": number, "kept": bool(view.kept[row]), "files": {}}
        if row not in thumbnails:
            continue
        try:
            picture = thumbnails[row].result()
        except UserError:  # the page says so
            continue
        document["files"]["thumbnail"] = f"thumbnails/{number}.webp"
        (folder / document["files"]["thumbnail"]).write_bytes(picture)
        if copy_clips:
            content = clips.read(row)
            document["files"]["original"] = f"clips/{number}{detect_media_type(content).suffix}"
            (folder / document["files"]["original"]).write_bytes(content)
    return documents


def _render_static_page(title: str, data: dict[str, Any]) -> str:
    assets = {name: content.decode() for name, content in read_assets().items()}
    modules = (re.sub(r"^import [^;]*;\n", "", assets[f"{name}.js"], flags=re.MULTILINE) for name in _MODULES)
    scripts = "\n".join(re.sub(r"^export ", "", module, flags=re.MULTILINE) for module in modules)
    # A text cannot end the element: JSON may write every "<" as an escape.
    document = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    values = {"scripts": scripts, "theme": assets["theme.js"], "styles": "\n".join(assets[name] for name in _STYLES)}
    static = {name: Markup(text) for name, text in values.items()} | {"data": Markup(document), "policy": _POLICY}
    return render_browse_page(title, static=static)
