"""Interlaced frames to progressive ones, by ffmpeg's bwdif."""

import contextlib
from collections import deque
from collections.abc import Iterator

import av

from dit_video.video.filters import chain, shape_of
from dit_video.video.reader import Timed, complaints


def progressive(frames: Iterator[Timed], name: str) -> Iterator[Timed]:
    """The same frames at the same times, those that are flagged as interlaced deinterlaced: one picture a frame.

    A picture is made of its frame and the lines of the frames before and after it (Weston's and yadif's filters:
    ffmpeg's bwdif), so a frame comes when the one after it has been read. Others pass as they are.

    Raises:
      DecodeError: ffmpeg can't filter the frames of the file of this name.
    """
    filtered: _Filter | None = None
    before: Timed | None = None
    for timed in frames:
        if filtered is not None and filtered.shape != shape_of(timed.frame):
            yield from filtered.finish()
            filtered = None
        if filtered is None and timed.frame.interlaced_frame:
            filtered = _Filter(timed.frame, name)
            if before is not None and filtered.shape == shape_of(before.frame):
                filtered.push(before, shown=False)  # so that a picture doesn't depend on where reading began
        if filtered is None:
            yield timed
        else:
            filtered.push(timed)
            yield from filtered.ready()
        before = timed
    if filtered is not None:
        yield from filtered.finish()


class _Filter:
    """A filter graph for frames of one shape; as many come out as go in."""

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
