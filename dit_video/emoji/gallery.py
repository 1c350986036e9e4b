"""The gallery of all real emoji, in which the nearest one to a clip is found by its pixels.

A name has one real clip, so that the judge of a sample is the set of all of them: a sample shows the name of the real
clip that it is nearest to, over shifts in time and in space.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int, UInt8

from dit_video.core.resize import resize

SIDE = 48
"""Height and width at which clips are compared, in pixels."""
_COARSE_SIDE = 16
"""Height and width at which candidates, and their shifts in time, are found."""
_CANDIDATES = 32
"""Number of real clips that are compared in detail."""
_SHIFT = 3
"""Largest shift in rows and columns over which clips are compared, in pixels of `SIDE`."""


class Match(NamedTuple):
    """The nearest real clip to a clip."""

    number: int
    """Number of the real clip."""
    distance: float
    """Root of the mean square difference of their pixels, in levels of 255."""


class Gallery:
    """Real clips as loops, at the size at which they are compared.

    Args:
      clips: Frames of each real clip; the last frame of a loop, which is its first one, is left out.
    """

    def __init__(self, clips: Sequence[UInt8[np.ndarray, "t H W 3"]]):
        loops = [clip[:-1] if len(clip) > 1 else clip for clip in clips]
        self._loops: list[UInt8[np.ndarray, "t h w 3"]] = [resize(loop, SIDE, SIDE) for loop in loops]
        self._periods = np.array([len(loop) for loop in self._loops])
        self._starts: Int[np.ndarray, " n"] = np.cumsum(self._periods) - self._periods
        self._coarse: Float32[np.ndarray, "f d"] = np.concatenate([_make_coarse(loop) for loop in self._loops])
        self._norms = np.square(self._coarse).sum(axis=1)

    def __len__(self) -> int:
        return len(self._loops)

    def is_same(self, first: int, second: int) -> bool:
        """Return whether two real clips have the same pixels, as the flags of some places have."""
        return np.array_equal(self._loops[first], self._loops[second])

    def find_nearest(self, frames: UInt8[np.ndarray, "t H W 3"], *, exclude: Sequence[int] = ()) -> Match:
        """Return the nearest real clip, over shifts in time and space.

        Args:
          frames: The frames, at the rate of the real clips.
          exclude: Numbers of real clips that are not compared.
        """
        clip = resize(frames, SIDE, SIDE)
        distances, shifts = self._compare_coarsely(clip)
        distances[list(exclude)] = np.inf
        candidates = [int(number) for number in np.argsort(distances)[:_CANDIDATES] if np.isfinite(distances[number])]
        matches = [Match(number, self._compare(clip, number, int(shifts[number]))) for number in candidates]
        return min(matches, key=lambda match: match.distance)

    def _compare_coarsely(
        self, clip: UInt8[np.ndarray, "t h w 3"]
    ) -> tuple[Float32[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Return the mean square distance to each real clip at the coarse size, and the shift in time that has it."""
        frames, times = _make_coarse(clip), np.arange(len(clip))
        squares = np.square(frames).sum(axis=1)[:, None] + self._norms - 2 * frames @ self._coarse.T
        distances, shifts = np.empty(len(self), np.float32), np.zeros(len(self), np.int64)
        for period in np.unique(self._periods):
            numbers = np.flatnonzero(self._periods == period)
            shown = (times + np.arange(period)[:, None]) % period  # frame of a real clip for each shift and time
            columns = self._starts[numbers][:, None, None] + shown
            by_shift = squares[times, columns].mean(axis=-1)
            distances[numbers], shifts[numbers] = by_shift.min(axis=1), by_shift.argmin(axis=1)
        return distances, shifts

    def _compare(self, clip: UInt8[np.ndarray, "t h w 3"], number: int, shift: int) -> float:
        """Return the distance to a real clip that is shifted in time, over shifts in space."""
        loop = self._loops[number]
        aligned = loop[(np.arange(len(clip)) + shift) % len(loop)].astype(np.float32)
        side = SIDE - 2 * _SHIFT
        inner = clip[:, _SHIFT : _SHIFT + side, _SHIFT : _SHIFT + side].astype(np.float32)
        places = itertools.product(range(2 * _SHIFT + 1), repeat=2)
        differences = (aligned[:, top : top + side, left : left + side] - inner for top, left in places)
        return min(float(np.vdot(each, each)) for each in differences) ** 0.5 / inner.size**0.5


def _make_coarse(frames: UInt8[np.ndarray, "t h w 3"]) -> Float32[np.ndarray, "t d"]:
    return resize(frames, _COARSE_SIDE, _COARSE_SIDE).reshape(len(frames), -1).astype(np.float32)
