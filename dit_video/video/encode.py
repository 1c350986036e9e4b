"""Encoding of frames to video and image files. The bytes depend only on the arguments (a single thread is used)."""

import io
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Literal, NamedTuple, get_args

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from jaxtyping import UInt8

from dit_video.core.errors import UserError
from dit_video.video.comments import KEY as COMMENT
from dit_video.video.comments import add_gif_comment, add_jpeg_comment, add_png_comment
from dit_video.video.webp import encode_webp

Format = Literal["mp4", "mov", "webm", "gif", "webp", "apng", "png", "jpg"]
FORMATS: tuple[str, ...] = get_args(Format)
MAX_CRF = {"mp4": 51, "mov": 51, "webm": 63}
"""Lowest quality of the formats that have one."""
DEFAULT_CRF = 12
"""Default quality: no visible loss on clips of few pixels."""
LOSSLESS_FORMATS = ("webp", "apng", "png")
"""Formats that can be, or always are, without loss."""

TICKS_PER_SECOND = 360_000
"""Resolution in which `encode_timed` writes times: a whole number of ticks per frame at 23.976, 24, 25, 29.97, 30, 60 …
fps."""
_JPEG_QUALITY = 2
"""Quality of JPEG in ffmpeg's scale, 1 (best) to 31."""

ACCURATE_FLAGS = (
    Interpolation.BICUBIC
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
)
"""Flags of swscale: without them colours are off by several of 255 steps, and differ between processors."""


def encode_frames(
    frames: UInt8[np.ndarray, "T H W 3"],
    fps: float | int,
    format: str,
    *,
    crf: int | None = None,
    lossless: bool = False,
    comment: str = "",
) -> bytes:
    """Return the bytes of a file of these frames with a comment; formats and options are those of `clip.encode`."""
    if format not in FORMATS:
        raise UserError(f"format={format!r} is invalid: use one of {', '.join(FORMATS)}")
    if crf is not None and format not in MAX_CRF:
        raise UserError(f"crf={crf} is invalid for {format}: only {', '.join(MAX_CRF)} have it. Leave it out")
    if crf is not None and not 0 <= crf <= MAX_CRF[format]:
        raise UserError(f"crf={crf} is invalid for {format}: use 0 to {MAX_CRF[format]}, where 0 is best")
    if lossless and format not in LOSSLESS_FORMATS:
        raise UserError(f"lossless=True is invalid for {format}: use {', '.join(LOSSLESS_FORMATS)}, or leave it out")
    check_frames(*frames.shape[:3], format=format)
    quality = DEFAULT_CRF if crf is None else crf
    match format:
        case "mp4" | "mov":
            options = _make_x264_options(quality, "medium")
            # QuickTime's own comments are cut after 64 KiB.
            container = {"movflags": "use_metadata_tags"} if format == "mov" else {}
            pictures = _make_yuv_frames(frames)
            return _mux(pictures, format, "libx264", "yuv420p", fps, options, container=container, comment=comment)
        case "webm":
            options = {"crf": str(quality), "b": "0", "threads": "1", "row-mt": "0"}
            options |= {"deadline": "good", "cpu-used": "4"}
            return _mux(_make_yuv_frames(frames), "webm", "libvpx-vp9", "yuv420p", fps, options, comment=comment)
        case "webp":
            return encode_webp(frames, fps, lossless=lossless, comment=comment)
        case "gif":
            content, add_comment = _encode_gif(frames, fps), add_gif_comment
        case "apng":
            content, add_comment = _encode_apng(frames, fps), add_png_comment
        case "png":
            content, add_comment = _encode_png(frames[0]), add_png_comment
        case _:  # jpg
            content, add_comment = encode_jpeg(frames[0]), add_jpeg_comment
    return add_comment(content, comment) if comment else content


