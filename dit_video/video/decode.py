"""Decoding of video and image files, in any format that PyAV's own ffmpeg reads (no system ffmpeg)."""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import numpy as np

from dit_video.core.errors import DecodeError, UserError
from dit_video.core.grid import Grid
from dit_video.video.background import BLACK, Colour, read_file_background
from dit_video.video.clip import Clip
from dit_video.video.comments import read_caption
from dit_video.video.reader import TOLERANCE, TimedFrame, Video, get_frame_format, make_filter_graph, wrap_decode_errors
from dit_video.video.to_rgb import (
    RgbConverter,
    compute_display_size,
    get_transfer,
    is_transparent,
    make_resize_error,
)

MAX_BYTES = 1 << 34
"""Maximum bytes of a clip's frames: more raises an error instead of exhausting the machine's memory."""
_WHERE_INTERLACED = "where it is interlaced"
"""Location of damage in error messages."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """Properties of a file's video, as `decode` returns it at native size and rate."""

    height: int
    width: int
    frames: int
    """Number of frames."""
    fps: float
    """Average frames per second."""
    seconds: float
    """Time of the last frame, in seconds after the first."""
    codec: str
    """Name of ffmpeg's decoder."""
    transfer: str = "sdr"
    """Transfer function of the first frame: "sdr", or "pq" or "hlg" for HDR, which `decode` maps to SDR."""
    transparent: bool = False
    """Whether a pixel is transparent."""


def decode(
    source: str | Path | bytes,
    *,
    size: Grid | None = None,
    frames: int | None = None,
    start: float = 0.0,
    fps: float | int | None = None,
    background: Colour | Literal["file"] = BLACK,
) -> Clip:
    """Decode a video or image file to upright frames in square pixels and full-range RGB.

    Rotation and flips, pixel aspect ratio, colour matrix and range are read from the file, as ffmpeg does; values that
    are missing are guessed as players do. Transparent pixels are blended over a colour. Interlaced frames are
    deinterlaced, one picture per frame. HDR (PQ, HLG) is mapped to standard dynamic range: diffuse white becomes 255,
    and highlights are clipped. The caption is that of the clip that was saved; empty in files of other programs.

    Args:
      source: A file, or its bytes.
      size: Number of frames, height and width to return; pictures are resized by an anti-aliased triangle filter,
        without regard to the aspect ratio. By default the display size.
      frames: Number of frames to return, at the display size; an alternative to `size`.
      start: Seconds after the first frame; the first frame returned is the one shown at that time.
      fps: Sampling rate: the frame shown at every time `start + k / fps` is returned, which is the latest one at or
        before it (a rate above the native one repeats frames). By default all frames, at the stream's average rate.
      background: Colour behind transparent pixels, or "file" for the one that a GIF, PNG, APNG or WebP file names,
        which is black if it names none.

    Raises:
      MissingError: If the file does not exist.
      DecodeError: If the file is not a readable video or image, is damaged, or its frames change their size; the
        message says at which second.
      UserError: If there are fewer frames than requested, or arguments are out of range or contradict each other.
    """
    count = _check_request(size, frames, start, fps)
    with Video(source) as video:
        convert = RgbConverter(
            video.name,
            video.sample_aspect,
            None if size is None else (size.h, size.w),
            profile=video.profile,
            background=(read_file_background(video.read_content()) or BLACK) if background == "file" else background,
        )
        pictures: list[np.ndarray] = []
        first = last = None
        for timed in sample_frames(deinterlace(video.read_frames(start), video.name), start, fps, count):
            # A frame that is sampled twice is the same object twice and is converted once.
            pictures.append(pictures[-1] if timed is last else convert(timed.frame, timed.time))
            first, last = first or timed, timed
            if len(pictures) * pictures[0].nbytes > MAX_BYTES:
                raise UserError(
                    f"a clip of {video.name} would exceed {MAX_BYTES >> 30} GiB of frames; use fewer frames, a lower "
                    "fps or a smaller size"
                )
        rate, caption = video.get_rate(len(pictures)), read_caption(video)
    if first is not None and last is not None:
        rate = compute_average_fps(len(pictures), last.time - first.time, rate)
    if not pictures:
        raise _make_no_frames_error(video.name, start)
    if count is not None and len(pictures) < count:
        raise UserError(
            f"{video.name} has {len(pictures)} frames from {start:g} s on, but {count} were requested; use fewer"
        )
    return Clip(frames=np.stack(pictures), fps=float(rate if fps is None else fps), caption=caption)


