"""The server of a data set's page: its rows as JSON, thumbnails and clips."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from dit_video.apps.access import Access, AccessRules
from dit_video.apps.browse.media import MediaMaker
from dit_video.apps.browse.pages import describe_table, read_assets, render_browse_page
from dit_video.apps.browse.table_view import MAX_ROWS, RowQuery, TableView, read_row, read_rows
from dit_video.core.errors import MissingError, UserError
from dit_video.curation.export.stored_clips import StoredClips, detect_media_type

_IMMUTABLE = {"Cache-Control": "private, max-age=31536000, immutable"}
"""Headers of media, whose address changes with their content."""
_TYPES = {".css": "text/css", ".js": "text/javascript"}
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class BrowseRoutes:
    """The requests that the page sends.

    Args:
      clips: The data set.
      title: Name of the data set.
      media: Maker of thumbnails and clips.
    """

    def __init__(self, clips: StoredClips, title: str, media: MediaMaker):
        self._clips, self._title, self._media = clips, title, media
        self._view = TableView(clips.table)
        self._assets = read_assets()

    def make_routes(self) -> list[Route]:
        """Return all routes."""
        return [
            Route("/", self._get_page),
            Route("/static/{name}", self._get_asset),
            Route("/api/data", self._describe),
            Route("/api/rows", self._list_rows),
            Route("/api/rows/{row:int}", self._get_row),
            Route("/media/{task}/{row:int}", self._get_media),
        ]

    def _get_page(self, request: Request) -> Response:
        return HTMLResponse(render_browse_page(self._title))

    def _get_asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._assets:
            raise MissingError(f"{name[:80]} does not exist.")
        kind = _TYPES[Path(name).suffix]
        return Response(self._assets[name], media_type=kind, headers={"Cache-Control": "no-cache"})

    def _describe(self, request: Request) -> Response:
        return JSONResponse(describe_table(self._view, self._title))

    def _list_rows(self, request: Request) -> Response:
        values = request.query_params
        query = RowQuery(
            where=values.get("where", ""),
            search=values.get("search", ""),
            show=values.get("show", "kept"),
            sort=values.get("sort", ""),
            descending=values.get("descending") == "true",
        )
        first, count = _parse_count(values.get("first", "0")), _parse_count(values.get("count", "100"))
        rows = self._view.select(query)
        page = rows[first : first + min(count, MAX_ROWS)]
        columns = [name for name in values.get("columns", "").split(",") if name]
        answer = {
            "total": len(rows),
            "selected": self._view.summarize(query.where),
            "counts": self._view.count(query),
            "rows": read_rows(self._clips.table, page, columns),
        }
        return JSONResponse(answer)

    def _get_row(self, request: Request) -> Response:
        return JSONResponse(read_row(self._clips.table, self._check_row(request)))

    async def _get_media(self, request: Request) -> Response:
        row, task = self._check_row(request), request.path_params["task"]
        if task == "original":
            content = await run_in_threadpool(self._read, row)
            return _send_range(request, content, detect_media_type(content).name)
        kinds = {"thumbnail": "image/webp", "picture": "image/webp", "clip": "video/mp4"}
        if task not in kinds:
            raise MissingError(f"{task[:80]} does not exist.")
        content = await asyncio.wrap_future(self._media.make(task, row))
        return _send_range(request, content, kinds[task])

    def _read(self, row: int) -> bytes:
        if not self._clips.table.arrow("payload")[row].as_py():
            raise MissingError(f"row {row} has no clip, as it was left out.")
        return self._clips.read(row)

    def _check_row(self, request: Request) -> int:
        row = request.path_params["row"]
        if row >= len(self._clips.table):
            raise MissingError(f"row {row} does not exist.")
        return row


def make_browse_app(clips: StoredClips, title: str, access: AccessRules, media: MediaMaker) -> Starlette:
    """Return the application that shows a data set.

    Args:
      clips: The data set.
      title: Name of the data set.
      access: Who may use the server.
      media: Maker of thumbnails and clips, which the application starts and closes.
    """

    @contextlib.asynccontextmanager
    async def run_media(app: Starlette) -> AsyncIterator[None]:
        media.start()
        try:
            yield
        finally:
            media.close()

    return Starlette(
        routes=BrowseRoutes(clips, title, media).make_routes(),
        middleware=[Middleware(Access, rules=access)],
        exception_handlers={UserError: _answer_error},
        lifespan=run_media,
    )


def _parse_count(text: str) -> int:
    if not text.isdecimal() or len(text) > 12:
        raise UserError(f"first or count={text[:80]!r} is invalid: use a number from 0 on.")
    return int(text)


def _send_range(request: Request, content: bytes, media_type: str) -> Response:
    """Return the response with a content, or with the part of it that a player asks for."""
    headers, size = {**_IMMUTABLE, "Accept-Ranges": "bytes"}, len(content)
    match = _RANGE.fullmatch(request.headers.get("range", ""))
    if match is None or not (match[1] or match[2]):
        return Response(content, media_type=media_type, headers=headers)
    first = int(match[1]) if match[1] else max(0, size - int(match[2]))
    last = min(size - 1, int(match[2])) if match[1] and match[2] else size - 1
    if first > last:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    return Response(content[first : last + 1], 206, media_type=media_type, headers=headers)


def _answer_error(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=404 if isinstance(error, MissingError) else 422)
