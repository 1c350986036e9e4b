"""Similarity transforms of the plane over time, in rows and columns."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Similarity(NamedTuple):
    """A map `u = scale * R(angle) q + shift` for each frame, of points (row, column)."""

    scale: Float[np.ndarray, " T"]
    angle: Float[np.ndarray, " T"]
    """Angle from rows to columns, in radians."""
    shift: Float[np.ndarray, "T 2"]

    def apply(self, points: Float[np.ndarray, "T *n 2"]) -> Float[np.ndarray, "T *n 2"]:
        """Map the points of each frame."""
        return _rotate(points, self.angle) * self._expand(self.scale, points) + self._expand(self.shift, points)

    def invert(self, points: Float[np.ndarray, "T *n 2"]) -> Float[np.ndarray, "T *n 2"]:
        """Return the points that `apply` maps to these."""
        centred = (points - self._expand(self.shift, points)) / self._expand(self.scale, points)
        return _rotate(centred, -self.angle)

    def compose(self, inner: "Similarity") -> "Similarity":
        """Return the map that applies `inner` first."""
        return Similarity(self.scale * inner.scale, self.angle + inner.angle, self.apply(inner.shift))

    def take(self, frames: slice) -> "Similarity":
        """Return the maps of some frames."""
        return Similarity(self.scale[frames], self.angle[frames], self.shift[frames])

    @staticmethod
    def _expand(values: np.ndarray, points: np.ndarray) -> np.ndarray:
        is_vector = values.ndim == 2
        axes = points.ndim - (2 if is_vector else 1)
        shape = (len(values), *(1,) * axes, *values.shape[1:])
        return values.reshape(shape)


def _rotate(points: np.ndarray, angle: np.ndarray) -> np.ndarray:
    shape = (len(angle), *(1,) * (points.ndim - 2))
    cosine, sine = np.cos(angle).reshape(shape), np.sin(angle).reshape(shape)
    rows, columns = points[..., 0], points[..., 1]
    return np.stack([cosine * rows - sine * columns, sine * rows + cosine * columns], axis=-1)
