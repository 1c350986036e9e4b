"""Every frame of a file once, for several measures at a time, and the small pictures that they are taken on."""

import io
from collections.abc import Callable
from typing import cast

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer, Type
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from jaxtyping import Real, UInt8

from dit_video.errors import DecodeError
from dit_video.video import Facts, decode
from dit_video.video.decode import IMAGE_CODECS

LONG_SIDE = 256
"""Pixels of a thumbnail's longer side, whatever the clip's size: small ones are enlarged, so that measures compare."""
SHORT_SIDE = 16
"""Pixels at least of the shorter one; pictures longer than 16:1 are squeezed."""

_TRIANGLE = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
"""swscale's bilinear filter widens with the scale, so that shrinking doesn't alias; these flags give the same values on
all processors."""

See = Callable[[float, av.VideoFrame], None]
"""Called with every frame, in order, and its seconds after the stream's first frame."""


def watch(encoded: bytes, see: See) -> Facts:
    """Show every frame of a file to `see`, one at a time, and say what `dit_video.video.probe` says.

    Raises:
      DecodeError: not a readable video or image, or damaged.
    """
    name = f"video of {len(encoded)} bytes"
    # One frame more is decoded than there are: how a picture is shown is for the video room alone to say.
    height, width = decode(encoded, frames=1).frames.shape[1:3]
    try:
        with av.open(io.BytesIO(encoded), "r") as container:
            stream = next(stream for stream in container.streams.video if stream.codec_context is not None)
            stream.codec_context.thread_count = 1
            origin, spacing, count, last = stream.start_time or 0, 1 / _rate(stream, 2), 0, 0.0
            for frame in container.decode(stream):
                if frame.pts is None or frame.time_base is None:
                    time = count * spacing
                else:
                    time = float((frame.pts - origin) * frame.time_base)
                if frame.is_corrupt:
                    raise DecodeError(f"{name} is damaged at {time:.2f} s; remove it or replace it")
                see(time, frame)
                count, last = count + 1, max(last, time)
            rate, codec = _rate(stream, count), stream.codec_context.name
    except av.FFmpegError as error:
        reason = getattr(error, "strerror", None) or error
        raise DecodeError(f"{name} is not a readable video or image ({reason}); remove it or replace it") from error
    return Facts(height=height, width=width, frames=count, fps=rate, seconds=last, codec=codec)


def _rate(stream: av.VideoStream, frames: int) -> float:
    if frames == 1 and stream.codec_context.name in IMAGE_CODECS:
        return 1.0
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    return float(rate) if rate else 25.0


class Pictures:
    """Small pictures of one file's frames: as they are stored, not turned, pixels taken as square."""

    def __init__(self) -> None:
        # Each keeps what swscale prepared for its last conversion.
        self._small, self._whole = VideoReformatter(), VideoReformatter()
        self._size: tuple[int, int] | None = None
        self._orientation: tuple[bool, bool, bool] | None = None

    def thumbnail(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
        """Full-range RGB, the longer side `LONG_SIDE`; transparent pixels over black. All of one size."""
        if self._size is None:
            scale = LONG_SIDE / max(frame.height, frame.width)
            self._size = max(SHORT_SIDE, round(frame.height * scale)), max(SHORT_SIDE, round(frame.width * scale))
        return _over_black(_convert(self._small, frame, "rgb24", *self._size))

    def luma(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "H W"]:
        """Full-range luma at the stored size; transparent pixels over black."""
        if _transparent(frame):
            picture = _over_black(_convert(self._whole, frame, "rgba", frame.height, frame.width))
            return np.rint(picture @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
        return _convert(self._whole, frame, "gray", frame.height, frame.width)

    def upright(self, picture: Real[np.ndarray, "H W"], frame: av.VideoFrame) -> Real[np.ndarray, "h w"]:
        """A picture of a frame as it is shown: by quarter turns and reflections."""
        if self._orientation is None:
            # Of the first frame alone: one whose side data were read refers to itself, and would stay in memory until
            # the garbage collector runs, which counts objects and not bytes.
            self._orientation = _orientation(frame)
        turned, flip_rows, flip_columns = self._orientation
        picture = picture.swapaxes(0, 1) if turned else picture
        return picture[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def _convert(convert: VideoReformatter, frame: av.VideoFrame, format: str, height: int, width: int) -> np.ndarray:
    known = frame.format.is_rgb or frame.format.has_palette or frame.format.name.startswith(("yuvj", "gray", "ya"))
    return convert.reformat(
        frame,
        width,
        height,
        format="rgba" if _transparent(frame) else format,
        src_color_range=ColorRange.JPEG if known or int(frame.color_range) == ColorRange.JPEG else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        interpolation=_TRIANGLE,
        threads=1,
    ).to_ndarray()


def _transparent(frame: av.VideoFrame) -> bool:
    return frame.format.has_palette or any(part.is_alpha for part in frame.format.components)


def _over_black(picture: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    if picture.shape[-1] == 3:
        return picture
    return np.rint(picture[..., :3] * (picture[..., 3:] / 255)).astype(np.uint8)


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How to make a picture upright: exchange its axes, then flip its rows, then its columns (ISO/IEC 14496-12)."""
    # PyAV's stub of the attribute is of another type, with one key.
    matrix = cast(SideDataContainer, frame.side_data).get(Type.DISPLAYMATRIX)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = (int(entry) for entry in np.frombuffer(bytes(matrix), np.int32)[:5])
    turned = abs(b) > abs(a)
    return turned, (b if turned else d) < 0, (c if turned else a) < 0
