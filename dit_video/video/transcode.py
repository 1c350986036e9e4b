"""Transcoding of a video file to a smaller one, frame by frame, with the frames and times that `decode` sees."""

from collections.abc import Iterator

from dit_video.video.decode import sample_frames
from dit_video.video.deinterlace import deinterlace
from dit_video.video.encode import TimedPicture, encode_timed
from dit_video.video.reader import TimedFrame, Video
from dit_video.video.to_rgb import RgbConverter


def transcode(
    encoded: bytes, *, height: int, width: int, average_fps: float | int, fps: float | int | None = None, crf: int
) -> bytes:
    """Return an H.264 mp4 of a file's frames: upright, in square pixels, resized, 4:2:0 in BT.709, limited range.

    HDR becomes SDR, as in `decode`. Primaries of SDR are unchanged, though the file is tagged BT.709. Audio is dropped.

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
        convert = RgbConverter(video.name, video.sample_aspect, (height, width))
        frames = deinterlace(video.read_frames(), video.name)
        scheduled: Iterator[_ScheduledFrame]
        if fps is None:
            scheduled = ((timed.time, timed.duration or 1 / average_fps, timed) for timed in frames)
        else:
            scheduled = ((count / fps, 1 / fps, timed) for count, timed in enumerate(sample_frames(frames, 0.0, fps)))
        return encode_timed(_convert_frames(scheduled, convert), float(average_fps if fps is None else fps), crf=crf)


_ScheduledFrame = tuple[float, float, TimedFrame]
"""Start and duration in seconds of a frame, and the frame."""


def _convert_frames(scheduled: Iterator[_ScheduledFrame], convert: RgbConverter) -> Iterator[TimedPicture]:
    last = picture = None
    for time, seconds, timed in scheduled:
        if picture is None or timed is not last:
            picture = convert(timed.frame, timed.time)
        last = timed
        yield TimedPicture(time, seconds, picture)
