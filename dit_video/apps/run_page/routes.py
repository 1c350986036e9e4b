"""Routes of the page of a training run: the page, its state as JSON, and the grids that it shows."""

import hashlib
import json
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from dit_video.apps.pages import render_page
from dit_video.apps.run_page.grids import KINDS, list_grids
from dit_video.apps.run_page.run_plan import read_plan
from dit_video.apps.run_page.run_state import RunReader, make_document
from dit_video.apps.run_page.run_view import format_time, make_view

_MEDIA_HEADERS = {"Cache-Control": "private, max-age=31536000, immutable"}
"""Headers of a grid, whose address has its version."""


def make_run_routes(folder: Path) -> list[Route]:
    """Return the routes of the page of the run in a folder, which another process may write meanwhile.

    `/run` is the page, `/run/state` its state as JSON, and `/run/media/…` the grids that the page names.
    """
    reader = RunReader(folder)

    def get_page(request: Request) -> Response:
        view = make_view(reader.read())
        return render_page(
            "run.html.jinja", title=view.title, has_run=True, page="run", run=view, format_time=format_time
        )

    def get_state(request: Request) -> Response:
        document = make_document(reader.read())
        # The page is fetched again when this changes.
        digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
        return JSONResponse({"version": digest[:16], **document})

    def get_media(request: Request) -> Response:
        training, kind, name = (request.path_params[part] for part in ("training", "kind", "name"))
        # Compared with what was listed, and never a part of a path.
        if kind in KINDS and training in {each.name for each in read_plan(folder).add_folders(folder)}:
            for grid in list_grids(folder, training):
                for file in grid.files:
                    if grid.kind == kind and file.path.name == name:
                        return FileResponse(file.path, headers=_MEDIA_HEADERS)
        raise HTTPException(404, f"{name[:80]} does not exist")

    return [
        Route("/run", get_page),
        Route("/run/state", get_state),
        Route("/run/media/{training}/{kind}/{name}", get_media),
    ]
