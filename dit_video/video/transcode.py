"""Transcoding of a video file to a smaller one, frame by frame, with the frames and times that `decode` sees."""

from collections.abc import Iterator

from dit_video.video.decode import sampled
from dit_video.video.encode import Shown, encode_shown
from dit_video.video.interlaced import progressive
from dit_video.video.reader import Timed, Video
from dit_video.video.to_rgb import Pictures


def transcode(
    encoded: bytes, *, height: int, width: int, average: float | int, fps: float | int | None = None, crf: int
) -> bytes:
    """Return an H.264 mp4 of a file's frames: upright, in square pixels, resized, 4:2:0 in BT.709, limited range.

    Primaries and transfer are unchanged, as in `decode`, though the file is tagged BT.709. Audio is dropped.

    Args:
      encoded: bytes of the file.
      height: height of the result; even.
      width: width of the result; even.
      average_fps: frames per second of the file, on average.
      fps: sampling rate: the frame shown at every time `k / fps` is taken. None keeps every frame and its time,
        including variable frame rates.
      crf: quality, 0 (best) to 51.

    Raises:
      DecodeError: not a readable video, or damaged.
      UserError: an odd height or width.
    """
    with Video(encoded) as video:
        convert = Pictures(video.name, video.sample_aspect, (height, width))
        frames = progressive(video.frames(), video.name)
        scheduled = _as_they_are(frames, 1 / average) if fps is None else _at_rate(frames, float(fps))
        return encode_shown(_pictures(scheduled, convert), float(average if fps is None else fps), crf=crf)


_Place = tuple[float, float, Timed]
"""Start and duration in seconds of a frame, and the frame."""


def _as_they_are(frames: Iterator[Timed], spacing: float) -> Iterator[_Place]:
    for timed in frames:
        yield timed.time, timed.seconds or spacing, timed


def _at_rate(frames: Iterator[Timed], fps: float) -> Iterator[_Place]:
    for count, timed in enumerate(sampled(frames, 0.0, fps)):
        yield count / fps, 1 / fps, timed


def _pictures(places: Iterator[_Place], convert: Pictures) -> Iterator[Shown]:
    last = picture = None
    for time, seconds, timed in places:
        if picture is None or timed is not last:
            picture = convert(timed.frame, timed.time)
        last = timed
        yield Shown(time, seconds, picture)
