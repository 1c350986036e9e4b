"""Addresses of the studio: its page, its interface in JSON, and the files of a user."""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dit_video.apps.pages import render_page
from dit_video.apps.studio.forms import MAX_TEXT, FormError
from dit_video.apps.studio.gallery import UserFiles
from dit_video.apps.studio.jobs import MAX_JOBS, Job, JobQueue, QueueFullError, collect_notes
from dit_video.apps.studio.models import StudioModel
from dit_video.apps.studio.submission import parse_submission
from dit_video.apps.studio.uploads import FILES, StoredClip, TooLargeError, get_folder
from dit_video.core.errors import MissingError, UserError
from dit_video.core.memory import format_bytes

_MAX_JSON = 16 << 20
"""Maximum bytes of a request that is no upload."""
_POLL_SECONDS = 0.1
"""Seconds between two looks at the state of a user whose page is open."""
_HEARTBEAT_SECONDS = 10.0
"""Seconds after which an event without content keeps a connection open, and notices one that is gone."""


class StudioRoutes:
    """The requests that the studio answers.

    Args:
      model: The model.
      queue: Jobs of all users.
      root: Folder of the users' files.
      max_upload: Maximum bytes of an upload.
      has_run: Whether the page of a training run is served besides.
    """

    def __init__(self, model: StudioModel, queue: JobQueue, root: Path, *, max_upload: int, has_run: bool):
        self._model, self._queue, self._root = model, queue, root
        self._max_upload, self._has_run = max_upload, has_run

    def make_routes(self) -> list[Route]:
        """Return all routes."""
        item, job = "/api/items/{item}", "/api/jobs/{job}"
        return [
            Route("/", self._show_page),
            Route("/api/model", self._describe_model),
            Route("/api/expand", self._expand_prompt, methods=["POST"]),
            Route("/api/uploads", self._add_upload, methods=["POST"]),
            Route("/api/uploads/{upload}", self._describe_upload),
            Route("/api/jobs", self._add_job, methods=["POST"]),
            Route(job, self._cancel_job, methods=["DELETE"]),
            Route(f"{job}/preview", self._get_preview),
            Route("/api/state", self._get_state),
            Route("/api/events", self._stream_events),
            Route("/api/items", self._list_items),
            Route(item, self._delete_item, methods=["DELETE"]),
            Route("/media/uploads/{upload}/{name}", self._get_upload_file),
            Route("/media/items/{item}/{name}", self._get_item_file),
            Route("/media/items/{item}/inputs/{input}/{name}", self._get_input_file),
        ]

    def open_files(self, user: str) -> UserFiles:
        """Return the files of a user."""
        return UserFiles.open(self._root, user, self._model.fit)

    def _show_page(self, request: Request) -> Response:
        return render_page("studio.html.jinja", title=self._model.title, has_run=self._has_run, page="studio")

    def _describe_model(self, request: Request) -> Response:
        limits = {"upload_bytes": self._max_upload, "jobs": MAX_JOBS}
        return JSONResponse(self._model.describe() | {"limits": limits})

    async def _expand_prompt(self, request: Request) -> Response:
        body, expander = await _read_json(request), self._model.expander
        prompt = body.get("prompt") if isinstance(body, dict) else None
        if expander is None or not isinstance(prompt, str) or len(prompt) > MAX_TEXT:
            raise FormError("this prompt cannot be expanded")
        return JSONResponse({"prompt": await run_in_threadpool(expander, prompt)})

    async def _add_upload(self, request: Request) -> Response:
        kind = request.query_params.get("kind")
        if kind not in ("clip", "image"):
            raise FormError("kind is invalid: it must be clip or image")
        files = self._open(request)
        async with _limit_body(request, self._max_upload).form(max_files=1, max_fields=4) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise FormError("the request has no file")
            name = file.filename or "file"
            with tempfile.NamedTemporaryFile(suffix=_get_suffix(name)) as temporary:
                while part := await file.read(1 << 20):
                    temporary.write(part)
                temporary.flush()
                described = await run_in_threadpool(files.uploads.add, Path(temporary.name), name, kind)
        return JSONResponse(described, status_code=201)

    def _describe_upload(self, request: Request) -> Response:
        return JSONResponse(self._open(request).uploads.describe(request.path_params["upload"]))

    async def _add_job(self, request: Request) -> Response:
        body = await _read_json(request)
        job = await run_in_threadpool(self._make_job, request.state.user, body)
        self._queue.submit(job)
        return JSONResponse({"job": job.id}, status_code=201)

    def _make_job(self, user: str, body: Any) -> Job:
        files = self.open_files(user)
        files.gallery.check_room()
        model = self._model
        with collect_notes() as notes:
            recall = str if model.expander is None else model.expander.recall
            submission = parse_submission(body, model.config, model.tabs, model.sampling_form, files, recall=recall)
        tab, title = submission.tab.name, submission.title
        return Job(user=user, tab=tab, title=title, content=submission, notes=tuple(notes))

    def _cancel_job(self, request: Request) -> Response:
        self._queue.cancel(request.state.user, request.path_params["job"])
        return Response(status_code=204)

    def _get_preview(self, request: Request) -> Response:
        job = self._queue.get(request.state.user, request.path_params["job"])
        if not job.preview:
            raise MissingError("this job has no preview yet.")
        return Response(job.preview, media_type="image/webp")

    def _get_state(self, request: Request) -> Response:
        self._queue.note_contact(request.state.user)
        return JSONResponse(self._queue.describe(request.state.user)[1])

    def _stream_events(self, request: Request) -> Response:
        headers = {"X-Accel-Buffering": "no"}  # a proxy should pass events on at once
        events = self._iterate_events(request)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    async def _iterate_events(self, request: Request) -> AsyncIterator[str]:
        """Yield the state of a user whenever it changes, as server-sent events."""
        user, last_version, idle_seconds = request.state.user, -1, 0.0
        self._queue.open_page(user)
        try:
            while not self._queue.is_closed:
                if self._queue.get_version(user) != last_version:
                    last_version, state = self._queue.describe(user)
                    yield f"data: {json.dumps(state)}\n\n"
                    idle_seconds = 0.0
                elif idle_seconds >= _HEARTBEAT_SECONDS:
                    yield ": heartbeat\n\n"
                    idle_seconds = 0.0
                await asyncio.sleep(_POLL_SECONDS)
                idle_seconds += _POLL_SECONDS
        finally:
            self._queue.close_page(user)

    def _list_items(self, request: Request) -> Response:
        return JSONResponse({"items": self._open(request).gallery.list_items()})

    def _delete_item(self, request: Request) -> Response:
        self._open(request).gallery.delete(request.path_params["item"])
        self._queue.mark_gallery(request.state.user)
        return Response(status_code=204)

    def _get_upload_file(self, request: Request) -> Response:
        uploads = self._open(request).uploads
        folder = get_folder(uploads.folder, request.path_params["upload"])
        return _send_file(StoredClip(folder), request.path_params["name"])

    def _get_item_file(self, request: Request) -> Response:
        gallery, item = self._open(request).gallery, request.path_params["item"]
        return _send_file(StoredClip(get_folder(gallery.folder, item)), request.path_params["name"])

    def _get_input_file(self, request: Request) -> Response:
        names = request.path_params
        clip = self._open(request).gallery.get_input(names["item"], names["input"])
        return _send_file(clip, names["name"])

    def _open(self, request: Request) -> UserFiles:
        return self.open_files(request.state.user)


