"""Measures of a clip, taken on a few frames a second."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.curation import measures
from dit_video.curation.measures import Borders
from dit_video.curation.thumbnails import ThumbnailMaker
from dit_video.video import TOLERANCE

Thumbnail = UInt8[np.ndarray, "h w 3"]

SAMPLE_RATE = 8
"""Samples per second: the frames shown at the times k / 8 s of the file are measured."""

MIN_FREEZE_STEPS = 8
"""Minimum number of steps of 1 / 8 s for which a frozen frame stands still; shorter ones are due to low frame rates."""

NUM_HASHES = 4
"""Number of hashed frames of a clip: those at 1/8, 3/8, 5/8 and 7/8 of its length."""


class FrameSample(NamedTuple):
    """Measures of one frame."""

    frame: int
    """Number of the frame in the file."""
    steps: int
    """Number of the times k / 8 s at which the frame is shown, at least one."""
    difference: float
    """Mean difference from the previous sample, in levels; 0 for the file's first sample."""
    black: bool
    """True if the frame is black."""
    sharpness: float
    """Variance of the Laplacian, in levels²."""
    hash: int | None
    """Perceptual hash of the frame; None without texture."""
    borders: Borders | None
    """Black bars of the frame at its stored size, turned upright; None if not requested, and for black frames."""
    height: int
    """Height of the frame in which `borders` are measured, in pixels."""
    width: int
    """Width of the frame in which `borders` are measured, in pixels."""


class _PendingFrame(NamedTuple):
    """A frame that is measured once the time of the next frame is known, which ends the time for which it is shown."""

    number: int
    time: float
    frame: av.VideoFrame
    thumbnail: Thumbnail | None


class FrameSampler:
    """A sampler of a file's frames, which keeps at most one frame, and the measures.

    Frames are added in order.

    Args:
      pictures: converts frames to thumbnails.
      letterbox: also measure black bars, at the stored size.
    """

    def __init__(self, pictures: ThumbnailMaker, *, letterbox: bool):
        self.samples: list[FrameSample] = []
        self._pictures, self._letterbox = pictures, letterbox
        self._pending: _PendingFrame | None = None
        self._previous_luma: Float32[np.ndarray, "h w"] | None = None

    def add_frame(self, number: int, time: float, frame: av.VideoFrame, thumbnail: Thumbnail | None = None) -> None:
        """Add the next frame; `time` (seconds) must not decrease. `thumbnail` is passed if it exists already."""
        self._measure_until(time)
        self._pending = _PendingFrame(number, time, frame, thumbnail)

    def finish(self, end: float) -> None:
        """End the last frame at `end` (seconds); a file with a frame has at least one sample."""
        self._measure_until(end)
        if self._pending is not None and not self.samples:
            self._measure(self._pending, 1)
        self._pending = None

    def _measure_until(self, time: float) -> None:
        pending = self._pending
        if pending is not None and (steps := _count_steps_before(time) - _count_steps_before(pending.time)) > 0:
            self._measure(pending, steps)

    def _measure(self, pending: _PendingFrame, steps: int) -> None:
        thumbnail = self._pictures.make_thumbnail(pending.frame) if pending.thumbnail is None else pending.thumbnail
        luma = measures.luma(thumbnail)
        black = measures.is_black(luma)
        bars, height, width = None, 0, 0
        if self._letterbox and not black:
            luma_upright = self._pictures.turn_upright(self._pictures.make_luma(pending.frame), pending.frame)
            bars, (height, width) = measures.find_borders(luma_upright), luma_upright.shape
        self.samples.append(
            FrameSample(
                frame=pending.number,
                steps=steps,
                difference=0.0 if self._previous_luma is None else measures.mean_difference(luma, self._previous_luma),
                black=black,
                sharpness=measures.sharpness(luma),
                hash=measures.perceptual_hash(self._pictures.turn_upright(luma, pending.frame)),
                borders=bars,
                height=height,
                width=width,
            )
        )
        self._previous_luma = luma


def _count_steps_before(time: float) -> int:
    """Return the number of times k / 8 s, k ≥ 0, before `time`."""
    return max(0, math.ceil(SAMPLE_RATE * (time - TOLERANCE)))


def compute_motion(samples: Sequence[FrameSample]) -> float:
    """Return the speed of change in levels of 255 a second: Σ mean |Yₖ − Yₖ₋₁| / (n / 8 s) over n steps of 1/8 s.

    The motion of a single frame is 0.
    """
    steps = _count_steps(samples)
    return SAMPLE_RATE * sum(sample.difference for sample in samples[1:]) / steps if steps else 0.0


def compute_black_share(samples: Sequence[FrameSample]) -> float:
    """Return the share of time in which the frame is black."""
    return sum(sample.steps for sample in samples if sample.black) / sum(sample.steps for sample in samples)


def compute_frozen_share(samples: Sequence[FrameSample]) -> float:
    """Return the share of time in still runs of at least one second, or of the whole clip; 0 for a single frame."""
    steps = _count_steps(samples)
    if not steps:
        return 0.0
    runs, run = [], samples[0].steps - 1
    for sample in samples[1:]:
        if sample.difference < measures.MAX_STILL_DIFFERENCE:
            run += sample.steps
        else:
            runs.append(run)
            run = sample.steps - 1
    runs.append(run)
    return sum(run for run in runs if run >= min(MIN_FREEZE_STEPS, steps)) / steps


def compute_median_sharpness(samples: Sequence[FrameSample]) -> float:
    """Return the median sharpness of frames that are not black; 0 if all are black."""
    values = [sample.sharpness for sample in samples if not sample.black]
    return float(np.median(values)) if values else 0.0


def find_letterbox(samples: Sequence[FrameSample], height: int, width: int) -> Borders:
    """Return the bars that the frames have in common, in pixels of a clip shown at this height and width.

    Each bar has the width that at least nine of ten frames have: bars that come and go, or contain subtitles for a
    tenth of the time, count as picture. Black frames are ignored.
    """
    frame_bars = [
        (top * height / sample.height, bottom * height / sample.height, left * width / sample.width,
         right * width / sample.width)
        for sample in samples if sample.borders is not None
        for top, bottom, left, right in [sample.borders]
    ]  # fmt: skip
    if not frame_bars:
        return Borders(0, 0, 0, 0)
    sides = np.quantile(np.array(frame_bars), 0.1, axis=0, method="lower")
    return Borders(*(round(side) for side in sides.tolist()))


def select_hashes(samples: Sequence[FrameSample]) -> tuple[int, ...] | None:
    """Return four perceptual hashes: of the frames with texture nearest to (2 k + 1) / 8 of the length.

    None if no frame has texture.
    """
    starts = np.cumsum([0, *(sample.steps for sample in samples)])
    usable = [(starts[i], starts[i + 1], sample.hash) for i, sample in enumerate(samples) if sample.hash is not None]
    if not usable:
        return None
    targets = starts[-1] * (2 * np.arange(NUM_HASHES) + 1) / (2 * NUM_HASHES)
    return tuple(min(usable, key=lambda pair: max(pair[0] - target, target - pair[1], 0))[2] for target in targets)


def _count_steps(samples: Sequence[FrameSample]) -> int:
    """Return the number of steps between the first time and the last."""
    return sum(sample.steps for sample in samples) - 1
