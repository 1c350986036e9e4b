"""A video or image file to its frames, each with the time from which it is shown, whatever ffmpeg makes of the file."""

import contextlib
import io
import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, cast

import av
from av.container import Flags
from av.stream import Discard, Disposition

from dit_video.core.errors import DecodeError, MissingError, UserError
from dit_video.video.mp4_header import check_promises

MAX_PIXELS = 1 << 28
"""Of one frame, stored or shown: a damaged header may promise more than any camera's, and memory for it."""
LONGEST_FRAME = 3600.0
"""Seconds that a frame may be shown: timestamps further apart are damaged, and would be sampled without end."""
TOLERANCE = 1e-3
"""Seconds by which a frame may come late: containers round timestamps to as much as a millisecond."""
IMAGE_CODECS = {"png", "mjpeg", "bmp", "tiff", "jpeg2000", "webp"}
"""A file of one frame in one of these is an image: its fps is 1."""

_MARGIN = 1.0
"""Seconds before the wanted time that a seek aims at: the index of some containers is coarse."""
_BUFFER = 1 << 18
"""Bytes read at once: a read is a call into Python."""
_COMPLAINTS = (av.FFmpegError, ValueError, ArithmeticError, LookupError, MemoryError, EOFError, OSError)
"""What PyAV raises on damaged files: ffmpeg's errors, text that is no UTF-8, rates of n/0, sizes that overflow."""
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""ffmpeg's own decoders of these leave transparency out."""


class Timed(NamedTuple):
    """A decoded frame."""

    time: float
    """seconds after the file's first frame from which it is shown"""
    seconds: float
    """for which it is shown, as far as the file says: 0 where it doesn't"""
    frame: av.VideoFrame


@contextlib.contextmanager
def complaints(name: str, when: str = "") -> Iterator[None]:
    """What ffmpeg and PyAV raise about a file becomes a `DecodeError` of one line."""
    try:
        yield
    except UserError:
        raise
    except _COMPLAINTS as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
        said = f"is damaged {when}" if when else "is not a readable video or image"
        raise DecodeError(f"{name} {said} ({reason}); remove it or replace it") from error


