"""Video and image files to frames, whatever PyAV's own ffmpeg reads (no system ffmpeg)."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from dit_video.core.errors import DecodeError, UserError
from dit_video.tokens import Grid
from dit_video.video.clip import Clip
from dit_video.video.interlaced import progressive
from dit_video.video.reader import TOLERANCE, Timed, Video
from dit_video.video.to_rgb import Pictures, shown_size

MAX_BYTES = 1 << 34
"""Of a clip's frames in memory: more is refused rather than left to the machine to end."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a file holds, as `decode` gives it at native size and rate."""

    height: int
    width: int
    frames: int
    fps: float
    """on average"""
    seconds: float
    """of the last frame after the first"""
    codec: str


def decode(
    source: Path | bytes,
    *,
    size: Grid | None = None,
    frames: int | None = None,
    start: float = 0.0,
    fps: float | int | None = None,
) -> Clip:
    """The frames of a video or image file, upright and in square pixels, in full-range RGB.

    Rotation and flips, the shape of pixels, the matrix and range of colours are taken from the file, as ffmpeg does;
    what a file leaves unsaid is guessed as players do. Transparent pixels are shown over black. Interlaced frames are
    deinterlaced, one picture a frame. The transfer function is left as it is: HDR (PQ, HLG) is not mapped to sRGB.

    Args:
      source: a file, or its bytes.
      size: number of frames, height and width to return; pictures are resized by an anti-aliased triangle filter,
        without regard to the aspect ratio. By default the size they are shown at.
      frames: how many frames to return, at the height and width they are shown at; `size` says it too.
      start: seconds after the first frame; the first frame returned is the one shown then.
      fps: sample at this rate: of every time `start + k / fps` the frame that is shown then, which is the nearest at or
        before it (a rate above the native one repeats frames). By default all frames, at the stream's average rate.

    Raises:
      MissingError: no such file.
      DecodeError: not a readable video or image, or damaged: then it says at which second.
      UserError: fewer frames than asked for, or arguments that are out of range or contradict each other.
    """
    wanted = _wanted(size, frames, start, fps)
    with Video(source) as video:
        convert = Pictures(video.name, video.sample_aspect, None if size is None else (size.h, size.w))
        pictures: list[np.ndarray] = []
        last = None
        for timed in sampled(progressive(video.frames(start), video.name), start, fps, wanted):
            # A frame that is sampled twice is the same object twice: it is converted once.
            pictures.append(pictures[-1] if timed is last else convert(timed.frame, timed.time))
            last = timed
            if len(pictures) * pictures[0].nbytes > MAX_BYTES:
                raise UserError(
                    f"{video.name} gives a clip of more than {MAX_BYTES >> 30} GiB of frames; ask for fewer frames, a "
                    "lower fps or a smaller size"
                )
        rate = video.rate(len(pictures))
    if not pictures:
        raise _no_frames(video.name, start)
    if wanted is not None and len(pictures) < wanted:
        raise UserError(
            f"{video.name} has {len(pictures)} frames from {start:g} s on, {wanted} were asked for; ask for fewer"
        )
    if any(picture.shape != pictures[0].shape for picture in pictures):
        raise DecodeError(f"{video.name} changes its size on the way, a clip has one; give the size, or cut it there")
    return Clip(frames=np.stack(pictures), fps=float(rate if fps is None else fps))


def probe(source: Path | bytes, *, see: Callable[[float, av.VideoFrame], None] | None = None) -> Facts:
    """What `decode(source)` would give; decodes the whole file, as containers do not all say how many frames they hold.

    Args:
      source: a file, or its bytes.
      see: called with every frame, in order, and its seconds after the first one: as it is stored, not turned,
        of any format. (Who reads a frame's side data keeps it in memory until the garbage collector runs.)

    Raises:
      MissingError: no such file.
      DecodeError: not a readable video or image, or damaged.
    """
    with Video(source) as video:
        count, shown, last = 0, (0, 0), 0.0
        for timed in video.frames():
            if not count:
                shown = shown_size(timed.frame, video.sample_aspect, video.name)
                Pictures(video.name, video.sample_aspect, (8, 8))(timed.frame, timed.time)  # raises where decode would
            if see is not None:
                see(timed.time, timed.frame)
            count, last = count + 1, timed.time
    if not count:
        raise _no_frames(video.name, 0.0)
    fps = average_rate(count, last, video.rate(count))
    return Facts(height=shown[0], width=shown[1], frames=count, fps=fps, seconds=last, codec=video.codec)


def average_rate(frames: int, seconds: float, said: float) -> float:
    """Frames a second: what the container says, where its frames' times agree with it to half a frame.

    Args:
      frames: how many there are.
      seconds: of the last one after the first.
      said: by the container.
    """
    agrees = abs(seconds - (frames - 1) / said) <= 0.5 / said
    return said if agrees or frames < 2 or seconds <= 0 else (frames - 1) / seconds


def _wanted(size: Grid | None, frames: int | None, start: float, fps: float | int | None) -> int | None:
    if size is not None and frames is not None and size.t != frames:
        raise UserError(f"size={size.t}x{size.h}x{size.w} and frames={frames} disagree; give one of them")
    wanted = frames if size is None else size.t
    if (size is not None and min(size) < 1) or (wanted is not None and wanted < 1):
        raise UserError(f"frames, height and width are at least 1, {size or wanted} was given")
    if not 0 <= start < float("inf"):
        raise UserError(f"start is a number of seconds from 0 on, {start} was given")
    if fps is not None and not 0 < fps < float("inf"):
        raise UserError(f"fps is a positive number, {fps} was given")
    return wanted


def _no_frames(name: str, start: float) -> UserError:
    if start > 0:
        return UserError(f"{name} ends before {start:g} s; use an earlier start")
    return DecodeError(f"{name} holds no whole frame; a clip has at least one: remove it or replace it")


def sampled(
    frames: Iterator[Timed], start: float, fps: float | int | None, wanted: int | None = None
) -> Iterator[Timed]:
    """Of every sampling time the latest frame at or before it; without `fps` all from the one shown at `start`.

    A frame that is sampled twice is the same object twice.
    """
    return itertools.islice(_from(frames, start) if fps is None else _at_rate(frames, start, float(fps)), wanted)


def _from(frames: Iterator[Timed], start: float) -> Iterator[Timed]:
    if not start:  # also frames of one and the same time
        yield from frames
        return
    shown = None
    for timed in frames:
        if timed.time > start + TOLERANCE:
            if shown is not None:
                yield shown
            shown = None
            yield timed
        else:
            shown = timed
    if shown is not None and _ends_after(shown, start):
        yield shown


def _at_rate(frames: Iterator[Timed], start: float, fps: float) -> Iterator[Timed]:
    count, shown = 0, None
    for timed in frames:
        while shown is not None and start + count / fps < timed.time - TOLERANCE:
            yield shown
            count += 1
        shown = timed
    while shown is not None and _ends_after(shown, start + count / fps):
        yield shown
        count += 1


def _ends_after(last: Timed, moment: float) -> bool:
    """Whether a stream's last frame is still shown at `moment`."""
    return moment <= last.time + TOLERANCE or moment < last.time + last.seconds - TOLERANCE
