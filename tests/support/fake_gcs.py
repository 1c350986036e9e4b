"""A server of Google Cloud Storage's JSON API with objects in memory, for gcsfs and TensorStore, and for what they do.

`serve()` starts it in this process and sets the environment variables by which both clients, also those of other
processes, use it. Objects are strongly consistent, complete or absent, and known by generations, as in the service:
https://cloud.google.com/storage/docs/json_api/v1. It can fail on purpose, as services do.
"""

import base64
import contextlib
import email
import email.policy
import hashlib
import http.server
import json
import os
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

BUCKET = "bucket"
_PAGE = 1000


@dataclass
class StoredObject:
    """Content of an object, and what the service says of it."""

    name: str
    content: bytes
    generation: int
    content_type: str = "application/octet-stream"
    time: float = field(default_factory=time.time)

    def describe(self) -> dict[str, Any]:
        """Return the object's resource."""
        written = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self.time)) + f".{int(self.time % 1 * 1000):03}Z"
        return {
            "kind": "storage#object",
            "id": f"{BUCKET}/{self.name}/{self.generation}",
            "name": self.name,
            "bucket": BUCKET,
            "generation": str(self.generation),
            "metageneration": "1",
            "contentType": self.content_type,
            "size": str(len(self.content)),
            "md5Hash": base64.b64encode(hashlib.md5(self.content).digest()).decode(),
            "etag": base64.b64encode(str(self.generation).encode()).decode(),
            "timeCreated": written,
            "updated": written,
            "storageClass": "STANDARD",
        }


