"""Pictures in HEIF files (HEIC, AVIF), decoded by Pillow, for HEIC with the package pillow-heif.

ffmpeg gives their tiles and their transparency one by one, with the padding of tiles, and without rotation.
"""

import contextlib
import io

import av
import numpy as np
from PIL import Image, ImageOps

from dit_video.core.errors import DecodeError
from dit_video.video.icc import convert_to_srgb

_BRANDS = {b"avif": "avif"} | dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"mif1"), "heic")
"""Kinds of pictures by the brand with which a file begins (ISO/IEC 23008-12); sequences have others."""


def find_heif_kind(head: bytes) -> str:
    """Return "avif" or "heic" for a picture, by the first 12 bytes of its file; empty for any other file."""
    return _BRANDS.get(head[8:12], "") if head[4:8] == b"ftyp" else ""


def read_heif(content: bytes, name: str, max_pixels: int) -> av.VideoFrame:
    """Return the whole picture, upright and in sRGB.

    Raises:
      DecodeError: it is too large, or a package is not installed.
      OSError: it is damaged.
    """
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    formats: list[str] = [format for format in ("AVIF", "HEIF") if format in Image.OPEN]
    if find_heif_kind(content) == "heic" and "HEIF" not in formats:
        raise DecodeError(
            f"{name} is HEIC, which needs a package that is not installed: pip install pillow-heif, or convert it"
        )
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            if image.width * image.height > max_pixels:
                size = f"{image.height}x{image.width}"
                raise DecodeError(f"{name} has {size} pixels, over the limit of {max_pixels}; make it smaller")
            profile, format = image.info.get("icc_profile"), "rgba" if image.has_transparency_data else "rgb24"
            picture = np.array(ImageOps.exif_transpose(image).convert("RGBA" if format == "rgba" else "RGB"))
    except (RuntimeError, SyntaxError) as error:  # of Pillow's plugins
        raise OSError(str(error)) from error
    if profile:
        picture[..., :3] = convert_to_srgb(picture[..., :3], profile)
    return av.VideoFrame.from_ndarray(picture, format=format)
