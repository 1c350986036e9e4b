"""Random augmentation of windows, for autoencoders that train on few scenes and must generalise to others."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from dit_video.core.errors import UserError

_SPEED_STD = 2.5
"""Standard deviation of the ellipse's speed along each axis, in pixels per frame."""
_RADIUS_RANGE = (8.0, 40.0)
"""Range of the ellipse's radii, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Configuration of the random changes to a window.

    With a probability of one half each, a window is mirrored, reversed in time, downscaled from twice the size, and
    inverted; its colour channels are permuted at random.

    Raises:
      UserError: `composite_prob` is not a probability.
    """

    transpose: bool = False
    """True to also exchange height and width of square windows, with a probability of one half."""
    composite_prob: float = 0.0
    """Probability that a second window is visible inside a moving ellipse. It adds occlusions, which clips of a single
    room lack (CutMix, arXiv 1905.04899, but in motion)."""

    def __post_init__(self):
        if not 0 <= self.composite_prob <= 1:
            raise UserError(f"composite_prob={self.composite_prob} is invalid: it is a probability. Use 0 to 1.")


def augment_window(
    window: UInt8[np.ndarray, "T H W 3"], zoom: int, transpose: bool, generator: np.random.Generator
) -> UInt8[np.ndarray, "T h w 3"]:
    """Return the window downscaled by `zoom` and changed at random, see `Augmentation`."""
    if zoom > 1:
        cells = window.reshape(len(window), window.shape[1] // zoom, zoom, window.shape[2] // zoom, zoom, 3)
        window = np.rint(cells.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8)
    reverse, mirror, invert = generator.integers(2, size=3)
    window = window[:: -1 if reverse else 1, :, :: -1 if mirror else 1, generator.permutation(3)]
    window = 255 - window if invert else window
    return window.transpose(0, 2, 1, 3) if transpose and generator.integers(2) else window


def composite(
    window: UInt8[np.ndarray, "T H W 3"], other: UInt8[np.ndarray, "T H W 3"], generator: np.random.Generator
) -> UInt8[np.ndarray, "T H W 3"]:
    """Show a second window inside a moving ellipse; its pixels move along with the ellipse and wrap around."""
    length, height, width = window.shape[:3]
    speed = generator.normal(size=2) * _SPEED_STD
    start = generator.uniform(0, 1, 2) * (height, width)
    radii = generator.uniform(*_RADIUS_RANGE, 2)
    angle = generator.uniform(0, np.pi)
    result = window.copy()
    for t in range(length):
        offset = (t - length / 2) * speed
        inside = _draw_ellipse(height, width, start + offset, radii, angle)
        down, right = (int(np.rint(pixels)) for pixels in offset)
        moved = np.roll(other[t], (down, right), (0, 1))
        result[t] = np.rint(window[t] * (1 - inside) + moved * inside)
    return result


def _draw_ellipse(
    height: int, width: int, centre: Float[np.ndarray, "2"], radii: Float[np.ndarray, "2"], angle: float
) -> Float[np.ndarray, "H W 1"]:
    """Return an anti-aliased mask: 1 inside, 0 outside, with an edge of about one pixel."""
    rows, columns = np.mgrid[:height, :width]
    y, x = rows - centre[0], columns - centre[1]
    along = (np.cos(angle) * y + np.sin(angle) * x) / radii[0]
    across = (-np.sin(angle) * y + np.cos(angle) * x) / radii[1]
    return np.clip((1 - np.sqrt(along**2 + across**2)) * radii.min() + 0.5, 0, 1)[..., None]