class TimedPicture(NamedTuple):
    """A picture and the time at which it is shown."""

    time: float
    """Start in seconds."""
    duration: float
    """Duration in seconds; used for the last picture only, the others are shown until the next one."""
    picture: UInt8[np.ndarray, "H W 3"]


def encode_timed(pictures: Iterable[TimedPicture], fps: float | int, *, crf: int) -> bytes:
    """Return an mp4 like `encode`, of pictures shown at any times; one picture at a time is in memory.

    Times are rounded to 1 / 360,000 s; a picture with the time of the one before is shown that much later. There are no
    B-frames, which would let the file end with the last picture in decoding order.

    Args:
      pictures: At least one, all of the same even height and width, in the order of their times.
      fps: Average frames per second, for the encoder's decisions.
      crf: Quality, 0 (best) to 51.

    Raises:
      UserError: If the height or width is odd.
    """
    # On noisy video of 360p, "veryfast" takes 0.4 of the time of "medium", for as many bytes and 0.2 dB less.
    options = {**_make_x264_options(crf, "veryfast"), "bf": "0"}
    time_base = Fraction(1, TICKS_PER_SECOND)
    return _mux(_make_timed_frames(pictures), "mp4", "libx264", "yuv420p", fps, options, time_base=time_base)


def encode_jpeg(picture: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Return a JPEG file without visible loss: BT.601 in full range, as all of them, without chroma subsampling."""
    context = av.CodecContext.create("mjpeg", "w")
    context.qmin = context.qmax = _JPEG_QUALITY
    context.options = {"flags": "+bitexact"}
    frame = _convert_to_yuv(VideoReformatter(), picture, "yuvj444p", Colorspace.ITU601, ColorRange.JPEG)
    return _encode_image(context, frame)


def _encode_image(context: av.VideoCodecContext, frame: av.VideoFrame) -> bytes:
    context.height, context.width, context.pix_fmt = frame.height, frame.width, frame.format.name
    context.time_base, context.thread_count = Fraction(1, 1), 1
    frame.pts, frame.time_base = 0, Fraction(1, 1)
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def _make_x264_options(crf: int, preset: str) -> dict[str, str]:
    # x264's macroblock-tree rate control (mbtree) gave other bytes in about one of seventy encodes of one clip.
    return {"crf": str(crf), "preset": preset, "threads": "1", "mbtree": "0"}


def check_frames(count: int, height: int, width: int, *, format: str) -> None:
    """Check that a format holds so many frames of a size.

    Raises:
      UserError: If a picture's format is for several frames, or an odd height or width is for mp4 or mov.
    """
    if format in ("png", "jpg") and count != 1:
        raise UserError(
            f"{count} frames are invalid for {format}: use one frame, such as clip[:1], or write .webp, .apng, .gif, "
            ".mp4 or .webm"
        )
    if format in ("mp4", "mov"):
        _check_even(height, width, format=format)


def _check_even(height: int, width: int, *, format: str) -> None:
    if height % 2 or width % 2:
        raise UserError(
            f"frames of {height}x{width} are invalid for {format} (H.264, 4:2:0): use an even height and width, or "
            "write .webm, .webp, .gif or .apng"
        )


def _make_timed_frames(pictures: Iterable[TimedPicture]) -> Iterator[av.VideoFrame]:
    """Yield frames with their times in ticks."""
    reformatter, ticks = VideoReformatter(), -1
    for time, seconds, picture in pictures:
        _check_even(*picture.shape[:2], format="mp4")
        ticks = max(round(time * TICKS_PER_SECOND), ticks + 1)
        frame = _convert_to_yuv420(reformatter, picture)
        frame.pts, frame.duration = ticks, max(1, round(seconds * TICKS_PER_SECOND))
        yield frame


def _mux(frames, format, codec, pixel_format, fps, options, *, container=None, time_base=None, comment="") -> bytes:
    """Write a file of frames that follow each other at `fps`, or that have times and durations in `time_base`."""
    buffer = io.BytesIO()
    rate = Fraction(fps).limit_denominator(60_000)
    base_time = 1 / rate if time_base is None else time_base
    durations: dict[int, int] = {}
    with av.open(buffer, "w", format=format, options={"fflags": "+bitexact", **(container or {})}) as output:
        stream = None
        if comment:
            output.metadata[COMMENT] = comment
        for index, frame in enumerate(frames):
            if stream is None:
                stream = output.add_stream(codec, rate=rate, options=options)
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, pixel_format
                stream.time_base = stream.codec_context.time_base = base_time
                stream.codec_context.thread_count = 1
                if pixel_format == "yuv420p":  # BT.709
                    context = stream.codec_context
                    context.colorspace = context.color_primaries = context.color_trc = 1
                    context.color_range = int(ColorRange.MPEG)
            frame.time_base = base_time
            if time_base is None:
                frame.pts = index
            else:
                durations[frame.pts] = frame.duration
            _write(output, stream.encode(frame), durations)
        assert stream is not None  # a clip has at least one frame
        _write(output, stream.encode(None), durations)
    return buffer.getvalue()


def _write(output, packets, durations: dict[int, int]) -> None:
    for packet in packets:
        if packet.pts in durations:  # x264 does not pass durations on
            packet.duration = durations.pop(packet.pts)
        output.mux(packet)


def _make_rgb_frames(frames: UInt8[np.ndarray, "T H W 3"]):
    for frame in frames:
        yield av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")


def _make_yuv_frames(frames: UInt8[np.ndarray, "T H W 3"]):
    reformatter = VideoReformatter()
    for frame in frames:
        yield _convert_to_yuv420(reformatter, frame)


def _convert_to_yuv420(reformatter: VideoReformatter, picture: UInt8[np.ndarray, "H W 3"]) -> av.VideoFrame:
    """Convert a picture to 4:2:0 in BT.709, limited range."""
    return _convert_to_yuv(reformatter, picture, "yuv420p", Colorspace.ITU709, ColorRange.MPEG)


def _convert_to_yuv(
    reformatter: VideoReformatter, picture: np.ndarray, format: str, colorspace: Colorspace, color_range: ColorRange
) -> av.VideoFrame:
    return reformatter.reformat(
        av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"),
        format=format,
        src_color_range=ColorRange.JPEG,
        dst_colorspace=colorspace,
        dst_color_range=color_range,
        interpolation=ACCURATE_FLAGS,
        threads=1,
    )


def _encode_png(picture: UInt8[np.ndarray, "H W 3"]) -> bytes:
    return _encode_image(av.CodecContext.create("png", "w"), next(_make_rgb_frames(picture[None])))


def _encode_apng(frames: UInt8[np.ndarray, "T H W 3"], fps: float) -> bytes:
    options = {"pred": "mixed"}
    return _mux(_make_rgb_frames(frames), "apng", "apng", "rgb24", fps, options, container={"plays": "0"})


def _encode_gif(frames: UInt8[np.ndarray, "T H W 3"], fps: float) -> bytes:
    """Encode with one palette for the whole clip and without dithering, which would shimmer."""
    rate, size = Fraction(fps).limit_denominator(60_000), f"{frames.shape[2]}x{frames.shape[1]}"
    graph = av.filter.Graph()
    graph.threads = 1
    arguments = f"video_size={size}:pix_fmt=rgb24:time_base={rate.denominator}/{rate.numerator}:pixel_aspect=1/1"
    source = graph.add("buffer", arguments)
    split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=full:reserve_transparent=0")
    palette_use, sink = graph.add("paletteuse", "dither=none"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette_use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(palette_use, 0, 1)
    palette_use.link_to(sink)
    graph.configure()
    for index, frame in enumerate(_make_rgb_frames(frames)):
        frame.pts, frame.time_base = index, 1 / rate
        source.push(frame)
    source.push(None)
    return _mux((sink.pull() for _ in frames), "gif", "gif", "pal8", fps, {})
