"""Video and image files to frames, whatever PyAV's own ffmpeg reads (no system ffmpeg)."""

import contextlib
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer, Type
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from jaxtyping import UInt8

from dit_video import pixels
from dit_video.errors import DecodeError, MissingError, UserError
from dit_video.tokens import Grid
from dit_video.video.clip import Clip
from dit_video.video.encode import ACCURATE

IMAGE_CODECS = {"png", "mjpeg", "bmp", "tiff", "jpeg2000", "webp"}
"""A file of one frame in one of these is an image: its fps is 1."""

TOLERANCE = 1e-3
"""Seconds by which a frame may come late: containers round timestamps to as much as a millisecond."""
_BT709, _UNSPECIFIED, _RGB = 1, 2, 0
_COLORSPACES = {
    _BT709: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}
"""By ISO/IEC 23091-2's number for matrix coefficients."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a file holds, as `decode` gives it at native size and rate."""

    height: int
    width: int
    frames: int
    fps: float
    """on average"""
    seconds: float
    """of the last frame after the first"""
    codec: str


def decode(
    source: Path | bytes,
    *,
    size: Grid | None = None,
    frames: int | None = None,
    start: float = 0.0,
    fps: float | int | None = None,
) -> Clip:
    """The frames of a video or image file, upright (rotation metadata is applied), in full-range sRGB.

    Transparent pixels are shown over black. Pixels are taken as square.

    Args:
      source: a file, or its bytes.
      size: number of frames, height and width to return; pictures are resized by an anti-aliased triangle filter,
        without regard to the aspect ratio. By default the native size.
      frames: how many frames to return, at the native height and width; `size` says it too.
      start: seconds after the first frame; the first frame returned is the one shown then.
      fps: sample at this rate: of every time `start + k / fps` the frame that is shown then, which is the nearest at or
        before it (a rate above the native one repeats frames). By default all frames, at the stream's average rate.

    Raises:
      MissingError: no such file.
      DecodeError: not a readable video or image, or damaged.
      UserError: fewer frames than asked for, or arguments that are out of range or contradict each other.
    """
    wanted, name = _wanted(size, frames, start, fps), _name(source)
    with _reading(source) as (container, stream):
        convert, pictures, last = VideoReformatter(), [], None
        for frame in _sampled(_frames(container, stream, name, start), start, fps, wanted):
            # A frame that is sampled twice is the same object twice: it is converted once.
            pictures.append(pictures[-1] if frame is last else _picture(frame, convert, size))
            last = frame
        rate = _rate(stream, len(pictures))
    if not pictures:
        raise _no_frames(name, start)
    if wanted is not None and len(pictures) < wanted:
        raise UserError(
            f"{name} has {len(pictures)} frames from {start:g} s on, {wanted} were asked for; ask for fewer"
        )
    if any(picture.shape != pictures[0].shape for picture in pictures):
        raise DecodeError(f"{name} changes its size on the way, a clip has one; give the size, or cut it there")
    return Clip(frames=np.stack(pictures), fps=float(rate if fps is None else fps))


def probe(source: Path | bytes) -> Facts:
    """What `decode(source)` would give; decodes the whole file, as containers do not all say how many frames they hold.

    Raises:
      MissingError: no such file.
      DecodeError: not a readable video or image, or damaged.
    """
    with _reading(source) as (container, stream):
        count, height, width, last = 0, 0, 0, 0.0
        for time, frame in _frames(container, stream, _name(source), 0.0):
            if not count:
                turned = _orientation(frame)[0]
                height, width = (frame.width, frame.height) if turned else (frame.height, frame.width)
            count, last = count + 1, max(last, time)
        codec, rate = stream.codec_context.name, _rate(stream, count)
    if not count:
        raise _no_frames(_name(source), 0.0)
    return Facts(height=height, width=width, frames=count, fps=rate, seconds=last, codec=codec)


def _wanted(size: Grid | None, frames: int | None, start: float, fps: float | int | None) -> int | None:
    if size is not None and frames is not None and size.t != frames:
        raise UserError(f"size={size.t}x{size.h}x{size.w} and frames={frames} disagree; give one of them")
    wanted = frames if size is None else size.t
    if (size is not None and min(size) < 1) or (wanted is not None and wanted < 1):
        raise UserError(f"frames, height and width are at least 1, {size or wanted} was given")
    if not 0 <= start < float("inf"):
        raise UserError(f"start is a number of seconds from 0 on, {start} was given")
    if fps is not None and not 0 < fps < float("inf"):
        raise UserError(f"fps is a positive number, {fps} was given")
    return wanted


def _name(source: Path | bytes) -> str:
    return f"video of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def _no_frames(name: str, start: float) -> UserError:
    if start > 0:
        return UserError(f"{name} ends before {start:g} s; use an earlier start")
    return DecodeError(f"{name} holds no whole frame; a clip has at least one: remove it or replace it")