def answer_error(request: Request, error: Exception) -> Response:
    """Return the answer to a request that was refused, as JSON."""
    field = error.field if isinstance(error, FormError) else None
    return JSONResponse({"error": str(error), "field": field}, status_code=_get_status(error))


def _get_status(error: Exception) -> int:
    for kind, status in ((MissingError, 404), (TooLargeError, 413), (QueueFullError, 429)):
        if isinstance(error, kind):
            return status
    return 422


def _send_file(clip: StoredClip, name: str) -> Response:
    """Return the response with a file of a clip; browsers ask for parts of it."""
    if name not in FILES:
        raise MissingError(f"{name[:80]!r} does not exist.")
    # The frames of a clip never change.
    headers = {"Cache-Control": "private, max-age=31536000, immutable"}
    return FileResponse(clip.make_file(name), media_type=FILES[name], headers=headers)


def _limit_body(request: Request, max_bytes: int) -> Request:
    """Return a request whose body ends with an error after `max_bytes`.

    Raises:
      TooLargeError: If its header says that it has more.
    """
    error = TooLargeError(f"the file is larger than {format_bytes(max_bytes)}. Use a smaller or shorter one.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise error
    total = 0

    async def receive() -> Any:
        nonlocal total
        message = await request.receive()
        total += len(message.get("body", b""))
        if total > max_bytes:
            raise error
        return message

    return Request(request.scope, receive)


async def _read_json(request: Request) -> Any:
    """Return the JSON of a request.

    Raises:
      FormError: If it is not JSON.
    """
    try:
        return json.loads(await _limit_body(request, _MAX_JSON).body())
    except (ValueError, RecursionError) as error:
        raise FormError("the request is not JSON") from error


def _get_suffix(name: str) -> str:
    """Return the suffix of a file's name if it is a plain one: it helps ffmpeg to guess the format."""
    suffix = Path(name).suffix
    return suffix if suffix[1:].isalnum() and len(suffix) <= 8 else ""


ERRORS: dict[Any, Any] = {UserError: answer_error, ClientDisconnect: lambda request, error: Response(status_code=400)}
"""Handlers of errors."""


def answer_http_error(request: Request, error: Exception) -> Response:
    """Return the answer to an address that does not exist, or to a method that it does not have."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail, "field": None}, status_code=error.status_code)
