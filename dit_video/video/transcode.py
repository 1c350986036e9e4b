"""Transcoding of a video file to a smaller one, frame by frame, with the frames and times that `decode` sees."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from dit_video.core.errors import UserError
from dit_video.video.decode import deinterlace, sample_frames
from dit_video.video.encode import TimedPicture, encode_timed
from dit_video.video.reader import TimedFrame, Video
from dit_video.video.to_rgb import RgbConverter, compute_display_size

SPAN_TOLERANCE = 1e-5
"""Seconds by which the times of a span's ends may be off: less than the time between any two frames."""


def transcode(
    source: str | Path | bytes,
    *,
    height: int | None = None,
    width: int | None = None,
    average_fps: float | int | None = None,
    fps: float | int | None = None,
    crf: int,
    first: float | int = 0.0,
    last: float | int = float("inf"),
) -> bytes:
    """Return an H.264 mp4 of a file's frames: upright, in square pixels, resized, 4:2:0 in BT.709, limited range.

    HDR becomes SDR, as in `decode`. Primaries of SDR are unchanged, though the file is tagged BT.709. There is no sound
    (`dit_video.video.cut` adds it).

    Args:
      source: A file, or its bytes.
      height: Height of the result; even. By default that at which the first frame is shown, or one less.
      width: Width of the result; even, with a default like that for `height`.
      average_fps: Frames per second of the file, on average; by default the container's.
      fps: Sampling rate: the frame shown at every time `first + k / fps` is taken. None keeps every frame and its
        time, including variable frame rates.
      crf: Quality, 0 (best) to 51.
      first: Time of the first frame that is taken, in seconds after the file's first frame.
      last: Time of the last frame that is taken.

    Raises:
      DecodeError: If the file is not a readable video, or is damaged.
      UserError: If the height or width is odd.
    """
    with Video(source) as video:
        rate = video.get_rate(2) if average_fps is None else float(average_fps)
        frames = _select_frames(deinterlace(video.read_frames(float(first)), video.name), first, last)
        start = next(frames, None)
        if start is None:
            raise UserError(f"{video.name} has no frame from {first:g} s to {last:g} s; use times of its frames")
        visible = compute_display_size(start.frame, video.sample_aspect, video.name)
        size = (height or visible[0] // 2 * 2, width or visible[1] // 2 * 2)
        convert = RgbConverter(video.name, video.sample_aspect, size, profile=video.profile)
        frames = itertools.chain([start], frames)
        scheduled: Iterator[_ScheduledFrame]
        if fps is None:
            scheduled = ((timed.time - start.time, timed.duration or 1 / rate, timed) for timed in frames)
        else:
            sampled = sample_frames(frames, start.time, fps)
            scheduled = ((count / fps, 1 / fps, timed) for count, timed in enumerate(sampled))
        return encode_timed(_convert_frames(scheduled, convert), float(rate if fps is None else fps), crf=crf)


_ScheduledFrame = tuple[float, float, TimedFrame]
"""Start and duration in seconds of a frame, and the frame."""


def _select_frames(frames: Iterator[TimedFrame], first: float, last: float) -> Iterator[TimedFrame]:
    for timed in frames:
        if timed.time > last + SPAN_TOLERANCE:
            return
        if timed.time >= first - SPAN_TOLERANCE:
            yield timed


def _convert_frames(scheduled: Iterator[_ScheduledFrame], convert: RgbConverter) -> Iterator[TimedPicture]:
    last = picture = None
    for time, seconds, timed in scheduled:
        if picture is None or timed is not last:
            picture = convert(timed.frame, timed.time)
        last = timed
        yield TimedPicture(time, seconds, picture)
