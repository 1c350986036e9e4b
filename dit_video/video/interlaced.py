"""Deinterlacing of frames by ffmpeg's bwdif."""

import contextlib
from collections import deque
from collections.abc import Iterator

import av

from dit_video.video.filters import chain, shape_of
from dit_video.video.reader import Timed, complaints


def progressive(frames: Iterator[Timed], name: str) -> Iterator[Timed]:
    """Yield the same frames at the same times, with interlaced ones deinterlaced, one picture per frame.

    A picture is made of its frame and the lines of the frames before and after it (Weston's and yadif's filters:
    ffmpeg's bwdif), so a frame is yielded when the next one has been read. Progressive frames are unchanged.

    Raises:
      DecodeError: ffmpeg can't filter the frames of the file `name`.
    """
    active_filter: _Filter | None = None
    previous: Timed | None = None
    for timed in frames:
        if active_filter is not None and active_filter.shape != shape_of(timed.frame):
            yield from active_filter.finish()
            active_filter = None
        if active_filter is None and timed.frame.interlaced_frame:
            active_filter = _Filter(timed.frame, name)
            if previous is not None and active_filter.shape == shape_of(previous.frame):
                active_filter.push(previous, shown=False)  # a picture must not depend on where reading began
        if active_filter is None:
            yield timed
        else:
            active_filter.push(timed)
            yield from active_filter.ready()
        previous = timed
    if active_filter is not None:
        yield from active_filter.finish()


class _Filter:
    """A filter graph for frames of one format, with one output per input."""

    def __init__(self, frame: av.VideoFrame, name: str):
        self.shape = shape_of(frame)
        self._name = name
        self._pending: deque[Timed | None] = deque()
        with complaints(name, "where it is interlaced"):
            self._graph = chain(frame, ("bwdif", "mode=send_frame:parity=auto:deint=interlaced"))

    def push(self, timed: Timed, *, shown: bool = True) -> None:
        with complaints(self._name, f"at {timed.time:.2f} s"):
            self._graph.push(timed.frame)
        self._pending.append(timed if shown else None)

    def ready(self) -> Iterator[Timed]:
        while self._pending:
            frame = None
            with complaints(self._name, "where it is interlaced"), contextlib.suppress(BlockingIOError, EOFError):
                frame = self._graph.vpull()
            if frame is None:
                return
            timed = self._pending.popleft()
            if timed is not None:
                yield timed._replace(frame=frame)

    def finish(self) -> Iterator[Timed]:
        with complaints(self._name, "where it is interlaced"):
            self._graph.push(None)
        yield from self.ready()