class Video:
    """An open file and its video stream. A context manager.

    Raises:
      MissingError: no such file.
      DecodeError: not a readable video or image.
    """

    def __init__(self, source: Path | bytes):
        self.name = f"video of {len(source)} bytes" if isinstance(source, bytes) else str(source)
        if isinstance(source, Path) and not source.is_file():
            raise MissingError(f"no such video or image file: {source}")
        self._source = source
        self._resources = contextlib.ExitStack()
        self._reopen()

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._resources.close()

    def _reopen(self) -> None:
        """Be at the beginning of the file."""
        self.close()
        try:
            with complaints(self.name):
                self._read_header(self._open())
        except BaseException:
            self.close()
            raise

    def _open(self) -> av.container.InputContainer:
        # Always by reads of our own: ffmpeg takes a name for a pattern (clip%02d.png) or a protocol (12:30.mp4) …
        source = self._source
        file = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb", buffering=0)
        self._resources.callback(file.close)
        check_promises(file, self.name)
        # … and a playlist that calls itself a video would open further files, or addresses.
        options = {"protocol_whitelist": "none", "max_pixels": str(MAX_PIXELS)}
        container = av.open(file, "r", options=options, buffer_size=_BUFFER, metadata_errors="replace")
        self._resources.callback(container.close)
        # ffmpeg's guesses at absent timestamps are wrong where frames are reordered (H.264 in AVI).
        container.flags &= ~cast(int, Flags.gen_pts.value)
        return container

    def _read_header(self, container: av.container.InputContainer) -> None:
        streams = [
            stream
            for stream in container.streams.video
            if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic  # a cover
        ]
        if not streams:
            raise DecodeError(f"{self.name} holds no video stream that can be read; remove it or convert it to H.264")
        stream = streams[0]
        context = stream.codec_context
        self.codec: str = context.name
        if stream.metadata.get("alpha_mode") == "1" and self.codec in _WITH_ALPHA:
            context = cast(av.VideoCodecContext, av.CodecContext.create(_WITH_ALPHA[self.codec], "r"))
        context.thread_count = 1
        context.options = {"max_pixels": str(MAX_PIXELS)}
        self._container, self._stream, self._context = container, stream, context
        self._start: int | None = stream.start_time
        self._where = "at its start"
        for other in container.streams:
            if other is not stream:
                other.discard = Discard.all
        aspect = stream.sample_aspect_ratio
        self.sample_aspect: Fraction = aspect if aspect is not None and aspect > 0 else Fraction(1)
        """Width of a stored pixel by its height."""
        # The average of a stream without timestamps is ffmpeg's default of 25.
        known = [stream.average_rate, stream.guessed_rate, stream.base_rate]
        self._rate = next((float(rate) for rate in (known if self._start is not None else known[1:]) if rate), 25.0)

    def rate(self, frames: int) -> float:
        """Frames a second on average, where the file holds so many frames: 1 of an image."""
        return 1.0 if frames == 1 and self.codec in IMAGE_CODECS else self._rate

    def frames(self, start: float = 0.0) -> Iterator[Timed]:
        """The frames shown from `start` seconds on, and some before them: from a key frame on, or all.

        Times never fall. Frames are as they are stored: interlaced ones too.

        Raises:
          DecodeError: the file is damaged; says where.
        """
        frames, origin = self._sought(start) if start > _MARGIN else (self._decoded(), None)
        spacing, previous = 1 / self._rate, None
        for frame in frames:
            base = frame.time_base or Fraction(1, 1000)
            stamp = frame.dts if frame.pts is None else frame.pts
            if previous is None and origin is None:
                origin = stamp
            if stamp is not None and origin is not None:
                time = float((stamp - origin) * base)
            else:
                time = 0.0 if previous is None else previous.time + (previous.seconds or spacing)
            if previous is not None:
                time = self._checked(time, previous.time)
            self._where = f"after {time:.2f} s"
            if frame.is_corrupt and time + spacing > start:
                raise DecodeError(f"{self.name} is damaged at {time:.2f} s; remove it or replace it")
            previous = Timed(time, float((frame.duration or 0) * base), frame)
            self._checked(time + previous.seconds, time)
            yield previous

    def _checked(self, time: float, last: float) -> float:
        if not last - _MARGIN <= time <= last + LONGEST_FRAME:
            raise DecodeError(
                f"{self.name} has times that jump from {last:.2f} s to {time:.2f} s; remove it, or write it anew "
                "with times that follow each other"
            )
        return max(time, last)

    def _sought(self, start: float) -> tuple[Iterator[av.VideoFrame], int | None]:
        """Frames from a key frame before `start` on, and the first frame's timestamp; all frames where that fails.

        A seek is right only where frames have timestamps, and lands late in files with a bad index.
        """
        origin, base = self._first_stamp(), self._stream.time_base
        if origin is not None and base:
            frames, first = self._decoded(), None
            with contextlib.suppress(*_COMPLAINTS):
                target = origin + int((start - _MARGIN) / base)
                self._container.seek(target, stream=self._stream, backward=True)
                self._context.flush_buffers()
                first = next(frames, None)
            if first is not None and first.pts is not None and float((first.pts - origin) * base) <= start + TOLERANCE:
                return itertools.chain([first], frames), origin
        self._reopen()
        return self._decoded(), None

    def _first_stamp(self) -> int | None:
        """The presentation timestamp of the first frame; it is decoded only where its packet doesn't say it."""
        with complaints(self.name, self._where):
            packet = next(self._container.demux(self._stream), None)
        if packet is None:
            return None
        if packet.is_keyframe and not packet.is_discard and packet.pts is not None and packet.pts == self._start:
            return packet.pts
        self._reopen()
        first = next(self._decoded(), None)
        return None if first is None else first.pts

    def _decoded(self) -> Iterator[av.VideoFrame]:
        packets, more = self._container.demux(self._stream), True
        while more:
            with complaints(self.name, self._where):
                packet = next(packets, None)
                more = packet is not None
                if packet is not None and not packet.size:
                    continue  # an empty packet would end the decoder's work, and AVI repeats a frame by one
                frames = self._context.decode(packet)
            for frame in frames:
                frame.time_base = frame.time_base or self._stream.time_base
                yield frame
