"""Facts about the sound of a video file."""

import contextlib
import io
import itertools
from pathlib import Path
from typing import NamedTuple, cast

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream

from dit_video.video.packets import PacketReader, Track, get_time_base, restore_times

AAC_RATE = 48_000
"""Samples per second of sound that is encoded."""


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
      source: a file, or its bytes.

    Raises:
      MissingError: no such file.
      DecodeError: not a readable video or image.
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
