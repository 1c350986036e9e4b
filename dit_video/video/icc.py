"""Colour profiles (ICC) of pictures, such as Display P3 of phones, converted to sRGB."""

import functools
import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms


def convert_to_srgb(picture: UInt8[np.ndarray, "H W 3"], profile: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """Return a picture in sRGB; unchanged if its profile is sRGB, is not one of RGB, or is damaged."""
    transform = _make_transform(profile)
    if transform is None:
        return picture
    return np.array(ImageCms.applyTransform(Image.fromarray(np.ascontiguousarray(picture)), transform))


@functools.lru_cache(maxsize=8)
def _make_transform(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != "RGB" or "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), "RGB", "RGB")
    except (OSError, ImageCms.PyCMSError):
        return None
