"""Windows of clips changed at random, where the training clips show few scenes and others are to be coded too."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from dit_video.core.errors import UserError

_SPEED = 2.5
"""Standard deviation of a blob's speed along each axis, in pixels a frame."""
_RADII = (8.0, 40.0)
"""Of a blob, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to a window, at random: each with even chances, but for composites.

    Windows are mirrored, reversed in time, shrunk to half from twice the size, and given other colours: channels are
    exchanged, and inverted.

    Raises:
      UserError: a share outside of [0, 1].
    """

    turned: bool = False
    """whether height and width are exchanged too, of square windows"""
    composites: float = 0.0
    """The share of windows in which a second one shows within a blob that moves: edges that cover and uncover, which
    clips of one room have few of (as pictures are pasted into each other in arXiv 1905.04899, but in motion)."""

    def __post_init__(self):
        if not 0 <= self.composites <= 1:
            raise UserError(f"composites={self.composites} is a share of the windows, from 0 to 1")


def changed(
    window: UInt8[np.ndarray, "T H W 3"], zoom: int, turned: bool, generator: np.random.Generator
) -> UInt8[np.ndarray, "T h w 3"]:
    """A window shrunk by `zoom`, forwards or backwards, mirrored or not, with its colours exchanged or inverted."""
    if zoom > 1:
        cells = window.reshape(len(window), window.shape[1] // zoom, zoom, window.shape[2] // zoom, zoom, 3)
        window = np.rint(cells.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8)
    reverse, mirror, invert = generator.integers(2, size=3)
    window = window[:: -1 if reverse else 1, :, :: -1 if mirror else 1, generator.permutation(3)]
    window = 255 - window if invert else window
    return window.transpose(0, 2, 1, 3) if turned and generator.integers(2) else window


def composite(
    window: UInt8[np.ndarray, "T H W 3"], other: UInt8[np.ndarray, "T H W 3"], generator: np.random.Generator
) -> UInt8[np.ndarray, "T H W 3"]:
    """A window with another in an ellipse that moves; what it shows moves along, by whole pixels, wrapped around."""
    length, height, width = window.shape[:3]
    speed = generator.normal(size=2) * _SPEED
    start = generator.uniform(0, 1, 2) * (height, width)
    radii = generator.uniform(*_RADII, 2)
    angle = generator.uniform(0, np.pi)
    result = window.copy()
    for t in range(length):
        offset = (t - length / 2) * speed
        inside = _ellipse(height, width, start + offset, radii, angle)
        down, right = (int(np.rint(pixels)) for pixels in offset)
        moved = np.roll(other[t], (down, right), (0, 1))
        result[t] = np.rint(window[t] * (1 - inside) + moved * inside)
    return result


def _ellipse(
    height: int, width: int, centre: Float[np.ndarray, "2"], radii: Float[np.ndarray, "2"], angle: float
) -> Float[np.ndarray, "H W 1"]:
    """1 inside, 0 outside, and about a pixel of both between."""
    rows, columns = np.mgrid[:height, :width]
    y, x = rows - centre[0], columns - centre[1]
    along = (np.cos(angle) * y + np.sin(angle) * x) / radii[0]
    across = (-np.sin(angle) * y + np.cos(angle) * x) / radii[1]
    return np.clip((1 - np.sqrt(along**2 + across**2)) * radii.min() + 0.5, 0, 1)[..., None]
