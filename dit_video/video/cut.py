"""Cutting of spans out of a video file, each into a file of its own, with sound.

A copy has the packets of the file itself, from the key frame at or before the span on. An edit list hides what is
decoded but not shown: frames before the span, and references after it. Where containers or codecs cannot do that, the
span is encoded again.
"""

import bisect
import collections
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np
from av.audio.stream import AudioStream
from av.video.stream import VideoStream

from dit_video.core.errors import DecodeError
from dit_video.video.packets import (
    AudioInfo,
    PacketReader,
    TimedPacket,
    Track,
    encode_aac,
    get_time_base,
    probe_audio,
    write_packets,
)
from dit_video.video.transcode import SPAN_TOLERANCE, transcode

PREROLL = 0.1
"""Seconds of sound before a span that are kept, hidden: decoders of sound need them to be exact at its beginning."""
_MAX_CHECKED_FRAMES = 8
"""Maximum number of frames of a copy that are decoded to check it."""
MAX_INTERLEAVING = 10.0
"""Seconds by which sound may come later in a file than its pictures; a shot is cut without what comes later."""


class TimeSpan(NamedTuple):
    """Consecutive frames of a file."""

    first: float
    """Time of the first frame, in seconds after the file's first frame, as `Video.read_frames` has it."""
    last: float
    """Time of the last frame."""
    is_whole: bool = False
    """True if these are all frames of the file, whose bytes are then returned unless they are to be encoded."""


class CutClip(NamedTuple):
    """A file that holds a span of another one."""

    content: bytes
    """Bytes of the file."""
    suffix: str
    """Suffix for the file's name, such as ".mp4"."""
    method: Literal["whole", "copy", "encode"]
    """Method by which it was made: "whole" is the source itself, "copy" its packets, "encode" new pictures."""
    audio: AudioInfo | None
    """Properties of the sound; None without sound."""


def cut_clips(
    source: str | Path | bytes,
    spans: Sequence[TimeSpan],
    *,
    mode: Literal["copy", "encode"] = "copy",
    max_lead_in: float = math.inf,
    crf: int = 18,
    height: int | None = None,
    width: int | None = None,
    fps: float | int | None = None,
) -> Iterator[CutClip]:
    """Yield the spans of a file, each as a file that decodes to exactly its frames, the first at time 0, and its sound.

    The source is read once. Memory holds the packets of one span and of the group of pictures before it. Sound is
    copied, in whole packets, with its offset to the pictures; what mp4 and mov cannot hold becomes AAC. Rotation, pixel
    aspect ratio, colours, HDR, interlacing and varying times are copied, too.

    Args:
      source: A file, or its bytes.
      spans: Spans of the file, in the order of their first frames.
      mode: "copy" copies packets where that is exact, and else encodes; "encode" always encodes.
      max_lead_in: Maximum size of the packets of a copy that are decoded but not shown, relative to those that are; a
        span in a long group of pictures, which would need more, is encoded.
      crf: Quality of encoded pictures, 0 (best) to 51.
      height: Height of encoded pictures; even. By default that at which they are shown, or one less.
      width: Width of encoded pictures; even, with a default like that for `height`.
      fps: Frames per second of encoded pictures; by default their times are kept.

    Raises:
      MissingError: If the file does not exist.
      DecodeError: If the file is not a readable video, or is damaged.
      UserError: If the height or width is odd, or the span has no frame.
    """
    if mode == "copy" and any(span.is_whole for span in spans):
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        with PacketReader(source) as reader:
            suffix = _find_suffix(reader.format)
        yield CutClip(content, suffix, "whole", probe_audio(content))
        return
    with PacketReader(source) as reader:
        origin = reader.read_origin()
        # Transparency is in side data that mp4 does not have, and cropping is not written.
        is_plain = reader.video_stream.metadata.get("alpha_mode") != "1" and reader.crop is None
        can_copy = mode == "copy" and is_plain
        for span, video, audio in _select_packets(reader, origin, spans):
            is_copied = can_copy and video is not None and _measure_lead_in(video) <= max_lead_in
            copied = _copy_span(video, audio) if is_copied and video is not None else None
            method: Literal["copy", "encode"] = "copy" if copied else "encode"
            if copied is None:
                pictures = transcode(
                    source, height=height, width=width, fps=fps, crf=crf, first=span.first, last=span.last
                )
                copied = _add_sound(pictures, audio)
            content, suffix = copied
            yield CutClip(content, suffix, method, None if audio is None else probe_audio(content))


