"""The camera of a scene: where points of the world are in the picture, by a similarity transform for each frame."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dit_video.scenes.scene import Scene


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


def make_camera(scene: Scene, depth: float) -> Similarity:
    """Return the map from the world at a depth to the picture, in pixels; in the first frame they are the same.

    A camera that pans moves what is at depth 2 half as far as what is at depth 1. Zoom and turn are about the centre of
    the frame, at every depth alike.
    """
    times = np.arange(scene.size.t) / scene.fps
    motion = scene.camera
    centre = np.array([scene.size.h, scene.size.w]) / 2
    view = Similarity(motion.zoom**times, motion.turn * times, np.broadcast_to(centre, (len(times), 2)))
    shifts = -centre - times[:, None] * np.array(motion.pan) / depth
    return view.compose(Similarity(np.ones_like(times), np.zeros_like(times), shifts))


def _rotate(points: np.ndarray, angle: np.ndarray) -> np.ndarray:
    shape = (len(angle), *(1,) * (points.ndim - 2))
    cosine, sine = np.cos(angle).reshape(shape), np.sin(angle).reshape(shape)
    rows, columns = points[..., 0], points[..., 1]
    return np.stack([cosine * rows - sine * columns, sine * rows + cosine * columns], axis=-1)
