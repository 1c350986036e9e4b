"""Pixel values: uint8 in files, float32 in [-1, 1] in models."""

import numpy as np
from jaxtyping import Float, Float32, UInt8

from dit_video.core.errors import UserError
from dit_video.core.typing import SameArray


def to_float(frames: UInt8[SameArray, "*batch H W 3"]) -> Float32[SameArray, "*batch H W 3"]:
    """Convert 0..255 to [-1, 1]."""
    return frames.astype(np.float32) * np.float32(2 / 255) - np.float32(1)


def to_uint8(pixels: Float[np.ndarray, "*batch H W 3"]) -> UInt8[np.ndarray, "*batch H W 3"]:
    """Convert [-1, 1] to 0..255, rounded to nearest and clipped.

    Raises:
      UserError: If a value is NaN.
    """
    if count := int(np.isnan(pixels).sum()):
        raise UserError(f"{count} of {pixels.size} pixel values are NaN; check the model and its inputs")
    return np.clip(np.rint((np.asarray(pixels, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)
