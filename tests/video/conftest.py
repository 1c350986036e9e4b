"""Video files of any codec, pixel format and container, made by PyAV."""

import io
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest


def texture(count: int, height: int, width: int, *, channels: int = 3) -> np.ndarray:
    """Return frames of smooth colours, hard edges and some noise, within 30..225, that move to the right."""
    noise = np.random.default_rng(1).integers(-6, 7, (height, width + count, channels))
    y, x = np.meshgrid(np.arange(height), np.arange(width + count), indexing="ij")
    waves = np.stack([np.sin(x / 9 + k) + np.cos(y / (7 + k)) for k in range(channels)], axis=-1)
    blocks = 30 * ((x // 12 + y // 10) % 2)[..., None]
    picture = np.clip(120 + 36 * waves + blocks - 15 + noise, 30, 225).astype(np.uint8)
    return np.stack([picture[:, count - k : width + count - k] for k in range(count)])


def _write_video(
    frames: np.ndarray,
    *,
    codec: str = "ffv1",
    pixel_format: str = "bgr0",
    format: str = "matroska",
    rate: int = 10,
    options: dict[str, str] | None = None,
    times: list[int] | None = None,
    first: int = 0,
    path: Path | None = None,
    container_options: dict[str, str] | None = None,
    stream: dict[str, object] | None = None,
    **context: object,
) -> bytes:
    """Return the bytes of a video file.

    `context` are attributes of the encoder, `stream` of the stream, `times` are milliseconds and `first` is the number
    of the first frame. `path` is for formats that are read again while they are written.
    """
    buffer = io.BytesIO()
    with av.open(
        buffer if path is None else str(path),
        "w",
        format=format,
        options={"fflags": "+bitexact", **(container_options or {})},
    ) as output:
        track = output.add_stream(codec, rate=rate, options=options or {})
        track.height, track.width, track.pix_fmt = frames.shape[1], frames.shape[2], pixel_format
        track.codec_context.thread_count = 1
        if times is not None:
            track.time_base = track.codec_context.time_base = Fraction(1, 1000)
        for name, value in context.items():
            setattr(track.codec_context, name, value)
        for name, value in (stream or {}).items():
            setattr(track, name, value)
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(picture), format={1: "gray", 3: "rgb24", 4: "rgba"}[picture.shape[-1]]
            )
            frame = frame.reformat(format=pixel_format)
            # Pixels are stored as they are, whatever the metadata of the file.
            frame.colorspace = context.get("colorspace", 2)
            frame.color_range = context.get("color_range", 0)
            frame.pts = first + index if times is None else times[index]
            frame.time_base = Fraction(1, rate if times is None else 1000)
            output.mux(track.encode(frame))
        output.mux(track.encode(None))
    return buffer.getvalue() if path is None else path.read_bytes()


def _add_aperture(content: bytes, *numbers: int) -> bytes:
    """Give the track of an mp4 or mov a clean aperture: numerator and denominator of width, height and both offsets."""
    aperture = struct.pack(">I4s8i", 40, b"clap", *numbers)
    at = content.index(b"stsd")
    path = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", content[at + 16 : at + 20])
    data, at, size = bytearray(content), 0, 0
    for kind in path:
        at = content.index(kind, at)
        size = int.from_bytes(content[at - 4 : at], "big")
        data[at - 4 : at] = struct.pack(">I", size + len(aperture))
    return bytes(data[: at - 4 + size] + aperture + data[at - 4 + size :])


@pytest.fixture(scope="session")
def add_aperture() -> Callable[..., bytes]:
    return _add_aperture


@pytest.fixture(scope="session")
def write_video() -> Callable[..., bytes]:
    return _write_video


@pytest.fixture(scope="session")
def textured() -> Callable[..., np.ndarray]:
    return texture
