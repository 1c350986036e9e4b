"""Worker process of `workers`: `python -m dit_video.data.ingest.worker FACTOR` inspects clips, read from stdin.

The protocol is one JSON value a line: first an `InspectionConfig`, then clips; each clip is answered by one line. Lines
before it have the pixels of a file that is opened, from which `workers` computes its time limit.

A file of a few bytes may claim any amount of memory, so the process has limits (`MemoryGuard`); FACTOR multiplies them.
"""

import contextlib
import ctypes
import errno
import json
import os
import queue
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.data.ingest.formats import ListedClip
from dit_video.data.ingest.inspection import Inspection, inspect, make_failure
from dit_video.video.reader import Video

MAX_BYTES = 3 << 30
"""Bytes of address space that one file may take, besides twice its own bytes."""
MAX_OPENING_BYTES = 512 << 20
"""Bytes that opening a file may take, besides eight times its own bytes: ffmpeg's index has 24 bytes a packet."""
MAX_PIXEL_BYTES = 256
"""Bytes that decoding, measuring and encoding take for each pixel of a frame: they hold tens of frames."""
MAX_WRITTEN_BYTES = 4 << 30
MAX_OPEN_FILES = 256
_INHERITED_LIMITS = {
    kind: resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)
}
_NO_NEW_PRIVILEGES = 38  # PR_SET_NO_NEW_PRIVS
_MEMORY_REASON = re.compile(rf"needs more memory|{re.escape(os.strerror(errno.ENOMEM))}")


class MemoryGuard:
    """Limits of this process's memory (Linux), by the file that it reads and the sizes that its header claims.

    Args:
      factor: Factor of the limits.
      report: Function that is called with the pixels of all frames of a file that is opened, as its header claims.
    """

    def __init__(self, factor: int, report: Callable[[int], None]):
        self._factor, self._report = factor, report
        self._base = _read_address_space()
        self._maximum = MAX_BYTES

    def limit_clip(self, length: int) -> None:
        """Set the limit for a clip of so many bytes, to be lowered as more is known."""
        self._maximum = self._base + self._factor * (MAX_BYTES + 2 * length)
        _limit(resource.RLIMIT_AS, self._maximum)

    def limit_opening(self, length: int) -> None:
        """Set the limit for opening a file of so many bytes."""
        self._limit_growth(MAX_OPENING_BYTES + 8 * length)

    def limit_reading(self, length: int, pixels: int, total_pixels: int) -> None:
        """Set the limit for decoding a file, by the pixels of a frame, and report the pixels of all frames."""
        self._limit_growth(self._factor * (MAX_OPENING_BYTES + 8 * length + MAX_PIXEL_BYTES * pixels))
        self._report(total_pixels)

    def _limit_growth(self, growth: int) -> None:
        _limit(resource.RLIMIT_AS, min(self._maximum, _read_address_space() + growth))


def _read_address_space() -> int:
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return 0


def _limit(kind: int, value: int) -> None:
    """Set a limit, up to that with which this process was started."""
    inherited = _INHERITED_LIMITS[kind]
    value = value if inherited == resource.RLIM_INFINITY else min(value, inherited)
    resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def restrict_process() -> None:
    """Restrict what this process may do besides decoding: files that it writes, open files, core dumps, privileges.

    The number of processes is not limited, as the system counts all processes of the user.
    """
    _limit(resource.RLIMIT_FSIZE, MAX_WRITTEN_BYTES)
    _limit(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def serve(requests: Iterable[bytes], answers: BinaryIO, factor: int = 1) -> None:
    """Answer every clip with its verdict, or with the error that ends the run."""
    requests = iter(requests)
    config = config_json.from_json(json.loads(next(requests)))
    guard = MemoryGuard(factor, lambda pixels: _write_answer(answers, {"pixels": pixels}))
    if sys.platform == "linux":
        Video.guard = guard
    _write_answer(answers, {"ready": True})
    for line in requests:
        name, captions, *location = json.loads(line)
        clip = ListedClip(name, tuple(captions), *location)
        answer: dict[str, Any]
        if sys.platform == "linux":
            guard.limit_clip(clip.size)
        try:
            answer = {"inspected": _judge_memory(clip, inspect(clip, config), factor).to_json()}
        except UserError as error:
            answer = {"error": str(error)}
        _write_answer(answers, answer)


def _judge_memory(clip: ListedClip, inspection: Inspection, factor: int) -> Inspection:
    """Return the inspection with a lack of memory as the file's own fault, if it had more than usual."""
    if factor > 1 and inspection.transient and _MEMORY_REASON.search(inspection.reason):
        return make_failure(
            clip, f"{inspection.reason}, also at {factor} times the usual limit", sha256=inspection.sha256
        )
    return inspection


def _write_answer(answers: BinaryIO, value: dict) -> None:
    answers.write(json.dumps(value).encode() + b"\n")
    answers.flush()


def _read_lines(stream: BinaryIO) -> Iterable[bytes]:
    """Yield lines as they arrive, and end this process, even inside a decoder, when the parent process ends."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield lines.get()


def main() -> None:
    """Serve on the standard streams."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent decides
    restrict_process()
    # Output that a decoder prints is sent to stderr, as it must not appear between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(_read_lines(sys.stdin.buffer), answers, *map(int, sys.argv[1:]))


if __name__ == "__main__":
    main()
