"""Animations written chunk by chunk, of parts that are blended and disposed of, with the frames that a viewer shows."""

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Disposal = Literal["keep", "clear", "restore"]
AnimationFormat = Literal["gif", "apng", "webp"]
_DISPOSALS = {"gif": {"keep": 1, "clear": 2, "restore": 3}, "apng": {"keep": 0, "clear": 1, "restore": 2}}


class Part(NamedTuple):
    """A picture that is drawn on the canvas."""

    picture: UInt8[np.ndarray, "h w 4"]
    top: int = 0
    left: int = 0
    milliseconds: int = 100
    disposal: Disposal = "keep"
    """What becomes of it before the next one is drawn."""
    is_blended: bool = True
    """Whether it is blended over the canvas, which GIF always does, or replaces it."""


def compose(parts: Sequence[Part], height: int, width: int) -> UInt8[np.ndarray, "T height width 4"]:
    """Return the frames that a viewer shows, with straight alpha."""
    canvas, frames = np.zeros((height, width, 4)), []
    for part in parts:
        before = canvas.copy()
        h, w = part.picture.shape[:2]
        area = np.s_[part.top : part.top + h, part.left : part.left + w]
        new, old = part.picture / 255, canvas[area]
        alpha, below = new[..., 3:], old[..., 3:] * (1 - new[..., 3:])
        total = alpha + below
        colours = (new[..., :3] * alpha + old[..., :3] * below) / np.where(total, total, 1)
        canvas[area] = np.concatenate([colours, total], -1) if part.is_blended else new
        frames.append(np.rint(canvas * 255).astype(np.uint8))
        if part.disposal == "clear":
            canvas[area] = 0
        elif part.disposal == "restore":
            canvas = before
    return np.stack(frames)


def write_animation(
    format: AnimationFormat, parts: Sequence[Part], height: int, width: int, *, hidden: Part | None = None
) -> bytes:
    """Return a file of these parts; viewers of animations do not show the part `hidden` of an APNG."""
    if format == "apng":
        return _write_apng(parts, height, width, hidden)
    assert hidden is None
    return {"gif": _write_gif, "webp": _write_webp}[format](parts, height, width)


def _write_gif(parts: Sequence[Part], height: int, width: int) -> bytes:
    """GIF89a; pixels are opaque or transparent, and a part has at most 255 colours."""
    content = b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0)
    for part in parts:
        h, w = part.picture.shape[:2]
        colours, numbers = np.unique(part.picture[..., :3].reshape(-1, 3), axis=0, return_inverse=True)
        numbers = np.where(part.picture[..., 3] > 0, numbers.reshape(h, w), 255).astype(np.uint8)
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(colours)] = colours
        flags = _DISPOSALS["gif"][part.disposal] << 2 | 1
        content += b"!\xf9\x04" + struct.pack("<BHBB", flags, part.milliseconds // 10, 255, 0)
        content += (
            b"," + struct.pack("<HHHHB", part.left, part.top, w, h, 0x87) + palette.tobytes() + _encode_lzw(numbers)
        )
    return content + b";"


def _encode_lzw(numbers: UInt8[np.ndarray, "h w"]) -> bytes:
    """Codes of nine bits, with a clear code before the table would grow."""
    codes: list[int] = []
    for position, number in enumerate(numbers.ravel().tolist()):
        codes += [256, number] if position % 200 == 0 else [number]
    bits = sum(code << 9 * position for position, code in enumerate([*codes, 257]))
    data = bits.to_bytes((9 * (len(codes) + 1) + 7) // 8, "little")
    blocks = [data[start : start + 255] for start in range(0, len(data), 255)]
    return b"\x08" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


def _write_apng(parts: Sequence[Part], height: int, width: int, hidden: Part | None) -> bytes:
    """PNG, third edition."""
    chunks = [_make_png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))]
    chunks.append(_make_png_chunk(b"acTL", struct.pack(">II", len(parts), 0)))
    if hidden is not None:
        chunks.append(_make_png_chunk(b"IDAT", _deflate(hidden.picture)))
    number = 0
    for index, part in enumerate(parts):
        h, w = part.picture.shape[:2]
        control = (number, w, h, part.left, part.top, part.milliseconds, 1000, _DISPOSALS["apng"][part.disposal])
        chunks.append(_make_png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", *control, part.is_blended)))
        number += 1
        if index == 0 and hidden is None:
            chunks.append(_make_png_chunk(b"IDAT", _deflate(part.picture)))
        else:
            chunks.append(_make_png_chunk(b"fdAT", struct.pack(">I", number) + _deflate(part.picture)))
            number += 1
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + _make_png_chunk(b"IEND", b"")


def _deflate(picture: UInt8[np.ndarray, "h w 4"]) -> bytes:
    return zlib.compress(b"".join(b"\0" + line.tobytes() for line in picture))


def _make_png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _write_webp(parts: Sequence[Part], height: int, width: int) -> bytes:
    """RFC 9649; parts have even places."""
    chunks = [_make_riff_chunk(b"VP8X", b"\x12\0\0\0" + _pack(width - 1, height - 1))]
    chunks.append(_make_riff_chunk(b"ANIM", bytes(6)))
    for part in parts:
        h, w = part.picture.shape[:2]
        assert part.disposal != "restore"
        flags = (0 if part.is_blended else 2) | (part.disposal == "clear")
        header = _pack(part.left // 2, part.top // 2, w - 1, h - 1, part.milliseconds) + bytes([flags])
        file = io.BytesIO()
        Image.fromarray(part.picture).save(file, "WEBP", lossless=True, exact=True)
        chunks.append(_make_riff_chunk(b"ANMF", header + file.getvalue()[12:]))
    return _make_riff_chunk(b"RIFF", b"WEBP" + b"".join(chunks))


def _make_riff_chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def _pack(*values: int) -> bytes:
    return b"".join(value.to_bytes(3, "little") for value in values)
