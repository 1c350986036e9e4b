"""Pixels: uint8 in files, float32 in [-1, 1] in models."""

import numpy as np
from jaxtyping import Float, Float32, UInt8


def to_float(frames: UInt8[np.ndarray, "*batch H W 3"]) -> Float32[np.ndarray, "*batch H W 3"]:
    """0..255 to [-1, 1]."""
    return frames.astype(np.float32) * np.float32(2 / 255) - np.float32(1)


def to_uint8(pixels: Float[np.ndarray, "*batch H W 3"]) -> UInt8[np.ndarray, "*batch H W 3"]:
    """[-1, 1] to 0..255, rounded to nearest and clipped."""
    return np.clip(np.rint((np.asarray(pixels, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def resize(frames: UInt8[np.ndarray, "T H W 3"], height: int, width: int) -> UInt8[np.ndarray, "T h w 3"]:
    """Resize by an anti-aliased triangle filter (bilinear; when shrinking, its support grows with the scale)."""
    if frames.shape[1:3] == (height, width):
        return frames
    rows, columns = _weights(frames.shape[1], height), _weights(frames.shape[2], width)
    pixels = np.einsum("hH,THWc->ThWc", rows, frames.astype(np.float32), optimize=True)
    pixels = np.einsum("wW,ThWc->Thwc", columns, pixels, optimize=True)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _weights(source: int, target: int) -> Float32[np.ndarray, "target source"]:
    """The matrix of a one-dimensional resize; every row sums to one."""
    scale = source / target
    centres = (np.arange(target) + 0.5) * scale - 0.5
    distance = np.abs(centres[:, None] - np.arange(source)[None]) / max(scale, 1.0)
    weights = np.maximum(0.0, 1.0 - distance)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
