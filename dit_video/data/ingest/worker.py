"""Worker process of `workers`: `python -m dit_video.data.ingest.worker` inspects clips that it reads from stdin.

The protocol is one JSON value a line: first an `InspectionConfig`, then clips; each clip is answered by one line.
"""

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterable
from typing import Any, BinaryIO

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.data.ingest.formats import ListedClip
from dit_video.data.ingest.inspection import inspect


def serve(requests: Iterable[bytes], answers: BinaryIO) -> None:
    """Answer every clip with its verdict, or with the error that ends the run."""
    requests = iter(requests)
    config = config_json.from_json(json.loads(next(requests)))
    _write_answer(answers, {"ready": True})
    for line in requests:
        name, captions, *location = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = {"inspected": inspect(ListedClip(name, tuple(captions), *location), config).to_json()}
        except UserError as error:
            answer = {"error": str(error)}
        _write_answer(answers, answer)


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
    # Output that a decoder prints is sent to stderr, as it must not appear between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(_read_lines(sys.stdin.buffer), answers)


if __name__ == "__main__":
    main()