def split_span(times: Sequence[float], max_seconds: float | int) -> tuple[tuple[int, int], ...]:
    """Return windows of at most this duration and of nearly equal lengths, as first frame and stop.

    Args:
      times: Times of consecutive frames, in seconds. A window lasts until the first frame of the next one; the last
        frame is shown as long as the one before.
      max_seconds: Maximum duration; a single frame that is longer is a window of its own.
    """
    if not times:
        return ()
    ends = [*times[1:], times[-1] + (times[-1] - times[-2] if len(times) > 1 else 0.0)]
    seconds = ends[-1] - times[0]
    count = max(1, math.ceil(seconds / max_seconds - SPAN_TOLERANCE))
    while True:
        targets = [times[0] + seconds * number / count - SPAN_TOLERANCE for number in range(1, count)]
        bounds = sorted({0, *(bisect.bisect_left(times, target) for target in targets), len(times)} - {len(times)})
        windows = tuple(zip(bounds, [*bounds[1:], len(times)], strict=True))
        longest = max((ends[stop - 1] - times[first] for first, stop in windows if stop > first + 1), default=0.0)
        if longest <= max_seconds + SPAN_TOLERANCE:
            return windows
        count += 1


def _select_packets(
    reader: PacketReader, origin: int, spans: Sequence[TimeSpan]
) -> Iterator[tuple[TimeSpan, Track | None, Track | None]]:
    """Yield for every span the packets from which its frames are decoded, and the packets of its sound.

    There is no track of pictures if their packets have no times or there is no key frame, and none of sound if there
    are no packets of it.
    """
    video_stream, audio_stream = reader.video_stream, reader.audio_stream
    buffer = _PacketBuffer(video_stream, audio_stream, origin, 1 / reader.get_rate(2))
    waiting = collections.deque(spans)
    for packet in reader.read_packets(video_stream, audio_stream):
        if not waiting:
            return
        buffer.add(packet)
        if packet.stream.type == "video" and packet.is_keyframe:
            buffer.discard_before(waiting[0].first)
        while waiting and buffer.holds(waiting[0]):
            yield waiting[0], *buffer.select(waiting.popleft())
    for span in waiting:
        yield span, *buffer.select(span)


class _BufferedPacket(NamedTuple):
    timed: TimedPacket
    time: float
    """Time in seconds after the file's first frame."""
    stop: float
    """Time at which the next one follows, as far as the packet says it."""


class _PacketBuffer:
    """Packets of a file, from the key frame before the next span on.

    Args:
      video_stream: Stream of the pictures.
      audio_stream: Stream of the sound; None without sound.
      origin: Time of the first frame, in units of its stream.
      spacing: Duration in seconds of pictures that don't say it.
    """

    def __init__(self, video_stream: VideoStream, audio_stream: AudioStream | None, origin: int, spacing: float):
        self._video_stream, self._audio_stream, self._spacing = video_stream, audio_stream, spacing
        self._origin = origin
        self._video: list[_BufferedPacket] = []
        self._audio: list[_BufferedPacket] = []
        self._has_times = True
        self._decoding_time = -math.inf

    def add(self, packet: av.Packet) -> None:
        """Add the next packet of the file."""
        is_video = packet.stream.type == "video"
        pts = packet.dts if packet.pts is None else packet.pts
        self._has_times &= packet.pts is not None or not is_video
        if pts is None:
            return
        base = float(packet.time_base)
        time, duration = pts * base - float(self._origin * get_time_base(self._video_stream)), packet.duration or 0
        entry = _BufferedPacket(TimedPacket(packet, pts, duration), time, time + duration * base)
        (self._video if is_video else self._audio).append(entry)
        if is_video and packet.dts is not None:
            self._decoding_time = time - (pts - packet.dts) * base

    def holds(self, span: TimeSpan) -> bool:
        """Return whether all packets of a span were added, pictures and sound."""
        if self._decoding_time <= span.last + SPAN_TOLERANCE:
            return False
        stop = self._find_stop(span)
        heard = math.inf if self._audio_stream is None else self._audio[-1].time if self._audio else -math.inf
        return heard >= stop or self._decoding_time > stop + MAX_INTERLEAVING

    def discard_before(self, time: float) -> None:
        """Discard the packets that spans from this time on don't need."""
        del self._video[: self._find_key(time) or 0]
        preroll = time - PREROLL
        del self._audio[: bisect.bisect_left(self._audio, preroll, key=lambda entry: entry.stop)]

    def select(self, span: TimeSpan) -> tuple[Track | None, Track | None]:
        """Return the packets of a span: of its pictures, and of its sound."""
        first, last = span.first - SPAN_TOLERANCE, span.last + SPAN_TOLERANCE
        key, base = self._find_key(span.first), get_time_base(self._video_stream)
        visible = [entry for entry in self._video[key:] if first <= entry.time <= last]
        video = audio = None
        begin = span.first + float(self._origin * base)
        if key is not None and visible and self._has_times:
            start, end = (bound(entry.timed.pts for entry in visible) for bound in (min, max))
            count = self._video[key:].index(visible[-1]) + 1
            video = Track(self._video_stream, [entry.timed for entry in self._video[key : key + count]], start, end)
            begin = float(start * base)
        stop = self._find_stop(span)
        sound = [entry.timed for entry in self._audio if entry.stop > span.first - PREROLL and entry.time < stop]
        if self._audio_stream is not None and sound:
            audio = Track(self._audio_stream, sound, round(begin / get_time_base(self._audio_stream)))
        return video, audio

    def _find_key(self, time: float) -> int | None:
        """Return the number of the last key frame at or before a time; None if there is none."""
        for number in reversed(range(len(self._video))):
            entry = self._video[number]
            if entry.timed.packet.is_keyframe and entry.time <= time + SPAN_TOLERANCE:
                return number
        return None

    def _find_stop(self, span: TimeSpan) -> float:
        """Return the time until which the last frame of a span is shown."""
        visible = (entry.stop - entry.time for entry in self._video if abs(entry.time - span.last) <= SPAN_TOLERANCE)
        return span.last + (next(visible, 0.0) or self._spacing)


