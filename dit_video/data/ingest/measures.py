"""What is measured on single pictures, each a pure function of luma in 0..255."""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Of red, green and blue: ITU-R BT.601."""

BLACK_LEVEL, BLACK_PIXELS = 25.5, 0.98
"""A picture is black where this share of its pixels is darker than this: the defaults of ffmpeg's `blackdetect`."""

STILL = 0.255
"""Levels. Two pictures are the same where luma differs by less on average: the default (-60 dB) of ffmpeg's
`freezedetect`."""

BORDER_LEVEL, BORDER_PIXELS = 16, 0.99
"""A row or column belongs to a border where this share of its pixels is not lighter than this."""

TEXTURE = 2.0
"""Levels. A picture whose luma deviates by less (standard deviation) has no hash: its bits would be noise."""


class Borders(NamedTuple):
    """Black bars around a picture, in pixels."""

    top: int
    bottom: int
    left: int
    right: int

    def share(self, height: int, width: int) -> float:
        """Of the area of a picture of this size."""
        return 1 - (height - self.top - self.bottom) * (width - self.left - self.right) / (height * width)


def luma(picture: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w"]:
    """Y' = 0.299 R' + 0.587 G' + 0.114 B', 0..255."""
    return picture.astype(np.float32) @ LUMA


def difference(first: Float[np.ndarray, "h w"], second: Float[np.ndarray, "h w"]) -> float:
    """mean |Y₁ − Y₂|, in levels of 255."""
    return float(np.abs(first - second).mean(dtype=np.float64))


def is_black(picture: Float[np.ndarray, "h w"]) -> bool:
    """Whether 98 % of the pixels are darker than a tenth of white."""
    return bool((picture < BLACK_LEVEL).mean() >= BLACK_PIXELS)


def sharpness(picture: Float[np.ndarray, "h w"]) -> float:
    """The variance of Y ∗ [0 1 0; 1 −4 1; 0 1 0] inside the picture, in levels².

    Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", ICPR 2000. Depends on the picture's size: here
    it is always taken on thumbnails of one size.
    """
    centre = picture[1:-1, 1:-1]
    neighbours = picture[:-2, 1:-1] + picture[2:, 1:-1] + picture[1:-1, :-2] + picture[1:-1, 2:]
    return float((neighbours - 4 * centre).var(dtype=np.float64))


def borders(picture: UInt8[np.ndarray, "H W"]) -> Borders | None:
    """The black bars around a picture; None where all of it is black.

    A row or column is dark where 99 % of its pixels are at most 16 of 255; bars are the dark ones next to the edges.
    Columns are judged between the bars above and below.
    """
    dark = picture <= BORDER_LEVEL
    rows = dark.mean(axis=1) < BORDER_PIXELS
    if not rows.any():
        return None
    top, bottom = int(rows.argmax()), int(rows[::-1].argmax())
    columns = dark[top : len(rows) - bottom].mean(axis=0) < BORDER_PIXELS
    if not columns.any():  # a few light pixels in an otherwise black picture
        return None
    return Borders(top, bottom, int(columns.argmax()), int(columns[::-1].argmax()))


def perceptual_hash(picture: Float[np.ndarray, "h w"]) -> int | None:
    """64 bits that stay nearly the same when a picture is resized, compressed, brightened or sharpened.

    Bit 8 u + v is set where the DCT-II coefficient of vertical frequency 1 + u and horizontal frequency 1 + v is above
    the median of all 64 (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010, 3.2.1;
    here the transform is taken on the picture itself, where he first shrinks it to 32×32).

    Returns:
      0 ≤ bits < 2⁶⁴; None for a picture without texture, which has no such bits.
    """
    if picture.std(dtype=np.float64) < TEXTURE:
        return None
    height, width = picture.shape
    coefficients = (_cosines(height) @ picture @ _cosines(width).T).ravel()
    return int.from_bytes(np.packbits(coefficients > np.median(coefficients), bitorder="little").tobytes(), "little")


@functools.lru_cache(maxsize=64)
def _cosines(size: int) -> Float[np.ndarray, "8 size"]:
    """The DCT-II's rows of frequencies 1 to 8: cos(π k (2 x + 1) / 2 size)."""
    return np.cos(np.pi / (2 * size) * np.outer(np.arange(1, 9), 2 * np.arange(size) + 1))
