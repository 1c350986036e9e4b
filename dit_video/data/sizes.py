"""From a clip's native size to its training size: never cropped, never enlarged."""

import math
from dataclasses import dataclass, replace

from dit_video.core.errors import DecodeError, UserError
from dit_video.data.clips import ClipInfo, ClipSource
from dit_video.tokens import Grid
from dit_video.video import TOLERANCE, Clip, decode


@dataclass(frozen=True, kw_only=True)
class SizeLimits:
    """Which sizes a model trains at.

    Raises:
      UserError: limits that no size meets.
    """

    max_pixels: int
    """a frame: height times width"""
    max_frames: int
    multiple: Grid
    """Lengths are 1 + k * multiple.t (a causal autoencoder's first frame stands alone); heights and widths are
    multiples of multiple.h and multiple.w: the autoencoder's stride times the patch."""
    fps: float | None = None
    """Clips of a higher rate are resampled to this one; None keeps every clip's own average rate."""

    def __post_init__(self):
        if min(self.multiple) < 1:
            raise UserError(f"multiple={tuple(self.multiple)} must be at least 1 along each axis")
        if self.max_frames < 1:
            raise UserError(f"max_frames={self.max_frames} must be at least 1")
        if self.fps is not None and not self.fps > 0:
            raise UserError(f"fps={self.fps} must be positive, or None for every clip's own rate")
        least = self.multiple.h * self.multiple.w
        if self.max_pixels < least:
            raise UserError(
                f"max_pixels={self.max_pixels} is less than one multiple of {self.multiple.h}x{self.multiple.w}; "
                f"use at least {least}"
            )


def sampled_fps(info: ClipInfo, limits: SizeLimits) -> float:
    """The rate at which a clip is sampled: the limits', or its own where that is lower (frames are never doubled)."""
    return info.fps if limits.fps is None else min(info.fps, limits.fps)


def sampled_frames(info: ClipInfo, limits: SizeLimits) -> int:
    """How many frames a clip has at `sampled_fps`: those shown at 0, 1/fps, 2/fps, … up to the start of its last."""
    # With the tolerance of `decode`; 1e-6 takes up the rounding of the product.
    return 1 + math.floor((info.seconds + TOLERANCE) * sampled_fps(info, limits) + 1e-6)


def fit(info: ClipInfo, limits: SizeLimits) -> Grid:
    """The training size of a clip in frames and pixels: the largest within the limits.

    The aspect ratio is kept to within half a multiple: one side is what the other side and the ratio ask for, rounded.
    Frames past `max_frames` (rounded down to 1 + k * multiple.t) belong to further windows of the clip.

    Raises:
      UserError: the clip is smaller than one multiple, or so narrow that no size within the limits keeps its shape.
    """
    t, h, w = limits.multiple
    if info.height < h or info.width < w:
        raise UserError(
            f"{info.name} has {info.height}x{info.width} pixels, less than one multiple of {h}x{w}; "
            "leave it out or use a smaller stride or patch"
        )
    length = 1 + (min(sampled_frames(info, limits), limits.max_frames) - 1) // t * t
    ratio = info.width / info.height
    rows, columns = info.height // h, info.width // w
    candidates = {(row, _nearest(row * h * ratio / w, columns)) for row in range(1, rows + 1)}
    candidates |= {(_nearest(column * w / ratio / h, rows), column) for column in range(1, columns + 1)}
    sizes = [(row * h, column * w) for row, column in candidates]
    sizes = [size for size in sizes if size[0] * size[1] <= limits.max_pixels and _keeps(size, ratio, limits.multiple)]
    if not sizes:
        raise UserError(
            f"{info.name} has {info.height}x{info.width} pixels: no size of at most {limits.max_pixels} pixels in "
            f"multiples of {h}x{w} keeps its shape; raise max_pixels or leave it out"
        )
    height, width = max(sizes, key=lambda size: (size[0] * size[1], -abs(math.log(size[1] / size[0] / ratio)), size))
    return Grid(length, height, width)


def read_fitted(source: ClipSource, index: int, limits: SizeLimits, *, start: int = 0) -> Clip:
    """Decode one clip of a source at its training size: `fit(...).t` frames from sampled frame `start` on.

    Frames are taken by their timestamps: of every moment the one shown then, be the rate constant or not.

    Raises:
      UserError: the clip has no training size, or too few frames after `start`.
      DecodeError: its bytes are damaged.
    """
    info = source.infos[index]
    size, fps, total = fit(info, limits), sampled_fps(info, limits), sampled_frames(info, limits)
    if not 0 <= start <= total - size.t:
        raise UserError(f"{info.name} has {total} frames at {fps:g} fps, {size.t} from frame {start} on were asked for")
    encoded = source[index]
    try:
        clip = decode(encoded, size=size, start=info.start + start / fps, fps=fps)
    except DecodeError:
        raise
    except UserError as error:  # fewer frames than it had when it was ingested
        raise DecodeError(str(error)) from error
    return replace(clip, caption=info.caption)


def _nearest(value: float, most: int) -> int:
    return min(max(1, math.floor(value + 0.5)), most)


def _keeps(size: tuple[int, int], ratio: float, multiple: Grid) -> bool:
    """Whether one side lies within half a multiple of what the other one asks for."""
    height, width = size
    return abs(width - height * ratio) <= multiple.w / 2 or abs(height - width / ratio) <= multiple.h / 2
