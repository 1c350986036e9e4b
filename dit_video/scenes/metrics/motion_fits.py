"""Uniform and accelerated motion that is fitted to the centroids of objects."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

_MIN_FRAMES = 4
"""Number of frames on each side of a contact, at least."""


class MotionFit(NamedTuple):
    """Polynomials of time through centroids; positions in pixels, times in seconds."""

    start: Float[np.ndarray, "*n 2"]
    """Rows and columns at time 0."""
    velocity: Float[np.ndarray, "*n 2"]
    """Velocity at time 0."""
    acceleration: Float[np.ndarray, "*n 2"]
    """Acceleration; zero of uniform motion."""
    squares: float
    """Sum of the squared distances of the centroids from the fit."""
    num_centroids: int
    """Number of centroids."""

    @property
    def residual(self) -> float:
        """Return the root mean square distance of the centroids from the fit, in pixels."""
        return float(np.sqrt(self.squares / self.num_centroids))

    def predict(self, seconds: Float[np.ndarray, "*t"]) -> Float[np.ndarray, "*t 2"]:
        """Return the positions of one object at some times."""
        times = seconds[..., None]
        return self.start + self.velocity * times + self.acceleration * times**2 / 2


def fit_motion(
    seconds: Float[np.ndarray, " T"], centres: Float[np.ndarray, "T *n 2"], *, is_accelerated: bool = False
) -> MotionFit:
    """Return the least-squares fit of uniform motion, or of uniformly accelerated one.

    Args:
      seconds: time of each frame.
      centres: centroids of one object, or of several.
      is_accelerated: True to fit an acceleration.
    """
    degree = 2 if is_accelerated else 1
    powers = np.vander(seconds, degree + 1, increasing=True)
    flat = np.asarray(centres, np.float64).reshape(len(seconds), -1)
    factors = np.linalg.lstsq(powers, flat, rcond=None)[0]
    squares = float(np.square(flat - powers @ factors).sum(axis=(0, 1)))
    start, velocity, *rest = (factor.reshape(centres.shape[1:]) for factor in factors)
    acceleration = 2 * rest[0] if rest else np.zeros_like(start)
    return MotionFit(start, velocity, acceleration, squares, flat.size // 2)


class ContactFit(NamedTuple):
    """Uniform motion before a contact and after it."""

    before: MotionFit
    after: MotionFit
    seconds: float
    """Time of the contact, at which both fits are nearest to each other."""
    residual: float
    """Root mean square distance of the centroids from the fits, in pixels."""
    gap: float
    """Largest distance in pixels between the positions that both fits have at the contact."""

    @property
    def centres(self) -> Float[np.ndarray, "n 2"]:
        """Return the positions at the contact, by the motion before it."""
        return self.before.start + self.before.velocity * self.seconds


def fit_contact(seconds: Float[np.ndarray, " T"], centres: Float[np.ndarray, "T n 2"]) -> ContactFit | None:
    """Return the fit of uniform motion that changes once, with all objects; None for too few frames.

    The contact is between the two frames for which the sum of squares is the smallest.

    Args:
      seconds: time of each frame.
      centres: centroids of the objects.
    """
    splits = range(_MIN_FRAMES, len(seconds) - _MIN_FRAMES + 1)
    fits = [
        (fit_motion(seconds[:split], centres[:split]), fit_motion(seconds[split:], centres[split:])) for split in splits
    ]
    if not fits:
        return None
    before, after = min(fits, key=lambda pair: pair[0].squares + pair[1].squares)
    offset, change = after.start - before.start, after.velocity - before.velocity
    time = -float((offset * change).sum(axis=(0, 1)) / max(np.square(change).sum(axis=(0, 1)), 1e-9))
    gap = float(np.hypot(*(offset + change * time).T).max(axis=0))
    residual = float(np.sqrt((before.squares + after.squares) / (before.num_centroids + after.num_centroids)))
    return ContactFit(before, after, time, residual, gap)
