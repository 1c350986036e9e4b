"""Measures of single frames, each a pure function of luma in 0..255."""

import functools

import numpy as np
from jaxtyping import Float, Float32, UInt8

from dit_video.data.ingest.screening import Borders

LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue: ITU-R BT.601."""

BLACK_LEVEL, BLACK_PIXELS = 25.5, 0.98
"""A frame is black if this share of its pixels is darker than this level: the defaults of ffmpeg's `blackdetect`."""

MAX_STILL_DIFFERENCE = 0.255
"""Mean difference of luma, in levels, below which two frames are the same: the default (-60 dB) of ffmpeg's
`freezedetect`."""

BORDER_LEVEL, BORDER_PIXELS = 16, 0.99
"""A row or column belongs to a border if this share of its pixels is not brighter than this level."""

MIN_TEXTURE = 2.0
"""Standard deviation of luma, in levels, below which a frame has no hash, as its bits would be noise."""


def luma(picture: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w"]:
    """Return Y' = 0.299 R' + 0.587 G' + 0.114 B', 0..255."""
    return picture.astype(np.float32) @ LUMA_WEIGHTS


def mean_difference(first: Float[np.ndarray, "h w"], second: Float[np.ndarray, "h w"]) -> float:
    """Return mean |Y₁ − Y₂|, in levels of 255."""
    return float(np.abs(first - second).mean(dtype=np.float64))


def is_black(picture: Float[np.ndarray, "h w"]) -> bool:
    """Return whether 98 % of the pixels are darker than a tenth of white."""
    return bool((picture < BLACK_LEVEL).mean() >= BLACK_PIXELS)


def sharpness(picture: Float[np.ndarray, "h w"]) -> float:
    """Return the variance of Y ∗ [0 1 0; 1 −4 1; 0 1 0] inside the frame, in levels².

    Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", ICPR 2000. The value depends on the frame's
    size, so it is always measured on thumbnails of one size.
    """
    centre = picture[1:-1, 1:-1]
    neighbours = picture[:-2, 1:-1] + picture[2:, 1:-1] + picture[1:-1, :-2] + picture[1:-1, 2:]
    return float((neighbours - 4 * centre).var(dtype=np.float64))


def find_borders(picture: UInt8[np.ndarray, "H W"]) -> Borders | None:
    """Return the black bars around a frame, or None if the whole frame is black.

    A row or column is dark if 99 % of its pixels are at most 16 of 255; bars are the dark ones next to the edges.
    Columns are judged between the bars above and below.
    """
    dark = picture <= BORDER_LEVEL
    rows = dark.mean(axis=1) < BORDER_PIXELS
    if not rows.any():
        return None
    top, bottom = int(rows.argmax()), int(rows[::-1].argmax())
    columns = dark[top : len(rows) - bottom].mean(axis=0) < BORDER_PIXELS
    if not columns.any():  # a few bright pixels in an otherwise black frame
        return None
    return Borders(top, bottom, int(columns.argmax()), int(columns[::-1].argmax()))


def perceptual_hash(picture: Float[np.ndarray, "h w"]) -> int | None:
    """Return 64 bits that stay nearly the same if a frame is resized, compressed, brightened or sharpened.

    Bit 8 u + v is set if the DCT-II coefficient of vertical frequency 1 + u and horizontal frequency 1 + v is above
    the median of all 64 (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010, 3.2.1;
    here the frame itself is transformed, while Zauner first shrinks it to 32×32).

    Returns:
      0 ≤ bits < 2⁶⁴; None for a frame without texture, whose bits would be noise.
    """
    if picture.std(dtype=np.float64) < MIN_TEXTURE:
        return None
    height, width = picture.shape
    coefficients = (_dct_rows(height) @ picture @ _dct_rows(width).T).ravel()
    return int.from_bytes(np.packbits(coefficients > np.median(coefficients), bitorder="little").tobytes(), "little")


@functools.lru_cache(maxsize=64)
def _dct_rows(size: int) -> Float[np.ndarray, "8 size"]:
    """Return the DCT-II's rows of frequencies 1 to 8: cos(π k (2 x + 1) / 2 size)."""
    return np.cos(np.pi / (2 * size) * np.outer(np.arange(1, 9), 2 * np.arange(size) + 1))
