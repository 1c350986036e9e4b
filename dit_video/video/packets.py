"""Packets of encoded video and sound: reading them from a file, facts about the sound, and writing some of them."""

import contextlib
import io
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, cast

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.stream import Discard
from av.video.stream import VideoStream

from dit_video.video.reader import Video, wrap_decode_errors

_MOVIE_TIMESCALE = 360_000
"""Units per second of edit lists; FFmpeg's default of 1,000 is too coarse for the time of a frame."""
AAC_RATE = 48_000
"""Samples per second of sound that is encoded."""


class TimedPacket(NamedTuple):
    """A packet with the times that it has in its file, in units of its stream; writing it changes its own."""

    packet: av.Packet
    pts: int
    """Time at which its picture or first sample is presented."""
    duration: int


class Track(NamedTuple):
    """Some packets of a stream, in decoding order, which are written with other times."""

    stream: VideoStream | AudioStream
    packets: Sequence[TimedPacket]
    origin: int
    """Time that becomes 0; packets before it are decoded, but not shown."""
    last: int | None = None
    """Time of the last packet that is shown, though later ones may be decoded; None shows all."""

    def is_visible(self, timed: TimedPacket) -> bool:
        """Return whether a packet is presented, and not only decoded."""
        return self.origin <= timed.pts and (self.last is None or timed.pts <= self.last)


class PacketReader(Video):
    """An open file whose packets are read: of its video, and of its main stream of sound."""

    def __enter__(self) -> "PacketReader":
        return self

    @property
    def video_stream(self) -> VideoStream:
        """Return the stream of the frames."""
        return self._stream

    @property
    def audio_stream(self) -> AudioStream | None:
        """Return the main stream of sound; None if there is none that can be read."""
        stream = self._container.streams.best("audio")
        is_readable = isinstance(stream, AudioStream) and stream.codec_context is not None and stream.rate
        return cast(AudioStream, stream) if is_readable else None

    @property
    def format(self) -> str:
        """Return ffmpeg's name of the container, such as "mov,mp4,m4a,3gp,3g2,mj2"."""
        return self._container.format.name

    def read_origin(self) -> int:
        """Return the timestamp of the first frame in units of its stream; 0 if it has none.

        The file is at its beginning afterwards, and its streams are new objects.
        """
        first = next(self.read_frames(), None)
        self._reopen()
        timestamp = None if first is None else first.frame.dts if first.frame.pts is None else first.frame.pts
        return timestamp or 0

    def rewind(self) -> None:
        """Return to the beginning of the file, for `read_frames` after `read_packets`."""
        with wrap_decode_errors(self.name, "at its start"):
            self._container.seek(0, stream=self._stream, backward=True)

    def read_packets(self, *streams: VideoStream | AudioStream | None) -> Iterator[av.Packet]:
        """Yield the packets of these streams that are not empty, in the order of the file."""
        selected = [stream for stream in streams if stream is not None]
        for stream in selected:
            stream.discard = Discard.default
        with wrap_decode_errors(self.name, "among its packets"):
            yield from (packet for packet in self._container.demux(selected) if packet.size)


class AudioInfo(NamedTuple):
    """Properties of a file's sound."""

    codec: str
    """Name of ffmpeg's decoder."""
    rate: int
    """Samples per second."""
    channels: int
    """Number of channels."""
    offset: float
    """Seconds from the start of the first frame to the first sample; negative if sound begins before the picture."""
    seconds: float
    """Duration that the container states, in seconds; 0 if it states none."""


def probe_audio(source: str | Path | bytes) -> AudioInfo | None:
    """Return the properties of a file's main stream of sound, or None if it has none that can be decoded.

    The first frames of video and sound are decoded, as containers may hide samples at the beginning.

    Args:
      source: A file, or its bytes.

    Raises:
      MissingError: If the file does not exist.
      DecodeError: If the file is not a readable video or image.
    """
    with PacketReader(source) as reader:
        if reader.audio_stream is None:
            return None
        origin = reader.read_origin() * get_time_base(reader.video_stream)
        stream = reader.audio_stream
        assert stream is not None
        context, base = stream.codec_context, get_time_base(stream)
        sound: list[AudioFrame] = []
        for packet in reader.read_packets(stream):
            with contextlib.suppress(av.FFmpegError, ValueError):
                sound = [frame for frame in context.decode(packet) if frame.samples and frame.pts is not None]
            if sound:
                break
        if not sound:
            return None
        offset = (sound[0].pts or 0) * (sound[0].time_base or base) - origin
        seconds = float((stream.duration or 0) * base)
        return AudioInfo(context.name, context.sample_rate, context.layout.nb_channels, float(offset), seconds)