class Failure(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class FakeGcs:
    """The objects of one bucket, and the requests for them."""

    def __init__(self) -> None:
        self.objects: dict[str, StoredObject] = {}
        self.requests: list[tuple[str, str]] = []
        """Method and path of each request."""
        self.fail: Callable[[str, str], int] = lambda method, path: 0
        """Function from method and path of a request to the status that it fails with; 0 for success."""
        self.failure_count = 0
        """Number of requests that failed on purpose."""
        self.delay = 0.0
        """Seconds by which each answer comes later."""
        self._uploads: dict[str, tuple[dict[str, str], bytearray]] = {}
        self._lock = threading.RLock()
        self._generation = int(time.time() * 1e6)

    def fail_at_random(self, share: float, *, seed: int = 0, statuses: tuple[int, ...] = (503, 429, 500)) -> None:
        """Let a share of all requests fail with one of the statuses."""
        generator = random.Random(seed)

        def fail(_method: str, _path: str) -> int:
            with self._lock:
                return generator.choice(statuses) if generator.random() < share else 0

        self.fail = fail

    def list_names(self, prefix: str = "") -> list[str]:
        """Return the names of the objects with a prefix, in order."""
        with self._lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def handle(self, method: str, path: str, query: dict[str, str], headers: Any, body: bytes) -> Any:
        """Return the answer to a request: a resource, an object, a location as text, or None for no content."""
        with self._lock:
            if match := re.fullmatch(r"/upload/storage/v1/b/[^/]+/o", path):
                return self._upload(method, query, headers, body)
            if match := re.fullmatch(r"(?:/download)?/storage/v1/b/[^/]+/o/(.+)/rewriteTo/b/[^/]+/o/(.+)", path):
                source, target = map(urllib.parse.unquote, match.groups())
                written = self._write(target, self._get(source).content, query)
                size = str(len(written.content))
                return {"done": True, "resource": written.describe(), "objectSize": size, "totalBytesRewritten": size}
            if match := re.fullmatch(r"(?:/download)?/storage/v1/b/[^/]+/o/(.+)", path):
                name = urllib.parse.unquote(match[1])
                if method == "DELETE":
                    self._check_conditions(name, query)
                    self._get(name)
                    del self.objects[name]
                    return None
                stored = self._get(name)
                self._check_conditions(name, query)
                return stored if query.get("alt") == "media" else stored.describe()
            if re.fullmatch(r"/storage/v1/b/[^/]+/o/?", path):
                return self._list(query)
            if re.fullmatch(r"/storage/v1/b/[^/]+/?", path):
                return {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET, "location": "US"}
        raise Failure(404, f"{method} {path} is not served")

    def _get(self, name: str) -> StoredObject:
        if name not in self.objects:
            raise Failure(404, f"No such object: {BUCKET}/{name}")
        return self.objects[name]

    def _check_conditions(self, name: str, query: dict[str, str]) -> None:
        generation = self.objects[name].generation if name in self.objects else 0
        if (expected := query.get("ifGenerationMatch")) is not None and int(expected) != generation:
            raise Failure(412, "conditionNotMet")
        if (other := query.get("ifGenerationNotMatch")) is not None and int(other) == generation:
            raise Failure(304, "not modified")

    def _write(self, name: str, content: bytes, query: dict[str, str]) -> StoredObject:
        self._check_conditions(name, query)
        self._generation += 1
        self.objects[name] = StoredObject(name, bytes(content), self._generation)
        return self.objects[name]

    def _upload(self, method: str, query: dict[str, str], headers: Any, body: bytes) -> Any:
        kind = query.get("uploadType", "media")
        if method == "PUT" or "upload_id" in query:
            return self._continue_upload(query["upload_id"], headers, body)
        if kind == "media":
            return self._write(query["name"], body, query).describe()
        if kind == "multipart":
            text = b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body
            document, content = email.message_from_bytes(text, policy=email.policy.HTTP).iter_parts()
            name = query.get("name") or json.loads(document.get_payload(decode=True))["name"]
            return self._write(name, content.get_payload(decode=True), query).describe()
        name = query.get("name") or json.loads(body)["name"]
        number = str(len(self._uploads))
        self._uploads[number] = ({**query, "name": name}, bytearray())
        return f"/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&upload_id={number}"

    def _continue_upload(self, number: str, headers: Any, body: bytes) -> Any:
        query, content = self._uploads[number]
        part = headers.get("Content-Range", f"bytes 0-0/{len(body)}")
        match = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", part)
        assert match
        if match[1] is not None:
            del content[int(match[1]) :]
            content += body
        if match[3] == "*" or len(content) < int(match[3]):
            raise Failure(308, f"bytes=0-{len(content) - 1}" if content else "")
        return self._write(query["name"], bytes(content), query).describe()

    def _list(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items: dict[str, dict[str, Any] | None] = {}
        for name in self.list_names(prefix):
            if name < query.get("startOffset", "") or ("endOffset" in query and name >= query["endOffset"]):
                continue
            inner, separator, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if separator:
                items[f"{prefix}{inner}{delimiter}"] = None
            else:
                items[name] = self.objects[name].describe()
        start = int(query.get("pageToken", 0))
        end = start + min(_PAGE, int(query.get("maxResults", _PAGE)))
        page = [*items.items()][start:end]
        answer: dict[str, Any] = {
            "kind": "storage#objects",
            "items": [item for _, item in page if item is not None],
            "prefixes": [name for name, item in page if item is None],
        }
        return answer if end >= len(items) else {**answer, "nextPageToken": str(end)}


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, gcs: FakeGcs):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.gcs = gcs

    def handle_error(self, *_: Any) -> None:
        """Print nothing: clients close connections, and are killed."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def _respond(self) -> None:
        location = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(location.query, keep_blank_values=True))
        body = self._read_body()
        gcs = self.server.gcs
        gcs.requests.append((self.command, self.path))
        time.sleep(gcs.delay)
        try:
            if status := gcs.fail(self.command, self.path):
                gcs.failure_count += 1
                raise Failure(status, "failed on purpose")
            answer = gcs.handle(self.command, location.path, query, self.headers, body)
        except Failure as failure:
            self._send_failure(failure)
        else:
            self._send(answer)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _respond  # names of the standard library

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, answer: Any) -> None:
        headers = {"Content-Type": "application/json"}
        status, content = 200, b""
        if answer is None:
            status = 204
        elif isinstance(answer, str):
            headers["Location"] = f"http://{self.headers['Host']}{answer}"
        elif isinstance(answer, StoredObject):
            headers |= {"Content-Type": answer.content_type, "x-goog-generation": str(answer.generation)}
            status, content = self._cut(answer.content, headers)
        else:
            content = json.dumps(answer).encode()
        self._write(status, headers, content)

    def _cut(self, content: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return 200, content
        if not match[1]:
            start, end = max(0, len(content) - int(match[2])), len(content)
        else:
            start, end = int(match[1]), min(len(content), int(match[2] or len(content) - 1) + 1)
        if start >= len(content):
            headers["Content-Range"] = f"bytes */{len(content)}"
            return 416, b""
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        return 206, content[start:end]

    def _send_failure(self, failure: Failure) -> None:
        headers = {"Content-Type": "application/json"}
        if failure.status == 308:
            self._write(308, {**headers, **({"Range": str(failure)} if str(failure) else {})}, b"")
            return
        if failure.status == 304:
            self._write(304, headers, b"")
            return
        error = {"code": failure.status, "message": str(failure), "errors": [{"message": str(failure)}]}
        self._write(failure.status, headers, json.dumps({"error": error}).encode())

    def _write(self, status: int, headers: dict[str, str], content: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that was killed
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if status not in (204, 304):
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)


@contextlib.contextmanager
def serve() -> Iterator[FakeGcs]:
    """Serve an empty bucket `gs://bucket` to this process and to those that it starts."""
    gcs = FakeGcs()
    server = _Server(gcs)
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    variables = {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks by gRPC
        "GCE_METADATA_ROOT": "127.0.0.1:9",  # no service tells who this machine is
        "no_proxy": "127.0.0.1,localhost",
    }
    try:
        with mock.patch.dict(os.environ, variables):
            yield gcs
    finally:
        server.shutdown()
        server.server_close()
