"""A few pictures a second of a clip, and what they say of it together."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.data.ingest import measures
from dit_video.data.ingest.measures import Borders
from dit_video.data.ingest.thumbnails import Pictures
from dit_video.video import TOLERANCE

RATE = 8
"""Times a second: measures are taken of the frames that are shown at the times k / 8 s of the file."""

FREEZE = 8
"""Steps of 1 / 8 s for which a picture stands still, at least, to be frozen: shorter ones are low frame rates."""

HASHES = 4
"""Pictures of a clip that are hashed: those at 1/8, 3/8, 5/8 and 7/8 of its length."""


class Sample(NamedTuple):
    """One frame that was measured."""

    frame: int
    """Its number in the file."""
    steps: int
    """At how many of the times k / 8 s it is shown, one at least."""
    difference: float
    """from the sample before, in levels; 0 for the file's first"""
    black: bool
    sharpness: float
    hash: int | None
    borders: Borders | None
    """As stored, turned upright; None where not asked for, and of black pictures."""
    height: int
    """of the picture in which `borders` count"""
    width: int


class _Shown(NamedTuple):
    """A frame that waits for the next one, which says how long it is shown."""

    number: int
    time: float
    frame: av.VideoFrame
    thumbnail: UInt8[np.ndarray, "h w 3"] | None


class Sampler:
    """Takes the frames of a file in order, keeps one of them and the numbers measured.

    Args:
      pictures: makes thumbnails.
      letterbox: also look for black bars, at the stored size.
    """

    def __init__(self, pictures: Pictures, *, letterbox: bool):
        self.samples: list[Sample] = []
        self._pictures, self._letterbox = pictures, letterbox
        self._shown: _Shown | None = None
        self._before: Float32[np.ndarray, "h w"] | None = None

    def see(
        self, number: int, time: float, frame: av.VideoFrame, thumbnail: UInt8[np.ndarray, "h w 3"] | None = None
    ) -> None:
        """The next frame; `time` (seconds) is not before the last one's. `thumbnail` where it is made already."""
        self._until(time)
        self._shown = _Shown(number, time, frame, thumbnail)

    def finish(self, end: float) -> None:
        """The last frame is shown until `end` (seconds). A file with a frame has a sample."""
        self._until(end)
        if self._shown is not None and not self.samples:
            self._measure(self._shown, 1)
        self._shown = None

    def _until(self, time: float) -> None:
        if self._shown is not None and (steps := _step(time) - _step(self._shown.time)) > 0:
            self._measure(self._shown, steps)

    def _measure(self, shown: _Shown, steps: int) -> None:
        thumbnail = self._pictures.thumbnail(shown.frame) if shown.thumbnail is None else shown.thumbnail
        luma = measures.luma(thumbnail)
        black = measures.is_black(luma)
        bars, height, width = None, 0, 0
        if self._letterbox and not black:
            whole = self._pictures.upright(self._pictures.luma(shown.frame), shown.frame)
            bars, (height, width) = measures.borders(whole), whole.shape
        self.samples.append(
            Sample(
                frame=shown.number,
                steps=steps,
                difference=0.0 if self._before is None else measures.difference(luma, self._before),
                black=black,
                sharpness=measures.sharpness(luma),
                hash=measures.perceptual_hash(self._pictures.upright(luma, shown.frame)),
                borders=bars,
                height=height,
                width=width,
            )
        )
        self._before = luma


def _step(time: float) -> int:
    """The number of times k / 8 s, k ≥ 0, that lie before `time`."""
    return max(0, math.ceil(RATE * (time - TOLERANCE)))


def motion(samples: Sequence[Sample]) -> float:
    """How fast the picture changes: Σ mean |Yₖ − Yₖ₋₁| / (n / 8 s) over the n steps of 1/8 s.

    In levels of 255 a second; 0 for one picture.
    """
    steps = _steps(samples)
    return RATE * sum(sample.difference for sample in samples[1:]) / steps if steps else 0.0


def black(samples: Sequence[Sample]) -> float:
    """The share of time in which the picture is black."""
    return sum(sample.steps for sample in samples if sample.black) / sum(sample.steps for sample in samples)


def frozen(samples: Sequence[Sample]) -> float:
    """The share of time in which the picture stands still, for a second or longer or throughout; 0 for one picture."""
    steps = _steps(samples)
    if not steps:
        return 0.0
    runs, run = [], samples[0].steps - 1
    for sample in samples[1:]:
        if sample.difference < measures.STILL:
            run += sample.steps
        else:
            runs.append(run)
            run = sample.steps - 1
    runs.append(run)
    return sum(run for run in runs if run >= min(FREEZE, steps)) / steps


def sharpness(samples: Sequence[Sample]) -> float:
    """The median over pictures that are not black; 0 where all are."""
    values = [sample.sharpness for sample in samples if not sample.black]
    return float(np.median(values)) if values else 0.0


def letterbox(samples: Sequence[Sample], height: int, width: int) -> Borders:
    """The bars that pictures have in common, in pixels of a clip that is shown at this height and width.

    Of every side the width that nine pictures of ten have at least: bars that come and go, or hold subtitles for a
    tenth of the time, count as picture. Black pictures have no say.
    """
    found = [
        (top * height / sample.height, bottom * height / sample.height, left * width / sample.width,
         right * width / sample.width)
        for sample in samples if sample.borders is not None
        for top, bottom, left, right in [sample.borders]
    ]  # fmt: skip
    if not found:
        return Borders(0, 0, 0, 0)
    sides = np.quantile(np.array(found), 0.1, axis=0, method="lower")
    return Borders(*(round(side) for side in sides.tolist()))


def hashes(samples: Sequence[Sample]) -> tuple[int, ...] | None:
    """Perceptual hashes of four pictures: of those at (2 k + 1) / 8 of the length the nearest that have texture.

    None where no picture has texture.
    """
    begins = np.cumsum([0, *(sample.steps for sample in samples)])
    usable = [(begins[at], begins[at + 1], sample.hash) for at, sample in enumerate(samples) if sample.hash is not None]
    if not usable:
        return None
    moments = begins[-1] * (2 * np.arange(HASHES) + 1) / (2 * HASHES)
    return tuple(min(usable, key=lambda part: max(part[0] - moment, moment - part[1], 0))[2] for moment in moments)


def _steps(samples: Sequence[Sample]) -> int:
    """Between the first time and the last."""
    return sum(sample.steps for sample in samples) - 1