@contextlib.contextmanager
def _reading(source: Path | bytes) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The open file and its video stream; ffmpeg's complaints, now and while frames are read, become `DecodeError`s."""
    name = _name(source)
    if isinstance(source, Path) and not source.is_file():
        raise MissingError(f"no such video or image file: {source}")
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source), "r") as container:
            streams = [stream for stream in container.streams.video if stream.codec_context is not None]
            if not streams:
                raise DecodeError(f"{name} holds no video stream that can be read; remove it or convert it to H.264")
            streams[0].codec_context.thread_count = 1
            yield container, streams[0]
    except (av.FFmpegError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DecodeError(f"{name} is not a readable video or image ({reason}); remove it or replace it") from error


def _frames(
    container: av.container.InputContainer, stream: av.VideoStream, name: str, start: float
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Frames with their seconds after the stream's first frame, from a key frame at or before `start` on."""
    origin = stream.start_time or 0
    if start > 0 and stream.time_base:
        # The index of some containers is coarse; a second too early is safe.
        target = origin + int(max(start - 1, 0) / stream.time_base)
        with contextlib.suppress(av.FFmpegError):
            container.seek(target, stream=stream, backward=True)
    spacing = 1 / _rate(stream, 2)
    for index, frame in enumerate(container.decode(stream)):
        if frame.pts is None or frame.time_base is None:
            time = index * spacing
        else:
            time = float((frame.pts - origin) * frame.time_base)
        if frame.is_corrupt and time + spacing > start:
            raise DecodeError(f"{name} is damaged at {time:.2f} s; remove it or replace it")
        yield time, frame


def _sampled(
    frames: Iterator[tuple[float, av.VideoFrame]], start: float, fps: float | int | None, wanted: int | None
) -> Iterator[av.VideoFrame]:
    """Of every sampling time the latest frame at or before it; without `fps` all from the one shown at `start`."""
    return itertools.islice(_from(frames, start) if fps is None else _at_rate(frames, start, float(fps)), wanted)


def _from(frames: Iterator[tuple[float, av.VideoFrame]], start: float) -> Iterator[av.VideoFrame]:
    shown = None
    for time, frame in frames:
        if time > start + TOLERANCE:
            if shown is not None:
                yield shown
            shown = None
            yield frame
        else:
            shown = frame
    if shown is not None and _ends_after(shown, time, start):
        yield shown


def _at_rate(frames: Iterator[tuple[float, av.VideoFrame]], start: float, fps: float) -> Iterator[av.VideoFrame]:
    count, shown, time = 0, None, 0.0
    for next_time, frame in frames:
        while shown is not None and start + count / fps < next_time - TOLERANCE:
            yield shown
            count += 1
        shown, time = frame, next_time
    while shown is not None and _ends_after(shown, time, start + count / fps):
        yield shown
        count += 1


def _ends_after(frame: av.VideoFrame, time: float, moment: float) -> bool:
    """Whether a stream's last frame, shown from `time` on, is still shown at `moment`."""
    seconds = float((frame.duration or 0) * frame.time_base) if frame.time_base else 0.0
    return moment <= time + TOLERANCE or moment < time + seconds - TOLERANCE


def _rate(stream: av.VideoStream, frames: int) -> float:
    if frames == 1 and stream.codec_context.name in IMAGE_CODECS:
        return 1.0
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    return float(rate) if rate else 25.0


def _picture(frame: av.VideoFrame, convert: VideoReformatter, size: Grid | None) -> UInt8[np.ndarray, "H W 3"]:
    space = int(frame.colorspace)
    if space == _UNSPECIFIED:  # what players assume: high definition is BT.709, the rest BT.601
        space = _BT709 if frame.height >= 720 else 6
    known = (
        frame.format.is_rgb or frame.format.has_palette or frame.format.name.startswith(("yuvj", "gray", "ya", "mono"))
    )
    transparent = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
    # Of YUV swscale writes planes four times as fast as pixels, with the same values.
    opaque = "rgb24" if frame.format.is_rgb else "gbrp"
    image = convert.reformat(
        frame,
        format="rgba" if transparent else opaque,
        src_colorspace=None if space == _RGB else _COLORSPACES.get(space, Colorspace.ITU601),
        src_color_range=ColorRange.JPEG if known or int(frame.color_range) == ColorRange.JPEG else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        interpolation=ACCURATE,
        threads=1,
    ).to_ndarray()
    if transparent:
        image = np.rint(image[..., :3] * (image[..., 3:] / 255)).astype(np.uint8)
    picture = _upright(image, frame)
    return picture if size is None else pixels.resize(picture[None], size.h, size.w)[0]


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How to make a picture upright: exchange its axes, then flip its rows, then its columns.

    The display matrix of ISO/IEC 14496-12 maps a stored point (x, y) to (a x + c y, b x + d y), in 16.16 fixed point.
    """
    # PyAV's stub of the attribute is of another type, with one key.
    matrix = cast(SideDataContainer, frame.side_data).get(Type.DISPLAYMATRIX)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5]
    turned = abs(int(b)) > abs(int(a))
    return turned, bool((b if turned else d) < 0), bool((c if turned else a) < 0)


def _upright(picture: UInt8[np.ndarray, "H W 3"], frame: av.VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
    turned, flip_rows, flip_columns = _orientation(frame)
    if turned:
        picture = picture.swapaxes(0, 1)
    return np.ascontiguousarray(picture[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])
