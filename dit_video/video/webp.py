"""WebP files (RFC 9649).

Pillow encodes and decodes the pictures: ffmpeg reads no animations, and libwebp's encoder of animations merges frames
that are equal.
"""

import io
import struct
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dit_video.core.errors import UserError
from dit_video.video.colours import convert_to_srgb

MAX_SIDE = 16_383
"""Maximum height and width in pixels."""
_QUALITY = 95
"""Quality of lossy pictures, 0 to 100 (best): no visible loss."""
_HEADER_BYTES = 12
_ANIMATION = 0x02
"""Flag of the chunk VP8X."""
_NO_BLENDING = 0x02
"""Flag of the chunk ANMF: a frame replaces the one before."""
_UNTIMED_MILLISECONDS = 100
"""Time of a frame whose duration is zero, as in browsers."""


def encode_webp(
    frames: UInt8[np.ndarray, "T H W 3"], fps: float | int, *, lossless: bool = False, comment: str = ""
) -> bytes:
    """Return a WebP file with a comment; several frames are an animation that loops, timed in whole milliseconds.

    The comment is RIFF's own, as in WAV and AVI.

    Raises:
      UserError: If a frame is too large.
    """
    count, height, width, _ = frames.shape
    if max(height, width) > MAX_SIDE:
        raise UserError(
            f"frames of {height}x{width} are invalid for webp: use at most {MAX_SIDE} pixels a side, or write .apng"
        )
    size = _pack_24_bits(width - 1, height - 1)
    pictures = (_encode_picture(frame, lossless=lossless) for frame in frames)
    if count == 1:
        chunks = list(pictures)
    else:
        times = [round(number * 1000 / fps) for number in range(count + 1)]
        chunks = [_make_chunk(b"ANIM", bytes(6))]
        for number, picture in enumerate(pictures):
            frame_header = bytes(6) + size + _pack_24_bits(times[number + 1] - times[number]) + bytes([_NO_BLENDING])
            chunks.append(_make_chunk(b"ANMF", frame_header + picture))
    if comment:
        chunks.append(_make_chunk(b"LIST", b"INFO" + _make_chunk(b"ICMT", comment.encode("latin-1"))))
    header = _make_chunk(b"VP8X", bytes([_ANIMATION if count > 1 else 0, 0, 0, 0]) + size)
    return _make_chunk(b"RIFF", b"WEBP" + header + b"".join(chunks))


def find_webp_comment(content: bytes) -> str:
    """Return the comment of a WebP file; empty if it has none."""
    lists = (data for name, data in _read_chunks(content) if name == b"LIST")
    comments = (text for data in lists for name, text in _read_chunks(data, start=4) if name == b"ICMT")
    return next(comments, b"").decode("latin-1")


def find_webp_background(content: bytes) -> tuple[int, int, int] | None:
    """Return the background colour that an animation names; None if it names none, or a transparent one."""
    data = next((data for name, data in _read_chunks(content) if name == b"ANIM"), b"")
    return (data[2], data[1], data[0]) if len(data) >= 4 and data[3] else None


def is_animated_webp(head: bytes) -> bool:
    """Return whether a file is an animated WebP, by its first 21 bytes."""
    return head[8:16] == b"WEBPVP8X" and bool(head[20:21]) and bool(head[20] & _ANIMATION)


class AnimatedWebp:
    """An animated WebP file; iterating decodes its frames. Its size and durations are what its headers claim."""

    def __init__(self, content: bytes):
        self._content = content
        chunks = list(_read_chunks(content))
        header = chunks[0][1]
        self.width, self.height = _read_24_bits(header, 4) + 1, _read_24_bits(header, 7) + 1
        self.milliseconds = tuple(
            _read_24_bits(data, 12) or _UNTIMED_MILLISECONDS for name, data in chunks if name == b"ANMF"
        )
        """Duration of each frame."""

    def __iter__(self) -> Iterator[av.VideoFrame]:
        """Yield the frames, whole and in sRGB, with their times.

        Raises:
          OSError, EOFError: If the file is damaged.
        """
        with Image.open(io.BytesIO(self._content), formats=["WEBP"]) as image:
            start = 0
            for number, duration in enumerate(self.milliseconds):
                image.seek(number)
                picture = np.array(image)
                if profile := image.info.get("icc_profile"):
                    picture[..., :3] = convert_to_srgb(picture[..., :3], profile)
                frame = av.VideoFrame.from_ndarray(picture, format={"RGB": "rgb24", "RGBA": "rgba"}[image.mode])
                frame.pts, frame.duration, frame.time_base = start, duration, Fraction(1, 1000)
                start += duration
                yield frame


def _encode_picture(picture: UInt8[np.ndarray, "H W 3"], *, lossless: bool) -> bytes:
    """Return the chunk of a picture."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, "WEBP", lossless=lossless, quality=_QUALITY)
    return file.getvalue()[_HEADER_BYTES:]


def _make_chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def _read_chunks(content: bytes, *, start: int = _HEADER_BYTES) -> Iterator[tuple[bytes, bytes]]:
    """Yield the names and the data of chunks that follow each other."""
    while start + 8 <= len(content):
        (length,) = struct.unpack("<I", content[start + 4 : start + 8])
        yield content[start : start + 4], content[start + 8 : start + 8 + length]
        start += 8 + length + length % 2


def _pack_24_bits(*values: int) -> bytes:
    return b"".join(value.to_bytes(3, "little") for value in values)


def _read_24_bits(data: bytes, start: int) -> int:
    return int.from_bytes(data[start : start + 3], "little")