def encode_aac(track: Track) -> bytes:
    """Return an mp4 with the sound of a track from its origin on, in mono or stereo.

    For sound that mp4 and mov cannot hold, such as Windows Media's.
    """
    buffer, context = io.BytesIO(), cast(AudioStream, track.stream).codec_context
    layout = "mono" if context.layout.nb_channels == 1 else "stereo"
    resampler = av.AudioResampler("fltp", layout, AAC_RATE)
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as output:
        stream = output.add_stream("aac", rate=AAC_RATE)
        stream.codec_context.layout = layout
        packets = [*map(restore_times, track.packets, itertools.repeat(get_time_base(track.stream))), None]
        decoded = (frame for packet in packets for frame in context.decode(packet))
        for frame in itertools.chain(decoded, [None]):
            if frame is not None:
                if frame.pts is None or frame.pts < track.origin:
                    continue
                frame.pts -= track.origin
            for resampled in resampler.resample(frame):
                output.mux(stream.encode(resampled))
        output.mux(stream.encode(None))
    context.flush_buffers()
    return buffer.getvalue()


def write_packets(tracks: Sequence[Track]) -> tuple[bytes, str] | None:
    """Return the bytes of an mp4 or mov of packets, and its suffix, or None if neither can hold them.

    The same packets give the same bytes.

    Args:
      tracks: Streams and their packets, which are not empty; pictures first.
    """
    for format in ("mp4", "mov"):
        with contextlib.suppress(ValueError, av.FFmpegError):  # no place for a codec, or for its header
            return _write_file(tracks, format), f".{format}"
    return None


def get_time_base(stream: VideoStream | AudioStream) -> Fraction:
    """Return the unit of a stream's times in seconds."""
    return Fraction(stream.time_base or Fraction(1, 1000))


def restore_times(timed: TimedPacket, time_base: Fraction) -> av.Packet:
    """Return a packet with the times of its file, which another one that it was written into has changed."""
    packet = timed.packet
    packet.pts = packet.dts = timed.pts
    packet.time_base, packet.duration = time_base, timed.duration
    return packet


def _write_file(tracks: Sequence[Track], format: str) -> bytes:
    buffer, queue = io.BytesIO(), []
    options = {"fflags": "+bitexact", "movie_timescale": str(_MOVIE_TIMESCALE)}
    with av.open(buffer, "w", format=format, options=options) as output:
        for track in tracks:
            stream, base = output.add_stream_from_template(track.stream, opaque=True), get_time_base(track.stream)
            if isinstance(track.stream, VideoStream) and track.stream.sample_aspect_ratio:
                cast(VideoStream, stream).codec_context.sample_aspect_ratio = track.stream.sample_aspect_ratio
            for timed, dts in zip(track.packets, _make_decoding_times(track.packets), strict=True):
                queue.append((float((dts - track.origin) * base), timed, dts, track, stream))
        for _, timed, dts, track, stream in sorted(queue, key=lambda entry: entry[0]):
            packet = timed.packet
            packet.stream, packet.time_base, packet.duration = stream, get_time_base(track.stream), timed.duration
            packet.pts, packet.dts = timed.pts - track.origin, dts - track.origin
            output.mux(packet)
    last = next((timed for timed in tracks[0].packets if timed.pts == tracks[0].last), None)
    if last is None:
        return buffer.getvalue()
    return _end_edit(
        buffer.getbuffer(), (last.pts + last.duration - tracks[0].origin) * get_time_base(tracks[0].stream)
    )


def _end_edit(content: memoryview, seconds: Fraction) -> bytes:
    """Return an mp4 whose first track is shown for this time (ISO/IEC 14496-12, 8.6.6); ffmpeg shows all packets."""
    start = 0
    while content[start + 4 : start + 8] != b"moov":
        size = int.from_bytes(content[start : start + 4], "big")
        start += size if size != 1 else int.from_bytes(content[start + 8 : start + 16], "big")
    edit = start + bytes(content[start:]).index(b"elst")
    first, length = edit + 12, 8 if content[edit + 4] == 1 else 4
    content[first : first + length] = int(seconds * _MOVIE_TIMESCALE).to_bytes(length, "big")
    return bytes(content)


def _make_decoding_times(packets: Sequence[TimedPacket]) -> list[int]:
    """Return the latest decoding times that increase and are not after the presentation.

    Those of the file may be missing, and have gaps where packets are left out.
    """
    times = sorted(timed.pts for timed in packets)
    delay = max(time - timed.pts for time, timed in zip(times, packets, strict=True))
    return [time - delay for time in times]
