"""The colour behind transparent pixels: a given one, or that which a file names."""

import struct

import numpy as np
from jaxtyping import UInt8
from PIL import ImageColor

from dit_video.core.errors import UserError
from dit_video.video.webp import find_webp_background

Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""
BLACK: Colour = (0, 0, 0)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def parse_colour(text: str) -> Colour:
    """Return a colour that is written as in CSS, such as `white` or `#f2f2f2`.

    Raises:
      UserError: If the text is no such colour, or a transparent one.
    """
    try:
        colour = ImageColor.getrgb(text)
    except ValueError:
        colour = None
    if colour is None or len(colour) != 3:
        raise UserError(f"background={text!r} is invalid: it is no opaque colour. Use one such as white or #f2f2f2.")
    return colour


def read_file_background(content: bytes) -> Colour | None:
    """Return the background colour that a GIF, PNG, APNG or WebP file names; None if it names none."""
    if content.startswith(b"RIFF"):
        return find_webp_background(content)
    if content.startswith(b"GIF8") and content[10] & 0x80:  # a table of colours for all frames
        return _get_palette_colour(content[13 : 13 + (6 << (content[10] & 7))], content[11])
    return _read_png_background(content) if content.startswith(_PNG_SIGNATURE) else None


def blend(image: UInt8[np.ndarray, "H W 4"], background: Colour = BLACK) -> UInt8[np.ndarray, "H W 3"]:
    """Return straight RGBA over a colour, rounded to nearest, as ffmpeg's overlay does."""
    colours, alpha = image[..., :3], image[..., 3:]
    if alpha.min() == 255:
        return colours
    product = colours.astype(np.uint16) * alpha + np.uint16(128)
    if background != BLACK:
        product += np.asarray(background, np.uint16) * (255 - alpha)
    return ((product + (product >> 8)) >> 8).astype(np.uint8)  # an exact rounded division by 255


def _read_png_background(content: bytes) -> Colour | None:
    """Return the colour of the chunk bKGD (PNG, third edition, 11.3.4.1)."""
    start, depth, palette = len(_PNG_SIGNATURE), 8, b""
    while start + 8 <= len(content):
        length, name = struct.unpack(">I4s", content[start : start + 8])
        data = content[start + 8 : start + 8 + length]
        start += 12 + length
        if name == b"IHDR":
            depth = data[8]
        elif name == b"PLTE":
            palette = data
        elif name == b"bKGD":
            if len(data) == 1:
                return _get_palette_colour(palette, data[0])
            levels = [value * 255 // ((1 << depth) - 1) for value in struct.unpack(f">{len(data) // 2}H", data)]
            red, green, blue = levels * 3 if len(levels) == 1 else levels
            return red, green, blue
        elif name == b"IDAT":
            break
    return None


def _get_palette_colour(palette: bytes, number: int) -> Colour | None:
    if len(palette) < 3 * number + 3:
        return None
    red, green, blue = palette[3 * number : 3 * number + 3]
    return red, green, blue
