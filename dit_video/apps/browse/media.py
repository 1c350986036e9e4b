"""Pictures and clips of a data set for browsers, made by a pool of processes, and kept in a folder of limited size."""

import contextlib
import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import atomic_path
from dit_video.curation.export.stored_clips import StoredClips

MODULE = "dit_video.apps.browse.decoder"
_TIME_LIMITS = {"thumbnail": 20.0, "picture": 20.0, "clip": 300.0}
"""Seconds that a task may take."""
_SHARE_KEPT = 0.9
"""Share of its limit to which a full folder is emptied."""


class MediaCache:
    """A folder of files by key, from which those that were not read for the longest time are removed.

    Args:
      folder: Folder, which is created.
      max_bytes: Limit of the files' sizes.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self._folder, self._max_bytes = folder, max_bytes
        self._lock = threading.Lock()
        self._bytes = sum(size for _, size, _ in self._list_files())

    def read(self, key: str) -> bytes | None:
        """Return the content, or None."""
        path = self._get_path(key)
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return content

    def write(self, key: str, content: bytes) -> None:
        """Store a content."""
        with atomic_path(self._get_path(key)) as temporary:
            temporary.write_bytes(content)
        with self._lock:
            self._bytes += len(content)
            if self._bytes > self._max_bytes:
                self._evict()

    def _get_path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self._folder / name[:2] / name

    def _list_files(self) -> list[tuple[float, int, Path]]:
        stats = [(path, path.stat()) for path in self._folder.glob("??/*")]
        return sorted((stat.st_mtime, stat.st_size, path) for path, stat in stats)

    def _evict(self) -> None:
        files = self._list_files()
        self._bytes = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self._bytes <= _SHARE_KEPT * self._max_bytes:
                return
            path.unlink(missing_ok=True)
            self._bytes -= size


class _DecoderProcess:
    """A process that decodes, started again after each loss."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def start(self) -> subprocess.Popen:
        if self._process is None:
            # Imports the same modules as this process, but nothing from the current folder.
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            command = [sys.executable, "-P", "-m", MODULE]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        return self._process

    def run(self, task: str, content: bytes, seconds: float) -> bytes:
        process = self.start()
        assert process.stdin is not None
        assert process.stdout is not None
        watch = threading.Timer(_TIME_LIMITS[task], process.kill)
        watch.start()
        try:
            head = json.dumps({"task": task, "seconds": seconds, "bytes": len(content)}).encode() + b"\n"
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(head + content)
                process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                self.close()
                raise UserError("the clip cannot be decoded: the decoder crashed, or took too long.")
            answer = json.loads(line)
            if "error" in answer:
                raise UserError(answer["error"])
            return process.stdout.read(answer["bytes"])
        finally:
            watch.cancel()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


class MediaMaker:
    """A maker of thumbnails, pictures and clips that every browser shows.

    Args:
      clips: The data set.
      cache: Folder of what was made.
      max_bytes: Limit of that folder.
      processes: Number of decoding processes.
    """

    def __init__(self, clips: StoredClips, cache: Path, *, max_bytes: int, processes: int):
        self._clips, self._cache = clips, MediaCache(cache, max_bytes)
        self._threads = ThreadPoolExecutor(processes, "media")
        self._decoders = [_DecoderProcess() for _ in range(processes)]
        self._idle: queue.SimpleQueue[_DecoderProcess] = queue.SimpleQueue()
        for decoder in self._decoders:
            self._idle.put(decoder)

    def start(self) -> None:
        """Start the processes, which otherwise start when they are first needed."""
        for decoder in self._decoders:
            decoder.start()

    def make(self, task: str, row: int) -> "Future[bytes]":
        """Return the future content of a `thumbnail`, `picture` or `clip`.

        Its exceptions: MissingError if the row has no clip, UserError if that cannot be read or decoded.
        """
        return self._threads.submit(self._make, task, row)

    def _make(self, task: str, row: int) -> bytes:
        table = self._clips.table
        payload = table.arrow("payload")[row].as_py()
        if not payload:
            raise MissingError(f"row {row} has no clip, as it was left out.")
        if (stored := self._cache.read(f"{task} {payload}")) is not None:
            return stored
        middle, encoded = (table.arrow("seconds")[row].as_py() or 0.0) / 2, self._clips.read(row)
        decoder = self._idle.get()  # there are as many as threads
        try:
            content = decoder.run(task, encoded, middle)
        finally:
            self._idle.put(decoder)
        self._cache.write(f"{task} {payload}", content)
        return content

    def close(self) -> None:
        """End the processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for decoder in self._decoders:
            decoder.close()
