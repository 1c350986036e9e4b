"""Deinterlacing of frames by ffmpeg's bwdif."""

import contextlib
from collections import deque
from collections.abc import Iterator

import av

from dit_video.video.filters import get_frame_format, make_filter_graph
from dit_video.video.reader import TimedFrame, wrap_decode_errors

_LOCATION = "where it is interlaced"
"""Location of damage in error messages."""


def deinterlace(frames: Iterator[TimedFrame], name: str) -> Iterator[TimedFrame]:
    """Yield the same frames at the same times, with interlaced ones deinterlaced, one picture per frame.

    A picture is made of its frame and the lines of the frames before and after it (Weston's and yadif's filters:
    ffmpeg's bwdif), so a frame is yielded when the next one has been read. Progressive frames are unchanged.

    Raises:
      DecodeError: ffmpeg can't filter the frames of the file `name`.
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
    """A filter graph for frames of one format, with one output per input."""

    def __init__(self, frame: av.VideoFrame, name: str):
        self.frame_format = get_frame_format(frame)
        self._name = name
        self._pending: deque[TimedFrame | None] = deque()
        with wrap_decode_errors(name, _LOCATION):
            self._graph = make_filter_graph(frame, ("bwdif", "mode=send_frame:parity=auto:deint=interlaced"))

    def push(self, timed: TimedFrame, *, keep_output: bool = True) -> None:
        with wrap_decode_errors(self._name, f"at {timed.time:.2f} s"):
            self._graph.push(timed.frame)
        self._pending.append(timed if keep_output else None)

    def pull(self) -> Iterator[TimedFrame]:
        while self._pending:
            frame = None
            with wrap_decode_errors(self._name, _LOCATION), contextlib.suppress(BlockingIOError, EOFError):
                frame = self._graph.vpull()
            if frame is None:
                return
            timed = self._pending.popleft()
            if timed is not None:
                yield timed._replace(frame=frame)

    def finish(self) -> Iterator[TimedFrame]:
        with wrap_decode_errors(self._name, _LOCATION):
            self._graph.push(None)
        yield from self.pull()
