"""Check of the header of mp4 and mov files before ffmpeg allocates memory for it."""

from collections.abc import Iterator
from io import BytesIO, FileIO
from typing import NamedTuple

from dit_video.core.errors import DecodeError

_MAX_BOXES = 100_000
"""Maximum number of boxes read inside another: enough for hours of fragmented video, and read at once."""


class _Box(NamedTuple):
    kind: bytes
    start: int
    """Offset of the box's content."""
    stop: int
    """Offset of the end of the box."""


def check_mp4_header(file: BytesIO | FileIO, name: str) -> None:
    """Raise `DecodeError` if a video track claims more frames of one size than the file has bytes for.

    A few bytes of header can claim any number of frames of one size, and ffmpeg keeps an entry of tens of bytes for
    each: up to two gigabytes and half a minute (ISO/IEC 14496-12, 8.7.3). The file is left at its beginning.
    """
    length = file.seek(0, 2)
    file.seek(4)
    if file.read(4) in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        for track in _find_boxes(file, _Box(b"", 0, length), b"moov", b"trak", b"mdia"):
            handlers = [_read_content(file, box, 12) for box in _read_boxes(file, track) if box.kind == b"hdlr"]
            if any(handler[8:] == b"vide" for handler in handlers):
                for box in _find_boxes(file, track, b"minf", b"stbl", b"stsz"):
                    content = _read_content(file, box, 12)
                    size, count = int.from_bytes(content[4:8], "big"), int.from_bytes(content[8:12], "big")
                    if size * count > length:
                        raise DecodeError(
                            f"{name} claims {count} frames of {size} bytes in {length} bytes; remove it or replace it"
                        )
    file.seek(0)


def _find_boxes(file: BytesIO | FileIO, box: _Box, *path: bytes) -> Iterator[_Box]:
    if not path:
        yield box
        return
    for inner in _read_boxes(file, box):
        if inner.kind == path[0]:
            yield from _find_boxes(file, inner, *path[1:])


def _read_boxes(file: BytesIO | FileIO, outer: _Box) -> Iterator[_Box]:
    offset = outer.start
    for _ in range(_MAX_BOXES):
        if offset + 8 > outer.stop:
            return
        file.seek(offset)
        header = file.read(16)
        size, start = int.from_bytes(header[:4], "big"), offset + 8
        if size == 1:
            size, start = int.from_bytes(header[8:16], "big"), offset + 16
        stop = outer.stop if size == 0 else min(offset + size, outer.stop)
        if stop < start:
            return
        yield _Box(header[4:8], start, stop)
        offset = stop


def _read_content(file: BytesIO | FileIO, box: _Box, count: int) -> bytes:
    file.seek(box.start)
    return file.read(min(count, box.stop - box.start))
