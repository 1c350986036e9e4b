"""Measures of a clip, taken on thumbnails of a few frames a second.

Single frames are measured by pure functions of luma in 0..255, and clips by functions of the samples of their frames.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from jaxtyping import Float, Float32, Real, UInt8

from dit_video.data.ingest.screening import Borders
from dit_video.video import TOLERANCE
from dit_video.video.background import blend
from dit_video.video.reader import wrap_decode_errors
from dit_video.video.to_rgb import has_alpha, is_full_range, read_orientation

LONG_SIDE = 256
"""Length of a thumbnail's longer side in pixels. Smaller frames are enlarged, so that measures are comparable."""
MIN_SHORT_SIDE = 16
"""Minimum length of the shorter side in pixels; frames longer than 16:1 are squeezed."""

_INTERPOLATION = (
    Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
)
"""The bilinear filter of swscale widens with the scale, so that shrinking does not alias; these flags give the same
values on all processors."""
_PLANAR_YUV = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p")
"""Formats whose first plane is luma in 8 bits."""
_FULL_RANGE = np.clip(np.rint((np.arange(256) - 16) * 255 / 219), 0, 255).astype(np.uint8)
"""Full-range luma by limited-range luma."""
_AREA = _INTERPOLATION & ~Interpolation.BILINEAR | Interpolation.AREA
"""Flags of the average over areas."""


class ThumbnailMaker:
    """A converter of one file's frames to thumbnails and luma, as stored: not turned, with pixels taken as square.

    Its methods raise `DecodeError` for a frame that ffmpeg cannot convert.

    Args:
      name: Name of the file, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # Each caches swscale's context for one size of output, so there is one per size.
        self._thumbnail_reformatter, self._full_size_reformatter = VideoReformatter(), VideoReformatter()
        self._tiny_reformatter = VideoReformatter()
        self._size: tuple[int, int] | None = None
        self._orientation: tuple[bool, bool, bool] | None = None

    def make_thumbnail(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
        """Return full-range RGB with the longer side `LONG_SIDE`, all of one size; transparency is over black."""
        if self._size is None:
            scale = LONG_SIDE / max(frame.height, frame.width)
            height, width = (max(MIN_SHORT_SIDE, round(side * scale)) for side in (frame.height, frame.width))
            self._size = height, width
        picture = self._convert(self._thumbnail_reformatter, frame, "rgb24", *self._size)
        return blend(picture) if has_alpha(frame) else picture

    def make_tiny_picture(self, frame: av.VideoFrame, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
        """Return full-range RGB of a few pixels, each the average of an area, at an eighth of a thumbnail's cost."""
        picture = self._convert(self._tiny_reformatter, frame, "rgb24", height, width, _AREA)
        return blend(picture) if has_alpha(frame) else picture

    def make_luma(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "H W"]:
        """Return full-range luma at the stored size; transparency is over black."""
        if frame.format.name in _PLANAR_YUV:  # the same values as swscale's, ten times as fast
            plane = frame.planes[0]
            stored = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[
                : frame.height, : frame.width
            ]
            return stored if is_full_range(frame) else _FULL_RANGE[stored]
        picture = self._convert(self._full_size_reformatter, frame, "gray", frame.height, frame.width)
        if not has_alpha(frame):
            return picture
        return np.rint(blend(picture) @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)

    def turn_upright(self, picture: Real[np.ndarray, "H W"], frame: av.VideoFrame) -> Real[np.ndarray, "h w"]:
        """Return a frame as it is shown, by quarter turns and reflections."""
        if self._orientation is None:
            # Read from the first frame alone: a frame whose side data were read refers to itself, and would stay in
            # memory until the garbage collector runs, which counts objects and not bytes.
            self._orientation = read_orientation(frame)
        is_transposed, flip_rows, flip_columns = self._orientation
        picture = picture.swapaxes(0, 1) if is_transposed else picture
        return picture[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]

    def _convert(
        self,
        reformatter: VideoReformatter,
        frame: av.VideoFrame,
        format: str,
        height: int,
        width: int,
        filter: int = _INTERPOLATION,
    ) -> UInt8[np.ndarray, "h w *channels"]:
        with wrap_decode_errors(self._name):
            return reformatter.reformat(
                frame,
                width,
                height,
                format="rgba" if has_alpha(frame) else format,
                src_color_range=ColorRange.JPEG if is_full_range(frame) else ColorRange.MPEG,
                dst_color_range=ColorRange.JPEG,
                interpolation=filter,
                threads=1,
            ).to_ndarray()


LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue: ITU-R BT.601."""

BLACK_LEVEL, BLACK_PIXELS = 25.5, 0.98
"""A frame is black if this share of its pixels is darker than this level: the defaults of ffmpeg's `blackdetect`."""