def probe(
    source: str | Path | bytes,
    *,
    on_frame: Callable[[float, av.VideoFrame], None] | None = None,
    on_resize: Callable[[int, tuple[int, int]], None] | None = None,
    is_exact: bool = True,
) -> VideoInfo:
    """Return the properties of `decode(source)`; decodes the whole file, as not all containers count their frames.

    Args:
      source: A file, or its bytes.
      on_frame: Function called with every frame, in order, and its time in seconds after the first: frames are as
        stored, not upright, of any format. (Reading side data keeps a frame in memory until garbage collection.)
      on_resize: Function called with the number of each frame from which on frames have another size, and the height
        and width at which they are shown. Without it such a file is refused; with it, the info has the first size.
      is_exact: False to decode faster, see `Video`.

    Raises:
      MissingError: If the file does not exist.
      DecodeError: If the file is not a readable video or image, is damaged, or its frames change their size.
    """
    with Video(source, is_exact=is_exact) as video:
        count, size, last_time, stored_size, transfer, transparent = 0, (0, 0), 0.0, (0, 0), "sdr", False
        for timed in video.read_frames():
            before, stored_size = stored_size, (timed.frame.height, timed.frame.width)
            if count and stored_size != before:
                if on_resize is None:
                    raise make_resize_error(video.name, before, stored_size, timed.time)
                on_resize(count, compute_display_size(timed.frame, video.sample_aspect, video.name))
            if not count:
                size = compute_display_size(timed.frame, video.sample_aspect, video.name)
                transfer = get_transfer(timed.frame)
                # Raises the errors of `decode`.
                RgbConverter(video.name, video.sample_aspect, (8, 8))(timed.frame, timed.time)
            with wrap_decode_errors(video.name, f"at {timed.time:.2f} s"):
                transparent = transparent or is_transparent(timed.frame)
            if on_frame is not None:
                on_frame(timed.time, timed.frame)
            count, last_time = count + 1, timed.time
    if not count:
        raise _make_no_frames_error(video.name, 0.0)
    fps = compute_average_fps(count, last_time, video.get_rate(count))
    return VideoInfo(
        height=size[0],
        width=size[1],
        frames=count,
        fps=fps,
        seconds=last_time,
        codec=video.codec,
        transfer=transfer,
        transparent=transparent,
    )


def compute_average_fps(frames: int, last_time: float, container_fps: float) -> float:
    """Return frames per second: the container's, if its frames' times agree with it to half a frame.

    Args:
      frames: Number of frames.
      last_time: Time of the last frame, in seconds after the first.
      container_fps: Frames per second that the container states.
    """
    agrees = abs(last_time - (frames - 1) / container_fps) <= 0.5 / container_fps
    return container_fps if agrees or frames < 2 or last_time <= 0 else (frames - 1) / last_time


def sample_frames(
    frames: Iterator[TimedFrame], start: float, fps: float | int | None, count: int | None = None
) -> Iterator[TimedFrame]:
    """Yield the latest frame at or before every sampling time; without `fps` all from the one shown at `start`.

    A frame that is sampled twice is the same object twice.
    """
    sampled = _skip_to_start(frames, start) if fps is None else _sample_at_rate(frames, start, float(fps))
    return itertools.islice(sampled, count)


