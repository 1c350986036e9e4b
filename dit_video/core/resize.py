"""Resizing of pictures in NumPy."""

import functools
import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8


def resize(frames: UInt8[np.ndarray, "T H W 3"], height: int, width: int) -> UInt8[np.ndarray, "T h w 3"]:
    """Resize by an anti-aliased triangle filter (bilinear; when shrinking, its support grows with the scale)."""
    if frames.shape[1:3] == (height, width):
        return frames
    source_height, source_width = frames.shape[1:3]
    rows, columns = _make_bands(source_height, height, 1), _make_bands(source_width, width, 3)
    rows_first = height * source_width <= source_height * width  # leaves fewer pixels for the second axis
    resized = np.empty((len(frames), height, width, 3), np.uint8)
    for frame, result in zip(frames, resized, strict=True):
        picture = frame.reshape(source_height, source_width * 3).astype(np.float32)
        if rows_first:
            picture = _apply(columns, _apply(rows, picture).T).T
        else:
            picture = _apply(rows, _apply(columns, picture.T).T)
        # Nothing to clip: weights are positive and sum to one.
        result[...] = np.rint(picture, out=picture).reshape(height, width, 3)
    return resized


def resize_and_crop(frames: UInt8[np.ndarray, "T H W 3"], height: int, width: int) -> UInt8[np.ndarray, "T h w 3"]:
    """Resize frames to cover a height and width, and crop the excess equally on both sides.

    The aspect ratio is kept to within one pixel. diffusers' pipelines crop the last image of Wan's clips in this way.
    """
    source_height, source_width = frames.shape[1:3]
    covering = compute_covering_size(source_height, source_width, height, width)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return resize(frames, *covering)[:, top : top + height, left : left + width]


def compute_covering_size(source_height: int, source_width: int, height: int, width: int) -> tuple[int, int]:
    """Return the height and width of a picture resized, at its own aspect ratio, to cover the given ones."""
    scale = max(height / source_height, width / source_width)
    return max(height, round(source_height * scale)), max(width, round(source_width * scale))


def compute_short_side_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Return the height and width of a picture resized to this shorter side, as torchvision's `Resize` does."""
    scaled = int(side * max(height, width) / min(height, width))
    return (scaled, side) if width <= height else (side, scaled)


def compute_fitted_size(height: int, width: int, *, area: int, multiple: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width with a picture's aspect ratio and about this area, rounded down to multiples.

    diffusers' examples of Wan's image-to-video sample an image at this size.
    """
    sides = math.sqrt(area * height / width), math.sqrt(area * width / height)
    height, width = (max(step, round(side) // step * step) for side, step in zip(sides, multiple, strict=True))
    return height, width


_CUBIC = -0.75
"""Coefficient of PyTorch's bicubic interpolation."""


@functools.lru_cache(maxsize=64)
def make_bicubic_matrix(source: int, target: int, scale: float | None = None) -> Float32[np.ndarray, "target source"]:
    """Return the matrix of PyTorch's bicubic interpolation along an axis, without antialiasing or aligned corners.

    Args:
      source, target: Numbers of values before and after.
      scale: Factor between the coordinates; `target / source` by default.
    """
    centres = (np.arange(target) + 0.5) / (target / source if scale is None else scale) - 0.5
    matrix = np.zeros((target, source))
    for offset in range(-1, 3):
        places = np.floor(centres) + offset
        distance = np.abs(centres - places)
        near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
        far = ((distance - 5) * distance + 8) * distance * _CUBIC - 4 * _CUBIC
        weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
        np.add.at(matrix, (np.arange(target), np.clip(places, 0, source - 1).astype(int)), weights)
    return matrix.astype(np.float32)


class _Band(NamedTuple):
    """Some rows of a resize matrix, limited to the columns between their first and last weight."""

    outputs: slice
    inputs: slice
    weights: Float32[np.ndarray, "o i"]


_BAND_SIZE = 4
"""Number of a band's outputs; more outputs would leave more of its weights zero."""
_MAX_PRODUCTS = 1 << 18
"""Largest number of multiplications in one matrix product.  OpenBLAS divides larger products among threads
(interface/gemm.c). These take 20 to 200 times as long, measured, while another computation uses the same cores."""


@functools.lru_cache(maxsize=64)
def _make_bands(source: int, target: int, channels: int) -> tuple[_Band, ...]:
    """Return a one-dimensional resize of points with `channels` values each: for a frame's rows (1) or columns (3)."""
    weights, bands = _make_weights(source, target), []
    order: Literal["C", "F"] = "C" if channels == 1 else "F"  # matches the frames, whose columns come transposed
    for start in range(0, target, _BAND_SIZE):
        part = weights[start : start + _BAND_SIZE]
        nonzero = np.flatnonzero(part.any(axis=0)).tolist()
        first, stop = nonzero[0], nonzero[-1] + 1
        bands.append(
            _Band(
                slice(start * channels, (start + len(part)) * channels),
                slice(first * channels, stop * channels),
                np.asarray(np.kron(part[:, first:stop], np.eye(channels, dtype=np.float32)), order=order),
            )
        )
    return tuple(bands)


def _apply(bands: tuple[_Band, ...], values: Float32[np.ndarray, "I X"]) -> Float32[np.ndarray, "O X"]:
    """Resize the first axis. The result has the memory layout of `values`, so that a transposed frame is not copied."""
    result = np.empty_like(values, shape=(bands[-1].outputs.stop, values.shape[1]))
    step = max(1, _MAX_PRODUCTS // max(band.weights.size for band in bands))
    for start in range(0, values.shape[1], step):
        strip = slice(start, start + step)
        for outputs, inputs, weights in bands:
            np.matmul(weights, values[inputs, strip], out=result[outputs, strip])
    return result


def _make_weights(source: int, target: int) -> Float32[np.ndarray, "target source"]:
    """Return the matrix of a one-dimensional resize; every row sums to one."""
    scale = source / target
    centres = (np.arange(target) + 0.5) * scale - 0.5
    distance = np.abs(centres[:, None] - np.arange(source)[None]) / max(scale, 1.0)
    weights = np.maximum(0.0, 1.0 - distance)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
