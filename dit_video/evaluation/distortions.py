"""Distortions of clips with known severity, to test distances between sets of clips (arXiv 1812.01717, section 4)."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import UInt8
from scipy.ndimage import gaussian_filter

from dit_video.core.errors import UserError
from dit_video.video import Clip

SEVERITIES: Mapping[str, tuple[float | int, ...]] = {
    "noise": (5.0, 10.0, 20.0, 40.0),
    "blur": (0.5, 1.0, 2.0, 4.0),
    "swap": (1, 2, 4, 8),
    "shuffle": (1, 2, 4, 8),
}
"""Severities of each distortion: standard deviations of Gaussian noise in levels of 255 and of a Gaussian blur in
pixels; numbers of exchanged pairs, of neighbouring frames or of any frames."""


def distort(clip: Clip, distortion: str, severity: float | int, generator: np.random.Generator) -> Clip:
    """Return a distorted clip.

    Args:
      clip: The clip.
      distortion: Kind of the distortion.
      severity: Standard deviation, or number of exchanged pairs of frames; each frame is in at most one pair.
      generator: Source of the noise and of the pairs.

    Raises:
      UserError: If the distortion is unknown, or the severity is negative.
    """
    if distortion not in _FUNCTIONS or severity < 0:
        rule = f"use {', '.join(_FUNCTIONS)} with a severity of at least 0"
        raise UserError(f"distortion={distortion!r} of severity {severity} is invalid: {rule}")
    return replace(clip, frames=_FUNCTIONS[distortion](clip.frames, severity, generator))


def _add_noise(
    frames: UInt8[np.ndarray, "T H W 3"], severity: float | int, generator: np.random.Generator
) -> UInt8[np.ndarray, "T H W 3"]:
    noisy = frames + severity * generator.standard_normal(frames.shape)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def _blur(
    frames: UInt8[np.ndarray, "T H W 3"], severity: float | int, generator: np.random.Generator
) -> UInt8[np.ndarray, "T H W 3"]:
    blurred = gaussian_filter(frames.astype(np.float32), severity, axes=(1, 2)) if severity else frames
    return np.round(blurred).astype(np.uint8)


def _swap(
    frames: UInt8[np.ndarray, "T H W 3"], severity: float | int, generator: np.random.Generator
) -> UInt8[np.ndarray, "T H W 3"]:
    offset = int(generator.integers(2)) if len(frames) % 2 else 0
    firsts = generator.permutation(np.arange(offset, len(frames) - 1, 2))[: int(severity)]
    return _exchange(frames, firsts, firsts + 1)


def _shuffle(
    frames: UInt8[np.ndarray, "T H W 3"], severity: float | int, generator: np.random.Generator
) -> UInt8[np.ndarray, "T H W 3"]:
    order = generator.permutation(len(frames))
    count = min(int(severity), len(frames) // 2)
    return _exchange(frames, order[:count], order[count : 2 * count])


def _exchange(frames: np.ndarray, firsts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    order = np.arange(len(frames))
    order[firsts], order[seconds] = seconds, firsts
    return frames[order]


_FUNCTIONS: Mapping[str, Callable[..., np.ndarray]] = {
    "noise": _add_noise,
    "blur": _blur,
    "swap": _swap,
    "shuffle": _shuffle,
}
