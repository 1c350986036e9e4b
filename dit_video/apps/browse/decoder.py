"""Decoding of clips in a process of its own, which a damaged or hostile file may crash or fill.

    python -m dit_video.apps.browse.decoder

reads a line of JSON, `{"task": …, "seconds": …, "bytes": …}`, and so many bytes of a file; it answers with a line
`{"bytes": …}`, and so many bytes of a picture or clip, or with `{"error": …}`, until its input ends.
"""

import io
import json
import os
import resource
import sys

from PIL import Image

from dit_video.core.errors import UserError
from dit_video.video import decode
from dit_video.video.transcode import transcode

MAX_MEMORY = 4 << 30
"""Bytes of address space that the process may take."""
THUMBNAIL_HEIGHT, _MAX_THUMBNAIL_WIDTH = 216, 512
"""Size of thumbnails: twice that of the page's tiles, for dense screens."""
_QUALITY, _CRF = 80, 20


def main() -> None:
    """Answer requests until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    os.nice(10)  # rows come before their pictures
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    while line := requests.readline():
        request = json.loads(line)
        content, result = requests.read(request["bytes"]), b""
        head: dict[str, int | str]
        try:
            result = TASKS[request["task"]](content, request["seconds"])
            head = {"bytes": len(result)}
        except UserError as error:
            head = {"error": str(error)}
        except MemoryError:
            head = {"error": "the clip takes too much memory to be decoded"}
        answers.write(json.dumps(head).encode() + b"\n" + result)
        answers.flush()


def make_thumbnail(content: bytes, seconds: float) -> bytes:
    """Return a WebP picture of the frame that is shown at a time."""
    return _encode_webp(content, seconds, THUMBNAIL_HEIGHT, _MAX_THUMBNAIL_WIDTH)


def make_picture(content: bytes, seconds: float) -> bytes:
    """Return a WebP picture of the frame that is shown at a time, as large as a screen at most."""
    return _encode_webp(content, seconds, 2160, 3840)


def make_clip(content: bytes, seconds: float) -> bytes:
    """Return an mp4 that every browser plays."""
    return transcode(content, crf=_CRF)


TASKS = {"thumbnail": make_thumbnail, "picture": make_picture, "clip": make_clip}


def _encode_webp(content: bytes, seconds: float, height: int, width: int) -> bytes:
    try:
        clip = decode(content, frames=1, start=seconds)
    except UserError:  # another length than the table says, or damage before that time
        clip = decode(content, frames=1)
    picture, file = Image.fromarray(clip.frames[0]), io.BytesIO()
    picture.thumbnail((width, height), Image.Resampling.LANCZOS)
    picture.save(file, "WEBP", quality=_QUALITY, method=2)
    return file.getvalue()


if __name__ == "__main__":
    main()
