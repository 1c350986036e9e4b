"""Motion of clips that loop: how much they move, when they repeat, and whether their end meets their start.

A clip that loops shows its first frame at its end again.
"""

import itertools

import numpy as np
from jaxtyping import Float64, UInt8

_REPEATS = 0.25
"""A clip repeats after a time if frames so far apart differ by less than this share of the greatest difference between
frames, in mean squares."""


def measure_motion(frames: UInt8[np.ndarray, "T H W 3"]) -> float:
    """Return the root of the mean square change from one frame to the next, in levels of 255; 0 for a single frame."""
    changes = _measure_changes(frames)
    return float(np.sqrt(np.square(changes).mean())) if len(changes) else 0.0


def measure_seam(frames: UInt8[np.ndarray, "T H W 3"]) -> float:
    """Return the change from the last frame to the first, relative to the median change between neighbours.

    It is infinite for a clip that stands still but does not loop, and 0 for one that does not change.
    """
    changes = _measure_changes(frames)
    (seam,) = _measure_changes(frames[[-1, 0]])
    if not seam:
        return 0.0
    median = float(np.median(changes)) if len(changes) else 0.0
    return float(seam) / median if median else np.inf


def find_period(frames: UInt8[np.ndarray, "T H W 3"]) -> int:
    """Return the number of frames after which a loop first repeats: all of them, if no part does."""
    loop = frames[:-1].reshape(len(frames) - 1, -1).astype(np.float32)
    differences = [float(np.square(loop - np.roll(loop, -lag, axis=0)).mean()) for lag in range(len(loop) // 2 + 1)]
    for lag in range(2, len(differences)):
        is_least = differences[lag] <= min(differences[lag - 1 : lag + 2])
        if is_least and differences[lag] < _REPEATS * max(differences):
            return lag
    return len(loop)


def _measure_changes(frames: UInt8[np.ndarray, "T H W 3"]) -> Float64[np.ndarray, " T-1"]:
    """Return the root mean square change from each frame to the next."""
    pairs = itertools.pairwise(frames)
    return np.array([np.sqrt(np.square(after.astype(np.float64) - before).mean()) for before, after in pairs])
