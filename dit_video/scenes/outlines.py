"""Outlines of parts as signed distances, and their textures, in coordinates of the part."""

import numpy as np
from jaxtyping import Float

from dit_video.core.errors import UserError

Points = Float[np.ndarray, "*n 2"]
_CONTRAST = 0.38
_MIN_WAVELENGTH = 6.0
"""Shortest wavelength of a texture in pixels, so that interpolation between pixels reproduces it."""


def compute_distance(shape: str, points: Points, radius: float, half_length: float = 0.0) -> Float[np.ndarray, "*n"]:
    """Return the signed distance of points to an outline, negative inside; exact near the edges.

    Args:
      shape: `circle`, `square`, `triangle`, `ring`, `cross`, or `limb`, `post` for parts of figures and occluders.
      points: Rows and columns relative to the part's centre.
      radius: Half the side of the bounding box, or half the thickness of a limb or post.
      half_length: Half the length of a limb along rows.

    Raises:
      UserError: If the shape is unknown.
    """
    rows, columns = points[..., 0], points[..., 1]
    match shape:
        case "circle":
            return np.hypot(rows, columns) - radius
        case "square":
            return _box(rows, columns, radius * 0.9, radius * 0.9)
        case "triangle":
            # Upright: its base is the lower edge, its sides meet in the middle of the upper one.
            slope = np.array([1.0, 2.0]) / np.sqrt(5.0)
            side = np.abs(columns) * slope[1] - (rows + radius) * slope[0]
            return np.maximum(side, rows - radius)
        case "ring":
            return np.abs(np.hypot(rows, columns) - 0.72 * radius) - 0.28 * radius
        case "cross":
            arm = 0.34 * radius
            return np.minimum(_box(rows, columns, radius, arm), _box(rows, columns, arm, radius))
        case "limb":
            beyond = np.maximum(np.abs(rows) - half_length, 0.0)
            return np.hypot(beyond, columns) - radius
        case "post":
            return np.abs(columns) - radius
    raise UserError(f"shape={shape!r} is invalid: it has no outline. Use circle, square, triangle, ring or cross.")


def _box(rows: np.ndarray, columns: np.ndarray, half_height: float, half_width: float) -> np.ndarray:
    return np.maximum(np.abs(rows) - half_height, np.abs(columns) - half_width)


def compute_shade(texture: str, points: Points, radius: float) -> Float[np.ndarray, "*n"]:
    """Return the brightness of a texture at points, 1 at most.

    Raises:
      UserError: If the texture is unknown.
    """
    wave = 2 * np.pi / max(0.7 * radius, _MIN_WAVELENGTH)
    rows, columns = np.cos(wave * points[..., 0]), np.cos(wave * points[..., 1])
    match texture:
        case "plain":
            return np.ones(points.shape[:-1])
        case "striped":
            pattern = rows
        case "dotted":
            pattern = 1 - (1 + rows) * (1 + columns) / 2
        case "checked":
            pattern = rows * columns
        case _:
            raise UserError(f"texture={texture!r} is invalid. Use plain, striped, dotted or checked.")
    return 1 - _CONTRAST * (1 + pattern) / 2


def compute_ground(points: Points, side: float | int) -> Float[np.ndarray, "*n"]:
    """Return the brightness of the background, which varies slowly; `side` is the frame's shorter side."""
    first, second = 2 * np.pi / (0.9 * side), 2 * np.pi / (0.37 * side)
    rows, columns = points[..., 0], points[..., 1]
    slow = np.cos(first * (rows + 0.4 * columns) + 0.3) + 0.7 * np.cos(second * (columns - 0.3 * rows) + 1.1)
    return 1 + 0.16 * slow
