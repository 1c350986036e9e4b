"""Pages and files of the server: templates in which text cannot become markup, styles and scripts."""

import importlib.resources
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from dit_video.core.errors import MissingError
from dit_video.core.templates import make_environment

_ENVIRONMENT = make_environment("dit_video.apps")
_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def render_page(template: str, *, status: int = 200, path: str = "/", **values: Any) -> HTMLResponse:
    """Return the response with a rendered template of `apps/templates`.

    Its addresses are relative, so that pages work behind a proxy under any path.
    """
    root = "../" * (path.count("/") - 1)
    return HTMLResponse(_ENVIRONMENT.get_template(template).render(values, root=root), status_code=status)


def render_message(heading: str, text: str, *, title: str, has_run: bool, status: int, path: str) -> HTMLResponse:
    """Return the response with a page of one message, for the request of a path."""
    values = {"title": title, "has_run": has_run, "page": "message", "heading": heading, "text": text}
    return render_page("message.html.jinja", status=status, path=path, **values)


def make_static_route() -> Route:
    """Return the route of the styles and scripts in `apps/static`, and of the style sheet of reports."""
    own = importlib.resources.files("dit_video.apps") / "static"
    files = {file.name: file for file in own.iterdir() if file.name.rpartition(".")[2] in _TYPES}
    files["page.css"] = importlib.resources.files("dit_video.apps.reports") / "page.css"

    def get_file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in files:
            raise MissingError(f"{name[:80]} does not exist")
        content = files[name].read_bytes()
        headers = {"Cache-Control": "no-cache"}
        return Response(content, media_type=_TYPES[name.rpartition(".")[2]], headers=headers)

    return Route("/static/{name}", get_file)