MAX_STILL_DIFFERENCE = 0.255
"""Mean difference of luma, in levels, below which two frames are the same: the default (-60 dB) of ffmpeg's
`freezedetect`."""

BORDER_LEVEL, BORDER_PIXELS = 16, 0.99
"""A row or column belongs to a border if this share of its pixels is not brighter than this level."""

MIN_TEXTURE = 2.0
"""Standard deviation of luma, in levels, below which a frame has no hash, as its bits would be noise."""


def compute_luma(picture: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w"]:
    """Return Y' = 0.299 R' + 0.587 G' + 0.114 B', 0..255."""
    return picture.astype(np.float32) @ LUMA_WEIGHTS


def mean_difference(first: Float[np.ndarray, "h w"], second: Float[np.ndarray, "h w"]) -> float:
    """Return mean |Y₁ − Y₂|, in levels of 255."""
    return float(np.abs(first - second).mean(dtype=np.float64))


def is_black(picture: Float[np.ndarray, "h w"]) -> bool:
    """Return whether 98 % of the pixels are darker than a tenth of white."""
    return bool((picture < BLACK_LEVEL).mean() >= BLACK_PIXELS)


def compute_sharpness(picture: Float[np.ndarray, "h w"]) -> float:
    """Return the variance of Y ∗ [0 1 0; 1 −4 1; 0 1 0] inside the frame, in levels².

    Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", ICPR 2000. The value depends on the frame's
    size, so it is always measured on thumbnails of one size.
    """
    centre = picture[1:-1, 1:-1]
    neighbours = picture[:-2, 1:-1] + picture[2:, 1:-1] + picture[1:-1, :-2] + picture[1:-1, 2:]
    return float((neighbours - 4 * centre).var(dtype=np.float64))


def find_borders(picture: UInt8[np.ndarray, "H W"]) -> Borders | None:
    """Return the black bars around a frame, or None if the whole frame is black.

    A row or column is dark if 99 % of its pixels are at most 16 of 255; bars are the dark ones next to the edges.
    Columns are judged between the bars above and below.
    """
    dark = picture <= BORDER_LEVEL
    rows = dark.mean(axis=1) < BORDER_PIXELS
    if not rows.any():
        return None
    top, bottom = int(rows.argmax()), int(rows[::-1].argmax())
    columns = dark[top : len(rows) - bottom].mean(axis=0) < BORDER_PIXELS
    if not columns.any():  # a few bright pixels in an otherwise black frame
        return None
    return Borders(top, bottom, int(columns.argmax()), int(columns[::-1].argmax()))


def perceptual_hash(picture: Float[np.ndarray, "h w"]) -> int | None:
    """Return 64 bits that stay nearly the same if a frame is resized, compressed, brightened or sharpened.

    Bit 8 u + v is set if the DCT-II coefficient of vertical frequency 1 + u and horizontal frequency 1 + v is above
    the median of all 64 (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010, 3.2.1;
    here the frame itself is transformed, while Zauner first shrinks it to 32×32).

    Returns:
      0 ≤ bits < 2⁶⁴; None for a frame without texture, whose bits would be noise.
    """
    if picture.std(dtype=np.float64) < MIN_TEXTURE:
        return None
    height, width = picture.shape
    coefficients = (_dct_rows(height) @ picture @ _dct_rows(width).T).ravel()
    return int.from_bytes(np.packbits(coefficients > np.median(coefficients), bitorder="little").tobytes(), "little")


@functools.lru_cache(maxsize=64)
def _dct_rows(size: int) -> Float[np.ndarray, "8 size"]:
    """Return the DCT-II's rows of frequencies 1 to 8: cos(π k (2 x + 1) / 2 size)."""
    return np.cos(np.pi / (2 * size) * np.outer(np.arange(1, 9), 2 * np.arange(size) + 1))


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
      pictures: Converts frames to thumbnails.
      letterbox: Also measure black bars, at the stored size.
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
        luma = compute_luma(thumbnail)
        black = is_black(luma)
        bars, height, width = None, 0, 0
        if self._letterbox and not black:
            luma_upright = self._pictures.turn_upright(self._pictures.make_luma(pending.frame), pending.frame)
            bars, (height, width) = find_borders(luma_upright), luma_upright.shape
        self.samples.append(
            FrameSample(
                frame=pending.number,
                steps=steps,
                difference=0.0 if self._previous_luma is None else mean_difference(luma, self._previous_luma),
                black=black,
                sharpness=compute_sharpness(luma),
                hash=perceptual_hash(self._pictures.turn_upright(luma, pending.frame)),
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
        if sample.difference < MAX_STILL_DIFFERENCE:
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