def deinterlace(frames: Iterator[TimedFrame], name: str) -> Iterator[TimedFrame]:
    """Yield the same frames at the same times, with interlaced ones deinterlaced, one picture per frame.

    A picture is made of its frame and the lines of the frames before and after it (Weston's and yadif's filters:
    ffmpeg's bwdif), so a frame is yielded when the next one has been read. Progressive frames are unchanged.

    Raises:
      DecodeError: If ffmpeg can't filter the frames of the file `name`.
    """
    active_filter: _DeinterlaceFilter | None = None
    previous: TimedFrame | None = None
    for timed in frames:
        if active_filter is not None and active_filter.frame_format != get_frame_format(timed.frame):
            yield from active_filter.finish()
            active_filter = None
        if active_filter is None and timed.frame.interlaced_frame:
            active_filter = _DeinterlaceFilter(timed.frame, name)
            if previous is not None and active_filter.frame_format == get_frame_format(previous.frame):
                active_filter.push(previous, keep_output=False)  # a picture must not depend on where reading began
        if active_filter is None:
            yield timed
        else:
            active_filter.push(timed)
            yield from active_filter.pull()
        previous = timed
    if active_filter is not None:
        yield from active_filter.finish()


class _DeinterlaceFilter:
    """ffmpeg's bwdif for frames of one format, with one output per input."""

    def __init__(self, frame: av.VideoFrame, name: str):
        self.frame_format = get_frame_format(frame)
        self._name = name
        self._pending: deque[TimedFrame | None] = deque()
        with wrap_decode_errors(name, _WHERE_INTERLACED):
            self._graph = make_filter_graph(frame, ("bwdif", "mode=send_frame:parity=auto:deint=interlaced"))

    def push(self, timed: TimedFrame, *, keep_output: bool = True) -> None:
        with wrap_decode_errors(self._name, f"at {timed.time:.2f} s"):
            self._graph.push(timed.frame)
        self._pending.append(timed if keep_output else None)

    def pull(self) -> Iterator[TimedFrame]:
        while self._pending:
            frame = None
            with wrap_decode_errors(self._name, _WHERE_INTERLACED), contextlib.suppress(BlockingIOError, EOFError):
                frame = self._graph.vpull()
            if frame is None:
                return
            timed = self._pending.popleft()
            if timed is not None:
                yield timed._replace(frame=frame)

    def finish(self) -> Iterator[TimedFrame]:
        with wrap_decode_errors(self._name, _WHERE_INTERLACED):
            self._graph.push(None)
        yield from self.pull()


def _check_request(size: Grid | None, frames: int | None, start: float, fps: float | int | None) -> int | None:
    if size is not None and frames is not None and size.t != frames:
        raise UserError(f"size={size} and frames={frames} disagree; use one of them")
    count = frames if size is None else size.t
    if (size is not None and min(size) < 1) or (count is not None and count < 1):
        raise UserError(f"size or frames={size or count} is invalid: use at least 1 frame, and 1 pixel of each side")
    if not 0 <= start < float("inf"):
        raise UserError(f"start={start} is invalid: use a number of seconds from 0 on")
    if fps is not None and not 0 < fps < float("inf"):
        raise UserError(f"fps={fps} is invalid: use a positive number")
    return count


def _make_no_frames_error(name: str, start: float) -> UserError:
    if start > 0:
        return UserError(f"{name} ends before {start:g} s; use an earlier start")
    return DecodeError(f"{name} has no complete frame, and a clip has at least one; remove it or replace it")


def _skip_to_start(frames: Iterator[TimedFrame], start: float) -> Iterator[TimedFrame]:
    if not start:  # the rule below would drop all but the last of several frames at time 0
        yield from frames
        return
    current = None
    for timed in frames:
        if timed.time > start + TOLERANCE:
            if current is not None:
                yield current
            current = None
            yield timed
        else:
            current = timed
    if current is not None and _is_shown_at(current, start):
        yield current


def _sample_at_rate(frames: Iterator[TimedFrame], start: float, fps: float) -> Iterator[TimedFrame]:
    count, current = 0, None
    for timed in frames:
        while current is not None and start + count / fps < timed.time - TOLERANCE:
            yield current
            count += 1
        current = timed
    while current is not None and _is_shown_at(current, start + count / fps):
        yield current
        count += 1


def _is_shown_at(last: TimedFrame, time: float) -> bool:
    """Return whether a stream's last frame is still shown at `time`."""
    return time <= last.time + TOLERANCE or time < last.time + last.duration - TOLERANCE
