"""Facts about the sound of a video file."""

import contextlib
from pathlib import Path
from typing import NamedTuple

import av
from av.audio.frame import AudioFrame

from dit_video.video.packets import PacketReader, get_time_base


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
