"""Comments in video and image files, which hold recipes and captions of clips."""

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dit_video.core.errors import MissingError
from dit_video.video.reader import Video
from dit_video.video.webp import find_webp_comment

KEY = "comment"
"""Name of the comment in containers and in PNG chunks."""
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_END_BYTES = 12
_MAX_BLOCK = 255
"""Bytes of a block of a GIF comment."""
_JPEG_COMMENT = b"\xff\xfe"
_MAX_SEGMENT = 0xFFFF - 2
"""Bytes of a segment of a JPEG comment."""


def format_comment(recipe: Mapping[str, Any], caption: str) -> str:
    """Return a clip's recipe, and its caption if that is not the recipe's prompt, as a comment; empty for neither."""
    if not recipe and not caption:
        return ""
    document: dict[str, Any] = {"dit_video": recipe}
    if caption != recipe.get("prompt", ""):
        document["caption"] = caption
    return json.dumps(document, ensure_ascii=True, separators=(",", ":"))


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
    with Video(path) as video:
        return _read_document(video).get("dit_video", {})


def read_caption(video: Video) -> str:
    """Return the caption of the clip in an open file, or the prompt of its recipe; empty if the file has neither."""
    document = _read_document(video)
    caption = document.get("caption", document.get("dit_video", {}).get("prompt", ""))
    return caption if isinstance(caption, str) else ""


def _read_document(video: Video) -> dict[str, Any]:
    """Return the JSON values of `format_comment`; empty if there are none, or the comment is another program's."""
    try:
        document = json.loads(_find_comment(video))
    except (ValueError, RecursionError, struct.error):
        return {}
    return document if isinstance(document, dict) and isinstance(document.get("dit_video"), dict) else {}


def _find_comment(video: Video) -> str:
    for start, signature, find in _FINDERS:
        if video.head[start:].startswith(signature):
            return find(video.read_content())
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


_FINDERS: tuple[tuple[int, bytes, Callable[[bytes], str]], ...] = (
    (0, _PNG_SIGNATURE, _find_png_comment),
    (0, b"GIF", _find_gif_comment),
    (8, b"WEBP", find_webp_comment),
    (0, b"\xff\xd8", _find_jpeg_comment),
)
"""Positions and bytes with which files of images begin, and what finds their comments."""
