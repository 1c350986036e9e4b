"""Comments in video and image files, which hold recipes of clips."""

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_video.core.errors import DecodeError, MissingError
from dit_video.video.reader import Video
from dit_video.video.webp import find_webp_comment

_IMAGE_SUFFIXES = (".png", ".apng", ".gif", ".webp", ".jpg")
KEY = "comment"
"""Name of the comment in containers and in PNG chunks."""
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_END_BYTES = 12
_MAX_BLOCK = 255
"""Bytes of a block of a GIF comment."""
_JPEG_COMMENT = b"\xff\xfe"
_MAX_SEGMENT = 0xFFFF - 2
"""Bytes of a segment of a JPEG comment."""


def format_recipe(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as the text of a comment."""
    return json.dumps({"dit_video": recipe}, ensure_ascii=True, separators=(",", ":"))


def add_png_comment(content: bytes, text: str) -> bytes:
    """Return a PNG or APNG file with a comment at its end: ffmpeg must find early that it is an animation."""
    data = KEY.encode() + b"\0" + text.encode("latin-1")
    chunk = b"tEXt" + data
    comment = struct.pack(">I", len(data)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content[:-_PNG_END_BYTES] + comment + content[-_PNG_END_BYTES:]


def add_gif_comment(content: bytes, text: str) -> bytes:
    """Return a GIF file with a comment at its end."""
    data = text.encode("latin-1")
    blocks = (data[start : start + _MAX_BLOCK] for start in range(0, len(data), _MAX_BLOCK))
    comment = b"\x21\xfe" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"
    return content[:-1] + comment + content[-1:]


def add_jpeg_comment(content: bytes, text: str) -> bytes:
    """Return a JPEG file with a comment before everything else."""
    data = text.encode("latin-1")
    parts = (data[start : start + _MAX_SEGMENT] for start in range(0, len(data), _MAX_SEGMENT))
    comment = b"".join(_JPEG_COMMENT + struct.pack(">H", len(part) + 2) + part for part in parts)
    return content[:2] + comment + content[2:]


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Return how the clip in a file was made, as `Clip.recipe`; empty if the file does not say.

    Raises:
      MissingError: If the file does not exist.
      DecodeError: If the file is no video or image.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"no such file: {path}")
    try:
        text = _read_comment(path)
    except struct.error as error:
        raise DecodeError(f"{path} is no video or image ({error})") from error
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return document["dit_video"] if isinstance(document, dict) and "dit_video" in document else {}


def _read_comment(path: Path) -> str:
    content = path.read_bytes() if path.suffix.lower() in _IMAGE_SUFFIXES else b""
    if content.startswith(_PNG_SIGNATURE):
        return _find_png_comment(content)
    if content.startswith(b"GIF"):
        return _find_gif_comment(content)
    if content.startswith(b"RIFF"):
        return find_webp_comment(content)
    if content.startswith(b"\xff\xd8"):
        return _find_jpeg_comment(content)
    with Video(path) as video:
        return {name.lower(): text for name, text in video.metadata.items()}.get(KEY, "")


def _find_png_comment(content: bytes) -> str:
    start = len(_PNG_SIGNATURE)
    while start + 12 <= len(content):
        (length,) = struct.unpack(">I", content[start : start + 4])
        data = content[start + 8 : start + 8 + length]
        if content[start + 4 : start + 8] == b"tEXt" and data.startswith(KEY.encode() + b"\0"):
            return data[len(KEY) + 1 :].decode("latin-1")
        start += 12 + length
    return ""


def _find_gif_comment(content: bytes) -> str:
    """Return the comment that ends the file."""
    start = content.rfind(b"\x21\xfe")
    if start < 0:
        return ""
    data, start = b"", start + 2
    while start < len(content) and content[start]:
        data += content[start + 1 : start + 1 + content[start]]
        start += 1 + content[start]
    return data.decode("latin-1")


def _find_jpeg_comment(content: bytes) -> str:
    """Return the comment that begins the file."""
    data, start = b"", 2
    while content[start : start + 2] == _JPEG_COMMENT:
        (length,) = struct.unpack(">H", content[start + 2 : start + 4])
        data += content[start + 4 : start + 2 + length]
        start += 2 + length
    return data.decode("latin-1")