def _measure_lead_in(video: Track) -> float:
    """Return the size of the packets that are decoded but not shown, relative to the size of the shown ones."""
    visible = sum(timed.packet.size for timed in video.packets if video.is_visible(timed))
    return sum(timed.packet.size for timed in video.packets) / max(visible, 1) - 1


def _copy_span(video: Track, audio: Track | None) -> tuple[bytes, str] | None:
    """Return a file of these packets, and its suffix; None if no container shows exactly these frames."""
    assert video.last is not None
    visible = sorted(timed.pts for timed in video.packets if video.is_visible(timed))
    keys = [timed.pts for timed in video.packets if timed.packet.is_keyframe and timed.pts > video.origin]
    # All packets from the first key frame on are there, so that only the first frames may be wrong, whose references
    # may be before it, and those up to the second key frame.
    decoded = min(bisect.bisect_right(visible, min(keys, default=video.last)), _MAX_CHECKED_FRAMES)
    base = float(get_time_base(video.stream))
    times = [(pts - video.origin) * base for pts in visible]
    written = _write(video, audio)
    return written if written is not None and _has_frames(written[0], times, decoded) else None


def _write(video: Track, audio: Track | None) -> tuple[bytes, str] | None:
    written = write_packets([video] if audio is None else [video, audio])
    if written is None and audio is not None:
        with av.open(io.BytesIO(encode_aac(audio)), "r") as sound:
            stream = sound.streams.audio[0]
            packets = [
                TimedPacket(packet, packet.pts, packet.duration or 0)
                for packet in sound.demux(stream)
                if packet.pts is not None
            ]
            written = write_packets([video, Track(stream, packets, 0)])
    return written


def _has_frames(content: bytes, times: Sequence[float], decoded: int) -> bool:
    """Return whether a file shows frames at exactly these times; this many of them are decoded."""
    try:
        with PacketReader(content, is_exact=False) as reader:
            packets = reader.read_packets(reader.video_stream)
            visible = sorted((packet.pts or 0) * float(packet.time_base) for packet in packets if not packet.is_discard)
            size = reader.video_stream.width, reader.video_stream.height
            reader.rewind()
            frames = [(timed.time, timed.frame) for timed in itertools.islice(reader.read_frames(), decoded)]
    except DecodeError:
        return False
    return (
        len(visible) == len(times)
        and np.allclose(visible, times, rtol=0, atol=SPAN_TOLERANCE)
        and np.allclose([time for time, _ in frames], times[:decoded], rtol=0, atol=SPAN_TOLERANCE)
        and all((frame.width, frame.height) == size for _, frame in frames)
    )


def _add_sound(pictures: bytes, audio: Track | None) -> tuple[bytes, str]:
    """Return an mp4 or mov of H.264 with sound, and its suffix."""
    with PacketReader(pictures) as reader:
        stream = reader.video_stream
        packets = [TimedPacket(packet, packet.pts or 0, packet.duration or 0) for packet in reader.read_packets(stream)]
        written = _write(Track(stream, packets, 0), audio)
    assert written is not None  # both hold H.264 and AAC
    return written


_SUFFIXES = {"mov": ".mp4", "matroska": ".mkv", "mpegts": ".ts", "jpeg": ".jpg", "image2": ".jpg"}


def _find_suffix(format: str) -> str:
    """Return a suffix for files of a container by ffmpeg's name of it, such as "mov,mp4,m4a,3gp,3g2,mj2"."""
    name = format.split(",")[0].removesuffix("_pipe")
    return _SUFFIXES.get(name, f".{name}")
