"""The server: pages of a model's studio, and of the training run that it comes from."""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dit_video.apps.access import Access, AccessRules
from dit_video.apps.pages import make_static_route, render_message
from dit_video.apps.run_page import make_run_routes
from dit_video.apps.run_page.run_state import read_plan
from dit_video.apps.studio.jobs import JobQueue, Worker, show_warnings_as_notes
from dit_video.apps.studio.models import StudioModel
from dit_video.apps.studio.routes import ERRORS, StudioRoutes, answer_http_error
from dit_video.core.errors import UserError

_SHUTDOWN_SECONDS = 2
"""Seconds that open connections have to end."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of the server: pages, folders and access."""

    title: str
    run: Path | None
    """Folder of a training run, which has a page of its own; None for another folder."""
    root: Path
    """Folder of the users' uploads and galleries."""
    access: AccessRules
    max_upload: int
    """Maximum bytes of an upload."""


def make_app(config: ServerConfig, model: StudioModel | None) -> Starlette:
    """Return the application.

    Args:
      config: Its settings.
      model: The model; None for a run that has none yet.
    """
    has_run, queue = config.run is not None, JobQueue()
    routes: list[Route] = [make_static_route()]
    if config.run is not None:
        routes += make_run_routes(config.run)
    workers = []
    if model is not None:
        studio = StudioRoutes(model, queue, config.root, max_upload=config.max_upload, has_run=has_run)
        routes += studio.make_routes()
        workers.append(Worker(model, queue, lambda user: studio.open_files(user).gallery))

    @contextlib.asynccontextmanager
    async def run_workers(app: Starlette) -> AsyncIterator[None]:
        show_warnings_as_notes()
        for worker in workers:
            worker.start()
        try:
            yield
        finally:
            queue.close()

    def answer_missing(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if request.url.path.startswith(("/api/", "/media/", "/static/")):
            return answer_http_error(request, error)
        text = "This address does not exist."
        if request.url.path == "/" and has_run:
            text = "This run has no model yet. The page of the training run shows how far it is."
            if config.run is not None and (nested := read_plan(config.run).nested):
                commands = ", ".join(f"python -m dit_video.web {config.run / each}" for each in nested)
                text = f"This run has several models. A studio has one of them: {commands}"
        return render_message(
            "Not here", text, title=config.title, has_run=has_run, status=error.status_code, path=request.url.path
        )

    return Starlette(
        routes=routes,
        middleware=[Middleware(Access, rules=config.access)],
        exception_handlers={**ERRORS, HTTPException: answer_missing},
        lifespan=run_workers,
    )


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 is any that is free.

    Raises:
      UserError: If the port is in use, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # a browser that is quicker than the server waits instead of being refused
    except OSError as error:
        listener.close()
        fix = f"Use --port {port + 1}, or --port 0 for any that is free"
        raise UserError(f"port={port} of {host} is invalid: {error.strerror}. {fix}") from error
    except OverflowError as error:
        listener.close()
        raise UserError(f"port={port} is invalid: it must be from 0 to 65535. Use --port 7860") from error
    return listener


def serve(app: Starlette, listener: socket.socket) -> None:
    """Answer requests until Ctrl-C."""
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=_SHUTDOWN_SECONDS, server_header=False, lifespan="on"
    )
    with contextlib.suppress(KeyboardInterrupt):  # the end of a server
        uvicorn.Server(config).run(sockets=[listener])
    if any(isinstance(thread, Worker) and thread.is_alive() for thread in threading.enumerate()):
        # XLA would abort a process that ends while a thread compiles or samples.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
