"""Reader of video and image files: frames with the time from which each is shown, for any file that ffmpeg reads.

The header of mp4 and mov is checked before ffmpeg allocates memory for it. Pillow reads what ffmpeg does not: animated
WebP; pictures in HEIF files (HEIC, AVIF; for HEIC with the package pillow-heif), of which ffmpeg gives tiles and
transparency one by one, with the padding of tiles, and without rotation; and TIFF, of which ffmpeg makes up what is
missing, or refuses each file with a tag that it does not know.
"""

import contextlib
import io
import itertools
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import av
import numpy as np
from av.container import Flags, InputContainer
from av.filter import Graph
from av.stream import Discard, Disposition
from PIL import Image, ImageOps

from dit_video.core.errors import DecodeError, MissingError, UserError
from dit_video.video.colours import TRANSFERS, convert_to_srgb
from dit_video.video.containers import (
    Crop,
    check_gif_packet,
    check_is_gapless,
    check_is_whole,
    check_mp4_header,
    read_crops,
)
from dit_video.video.webp import AnimatedWebp, is_animated_webp

MAX_PIXELS = int(os.environ.get("DIT_VIDEO_MAX_PIXELS", 1 << 26))
"""Maximum pixels of a frame, stored or displayed: a damaged header may claim any size, and memory for it."""
_CONTAINERS = (
    "mov,matroska,avi,mpeg,mpegvideo,mpegts,h264,hevc,ogg,asf,flv,gif,apng,mjpeg,"
    "png_pipe,jpeg_pipe,webp,webp_anim,webp_pipe,bmp_pipe,tiff_pipe"
)
"""ffmpeg's names of the formats that are opened, as in `data.ingest.formats`. ffmpeg would choose one of 400 by the
content of a file: playlists open other files, and texts and music are drawn."""
MAX_FRAME_SECONDS = 3600.0
"""Maximum seconds between timestamps: greater ones are damaged, and would be sampled without end."""
TOLERANCE = 1e-3
"""Seconds by which a frame may be late: containers round timestamps to as much as a millisecond."""
IMAGE_CODECS = {"png", "mjpeg", "bmp", "tiff", "jpeg2000", "webp", "avif", "heic"}
"""Codecs and formats of images: a file with one frame in one of these has an fps of 1."""
_NAMED_PROFILES = {"png", "apng"}
"""Codecs of pictures whose colour profile has a name; see `remove_profile`."""
_SEEK_MARGIN = 1.0
"""Seconds before the target at which a seek aims, as the index of some containers is coarse."""
_BUFFER_BYTES = 1 << 18
"""Bytes per read; each read is a call into Python."""
_TAG_OPTIONS: dict[str, Any] = {"metadata_errors": "replace"} if hasattr(InputContainer, "metadata_errors") else {}
"""Arguments of `av.open` that keep PyAV 18 from refusing a file whose tags are not UTF-8; PyAV 19 never does."""
_DECODE_EXCEPTIONS = (av.FFmpegError, ValueError, ArithmeticError, LookupError, MemoryError, EOFError, OSError)
"""Exceptions of PyAV for damaged files: ffmpeg's errors, text that is not UTF-8, rates of n/0, sizes that overflow."""
_REFERENCE_DECODERS = ("h264", "hevc")
"""Codecs whose decoders can leave out, packet by packet, frames to which no others refer."""
_STRICT_DECODERS = ("mjpeg", "png", "apng")
"""Decoders that make up what is missing of a picture, and say so only when they are asked to fail. Those of videos
would fail on files that are shown everywhere, and at most places to which one may seek."""
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders of transparency, which ffmpeg's own decoders of these codecs ignore."""
_BRANDS = {b"avif": "avif"} | dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"mif1"), "heic")
"""Kinds of pictures by the brand with which a file begins (ISO/IEC 23008-12); sequences have others."""


class TimedFrame(NamedTuple):
    """A decoded frame and its time."""

    time: float
    """Seconds from the start of the file's first frame to this one's."""
    duration: float
    """Duration in seconds; 0 if the file does not say it."""
    frame: av.VideoFrame


class FileGuard(Protocol):
    """Limits of a process on the memory and the time that one file takes."""

    def limit_opening(self, length: int) -> None:
        """Set the limits for opening a file of so many bytes."""

    def limit_reading(self, length: int, pixels: int, total_pixels: int) -> None:
        """Set the limits for decoding it, by the pixels of a frame and of all frames that its header claims."""


@contextlib.contextmanager
def wrap_decode_errors(name: str, location: str = "") -> Iterator[None]:
    """Convert exceptions of ffmpeg and PyAV about a file to a `DecodeError` of one line."""
    try:
        yield
    except UserError:
        raise
    except _DECODE_EXCEPTIONS as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
        problem = f"is damaged {location}" if location else "is not a readable video or image"
        raise DecodeError(f"{name} {problem} ({reason}); remove it or replace it") from error


class Video(contextlib.AbstractContextManager["Video"]):
    """An open file and its video stream; a context manager.

    Args:
      source: A file, or its bytes.
      is_exact: False to decode up to a fifth faster, without the filter that smooths the edges of blocks; the number
        and the times of frames, and what is damaged, are the same.

    Raises:
      MissingError: If the file does not exist.
      DecodeError: If the file is not a readable video or image.
    """

    guard: ClassVar[FileGuard | None] = None
    """Limits of this process, set where files are hostile; None permits everything."""

    def __init__(self, source: str | Path | bytes, *, is_exact: bool = True):
        source = Path(source) if isinstance(source, str) else source
        self.name = f"video of {len(source)} bytes" if isinstance(source, bytes) else str(source)
        if isinstance(source, Path) and not source.is_file():
            raise MissingError(f"no such video or image file: {source}")
        self._source, self._is_exact = source, is_exact
        self._resources = contextlib.ExitStack()
        self._reopen()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._resources.close()

    def _reopen(self) -> None:
        """Open the file, or open it again to return to its beginning."""
        self.close()
        try:
            with wrap_decode_errors(self.name):
                self._read_header(self._open())
        except BaseException:
            self.close()
            raise

    def _open(self) -> av.container.InputContainer:
        # ffmpeg sees no name: it would take one for a pattern (clip%02d.png) or a protocol (12:30.mp4), and choose the
        # format by its suffix.
        source = self._source
        file = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb", buffering=0)
        file.name = ""
        self._resources.callback(file.close)
        self.head = file.read(21)
        """First bytes of the file."""
        self._length = file.seek(0, 2)
        if self.guard is not None:
            self.guard.limit_opening(self._length)
        check_mp4_header(file, self.name)
        check_is_whole(file, self.name)
        self._crops = read_crops(file)
        # A playlist in place of a video could otherwise open further files, or network addresses.
        options = {
            "protocol_whitelist": "none",
            "format_whitelist": _CONTAINERS,
            "max_pixels": str(MAX_PIXELS),
            "default_fps": "10",  # of frames of an APNG that have no duration, as of other animations
        }
        try:
            container = av.open(file, "r", options=options, buffer_size=_BUFFER_BYTES, **_TAG_OPTIONS)
        except av.ArgumentError as error:  # ffmpeg's error for a format that is not on the list
            raise DecodeError(
                f"{self.name} is not a readable video or image: it is damaged, or has no readable video stream in a "
                "format that is opened (mp4, mov, mkv, webm, avi …); convert it to H.264 in mp4"
            ) from error
        self._resources.callback(container.close)
        self._check_index(container)
        # ffmpeg generates wrong timestamps for reordered frames without them (H.264 in AVI).
        container.flags &= ~cast(int, Flags.gen_pts.value)
        return container

    def _check_index(self, container: av.container.InputContainer) -> None:
        """Raise `DecodeError` if a track's table claims more packets than the file has bytes for.

        A few bytes of header can claim any number of them, and ffmpeg keeps an entry of 24 bytes for each. If there is
        a limit of memory, it makes no entry instead, and says nothing.
        """
        for stream in container.streams:
            entries = len(stream.index_entries)
            is_given_up = self.guard is not None and "mov" in container.format.name and stream.frames and not entries
            if entries > self._length or is_given_up:
                raise DecodeError(
                    f"{self.name} claims {entries or stream.frames} packets in a track, which its {self._length} bytes "
                    "cannot hold; remove it or replace it"
                )

    def _read_header(self, container: av.container.InputContainer) -> None:
        streams = [
            stream
            for stream in container.streams.video
            if stream.codec_context is not None
            and not stream.disposition & Disposition.attached_pic  # cover art is no video
        ]
        if not streams:
            raise DecodeError(f"{self.name} has no readable video stream; remove it or convert it to H.264")
        best = container.streams.best("video")
        stream = next((stream for stream in streams if stream is best), streams[0])
        context = stream.codec_context
        self.metadata: dict[str, str] = {_replace_bad(k): _replace_bad(v) for k, v in container.metadata.items()}
        """Tags of the file; bytes that are not UTF-8 are replaced by U+FFFD."""
        heif_kind = find_heif_kind(self.head)
        self.codec: str = heif_kind or context.name.removesuffix("_anim")  # of animated WebP, since ffmpeg 8.1
        self.claimed_seconds: float = (container.duration or 0) / av.time_base
        """Duration that the header claims, in seconds; 0 if it claims none."""
        pixels = context.width * context.height
        self._pictures: Iterable[av.VideoFrame] | None = None
        # Pillow would leave HDR as it is.
        if (heif_kind and (len(streams) > 1 or int(context.color_trc) not in TRANSFERS)) or self.codec == "tiff":
            self._pictures = (read_picture(self.read_content(), self.name),)
        elif is_animated_webp(self.head):
            self._pictures = animation = AnimatedWebp(self.read_content())
            check_size(animation.height, animation.width, self.name)
            self.claimed_seconds, pixels = sum(animation.milliseconds) / 1000, animation.height * animation.width
        if stream.metadata.get("alpha_mode") == "1" and self.codec in _ALPHA_DECODERS:
            context = cast(av.VideoCodecContext, av.CodecContext.create(_ALPHA_DECODERS[self.codec], "r"))
        context.thread_count = 1
        context.options = {"max_pixels": str(MAX_PIXELS)} | ({} if self._is_exact else {"skip_loop_filter": "all"})
        if self.codec in _STRICT_DECODERS:
            context.options |= {"err_detect": "crccheck+explode"}
        self._container, self._stream, self._context = container, stream, context
        self._first_aspect = context.sample_aspect_ratio  # that of the file's beginning, if that has one
        self._start_time: int | None = stream.start_time
        self._error_location = "at its start"
        for other in container.streams:
            if other is not stream:
                other.discard = Discard.all
        track = container.streams.video.index(stream)
        crop = self._crops[track] if track < len(self._crops) else Crop(0, 0, 0, 0)
        left = min(stream.width - crop.left - crop.right, stream.height - crop.top - crop.bottom)
        self.crop: Crop | None = crop if any(crop) and min(crop) >= 0 and left > 0 else None
        """Pixels that the container removes from decoded pictures, as `read_frames` does; None if it removes none."""
        aspect = stream.sample_aspect_ratio
        self.sample_aspect: Fraction = Fraction(aspect) if aspect and aspect > 0 else Fraction(1)
        """Width of a stored pixel divided by its height."""
        # Without timestamps, the average rate is ffmpeg's default of 25.
        rates = [stream.average_rate, stream.guessed_rate, stream.base_rate]
        candidates = rates if self._start_time is not None else rates[1:]
        self._rate = next((float(rate) for rate in candidates if rate), 25.0)
        if isinstance(self._pictures, AnimatedWebp) and self.claimed_seconds:
            self._rate = len(self._pictures.milliseconds) / self.claimed_seconds
        if self.guard is not None:
            total_pixels = int(pixels * max(1.0, self.claimed_seconds * self._rate))
            self.guard.limit_reading(self._length, pixels, total_pixels)

    def read_content(self) -> bytes:
        """Return the bytes of the file."""
        return self._source if isinstance(self._source, bytes) else self._source.read_bytes()

    @property
    def profile(self) -> bytes | None:
        """Return the colour profile of a PNG file, which its frames do not have; None for other files."""
        if self.codec not in _NAMED_PROFILES:
            return None
        try:
            with Image.open(io.BytesIO(self._source) if isinstance(self._source, bytes) else self._source) as image:
                return image.info.get("icc_profile")
        except (OSError, ValueError, SyntaxError):  # Pillow refuses what ffmpeg reads
            return None

    def get_rate(self, frames: int) -> float:
        """Return the average frames per second of a file with this number of frames; 1 for an image."""
        return 1.0 if frames == 1 and self.codec in IMAGE_CODECS else self._rate

    def read_frames(self, start: float = 0.0) -> Iterator[TimedFrame]:
        """Yield the frames shown from `start` seconds on, and some before them: from a key frame on, or all.

        Times never decrease. Frames are as stored, interlaced ones too.

        Raises:
          DecodeError: If the file is damaged; the message says where.
        """
        seeks = start > _SEEK_MARGIN and self._pictures is None
        frames, origin = self._seek(start) if seeks else (self._decode_frames(), None)
        spacing, previous, aspect = 1 / self._rate, None, None
        for frame in frames:
            base = frame.time_base or Fraction(1, 1000)
            timestamp = frame.dts if frame.pts is None else frame.pts
            if previous is None and origin is None:
                origin = timestamp
            if timestamp is not None and origin is not None:
                time = float((timestamp - origin) * base)
            else:
                time = 0.0 if previous is None else previous.time + (previous.duration or spacing)
            if previous is not None:
                time = self._check_time(time, previous.time)
            self._error_location = f"after {time:.2f} s"
            if frame.is_corrupt and time + spacing > start:
                raise DecodeError(f"{self.name} is damaged at {time:.2f} s; remove it or replace it")
            decoded_aspect = self._context.sample_aspect_ratio or Fraction(1)  # of the frame that was decoded last
            if aspect is None:  # containers may have an aspect that their frames do not repeat
                is_repeated = self._context.sample_aspect_ratio and self._first_aspect
                aspect = self._first_aspect if is_repeated else decoded_aspect
            if decoded_aspect != aspect:
                raise DecodeError(
                    f"{self.name} changes its pixel aspect from {aspect} to {decoded_aspect} at {time:.2f} s, and a "
                    "clip has one; cut the file there"
                )
            previous = TimedFrame(time, float((frame.duration or 0) * base), frame)
            self._check_time(time + previous.duration, time)
            yield previous
        if not seeks and self._pictures is None:
            self._check_gaps()

    def _check_gaps(self) -> None:
        """Raise `DecodeError` if ffmpeg has left out a part of the file without a word."""
        format = self._container.format.name
        if "mov" in format and not all(entry.size for entry in self._stream.index_entries):
            raise DecodeError(f"{self.name} is damaged: its table has empty frames; remove it or replace it")
        file = io.BytesIO(self._source) if isinstance(self._source, bytes) else self._source.open("rb")
        with wrap_decode_errors(self.name, self._error_location), file:
            check_is_gapless(file, format, self._stream.id, self.name)

    def _check_time(self, time: float, previous: float) -> float:
        if not previous - _SEEK_MARGIN <= time <= previous + MAX_FRAME_SECONDS:
            raise DecodeError(
                f"{self.name} has timestamps that jump from {previous:.2f} s to {time:.2f} s; remove it, or write "
                "it again with continuous times"
            )
        return max(time, previous)

    def _seek(self, start: float) -> tuple[Iterator[av.VideoFrame], int | None]:
        """Return frames from a key frame before `start` on, and the first frame's timestamp; all frames on failure.

        A seek is exact only if frames have timestamps, and goes too far in files with a bad index.
        """
        origin, base = self._read_first_timestamp(), self._stream.time_base
        if origin is not None and base:
            frames, first = self._decode_frames(), None
            with contextlib.suppress(*_DECODE_EXCEPTIONS):
                target = origin + int((start - _SEEK_MARGIN) / base)
                self._container.seek(target, stream=self._stream, backward=True)
                self._context.flush_buffers()
                first = next(frames, None)
            if first is not None and first.pts is not None and float((first.pts - origin) * base) <= start + TOLERANCE:
                return itertools.chain([first], frames), origin
        self._reopen()
        return self._decode_frames(), None

    def _read_first_timestamp(self) -> int | None:
        """Return the timestamp of the first frame, which is decoded only if its packet does not have it."""
        with wrap_decode_errors(self.name, self._error_location):
            packet = next(self._container.demux(self._stream), None)
        if packet is None:
            return None
        if packet.is_keyframe and not packet.is_discard and packet.pts is not None and packet.pts == self._start_time:
            return packet.pts
        self._reopen()
        first = next(self._decode_frames(), None)
        return None if first is None else first.pts

    def _decode_frames(self) -> Iterator[av.VideoFrame]:
        if self._pictures is not None:
            pictures = iter(self._pictures)
            while True:
                with wrap_decode_errors(self.name, self._error_location):
                    picture = next(pictures, None)
                if picture is None:
                    return
                yield picture
        packets, more, is_discarded = iter(self._container.demux(self._stream)), True, False
        if self._container.format.name.endswith("_pipe"):  # a picture; phones append others, of its brightness or depth
            packets = itertools.islice(packets, 1)
        while more:
            with wrap_decode_errors(self.name, self._error_location):
                packet = next(packets, None)
                more = packet is not None
                if packet is not None and not packet.size:
                    continue  # an empty packet would flush the decoder, and AVI repeats a frame by one
                if packet is not None and packet.is_discard != is_discarded and self.codec in _REFERENCE_DECODERS:
                    # Of frames that are not shown, those alone are decoded that others refer to.
                    is_discarded = packet.is_discard
                    self._context.skip_frame = "NONREF" if is_discarded else "DEFAULT"
                if packet is not None and self.codec == "gif":
                    check_gif_packet(bytes(packet), self._context.width)
                frames = self._context.decode(packet)
            for frame in frames:
                frame.time_base = frame.time_base or self._stream.time_base
                frame = crop_frame(frame, self.crop) if self.crop else frame
                yield remove_profile(frame) if self.codec in _NAMED_PROFILES else frame


def get_frame_format(frame: av.VideoFrame) -> tuple[int, int, str, int, int]:
    """Return the properties common to all frames of a graph: width, height, format, color matrix and range."""
    return frame.width, frame.height, frame.format.name, int(frame.colorspace), int(frame.color_range)


def make_filter_graph(frame: av.VideoFrame, *filters: tuple[str, str]) -> Graph:
    """Return a graph of filters, by name and arguments, applied in order to frames of the same format as `frame`."""
    width, height, format, space, color_range = get_frame_format(frame)
    graph = Graph()
    graph.threads = 1
    source = graph.add(
        "buffer",
        f"video_size={width}x{height}:pix_fmt={format}:time_base={frame.time_base or Fraction(1, 1000)}"
        f":pixel_aspect=1/1:colorspace={space}:range={color_range}",
    )
    graph.link_nodes(source, *(graph.add(*part) for part in filters), graph.add("buffersink")).configure()
    return graph


def crop_frame(frame: av.VideoFrame, crop: Crop) -> av.VideoFrame:
    """Return the part of a frame that is shown."""
    width, height = frame.width - crop.left - crop.right, frame.height - crop.top - crop.bottom
    graph = make_filter_graph(frame, ("crop", f"{width}:{height}:{crop.left}:{crop.top}:exact=1"))
    graph.vpush(frame)
    return graph.vpull()


def check_size(height: int, width: int, name: str) -> None:
    """Raise `DecodeError` if a picture exceeds `MAX_PIXELS`."""
    if height * width > MAX_PIXELS:
        raise DecodeError(f"{name} has {height}x{width} pixels, over the limit of {MAX_PIXELS}; make it smaller")


def find_heif_kind(head: bytes) -> str:
    """Return "avif" or "heic" for a picture, by the first 12 bytes of its file; empty for any other file."""
    return _BRANDS.get(head[8:12], "") if head[4:8] == b"ftyp" else ""


def read_picture(content: bytes, name: str) -> av.VideoFrame:
    """Return a picture in HEIF or the first one in TIFF, upright and in sRGB.

    Raises:
      DecodeError: If the picture is too large, a package is not installed, or its pixels are no colours.
      OSError: If the picture is damaged.
    """
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    formats: list[str] = [format for format in ("AVIF", "HEIF", "TIFF") if format in Image.OPEN]
    if find_heif_kind(content) == "heic" and "HEIF" not in formats:
        raise DecodeError(
            f"{name} is HEIC, which needs a package that is not installed: pip install pillow-heif, or convert it"
        )
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            check_size(image.height, image.width, name)
            profile, format = image.info.get("icc_profile"), "rgba" if image.has_transparency_data else "rgb24"
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("I", "F"):
                raise DecodeError(f"{name} has pixels of 32 bits; convert it to 8 or 16 bits a colour")
            if upright.mode.startswith("I;16"):  # gray of 16 bits, which Pillow would clip
                upright = Image.fromarray(np.rint(np.asarray(upright) / 257).astype(np.uint8))
            picture = np.array(upright.convert("RGBA" if format == "rgba" else "RGB"))
    except (RuntimeError, SyntaxError) as error:  # of Pillow's plugins
        raise OSError(str(error)) from error
    if profile:
        picture[..., :3] = convert_to_srgb(picture[..., :3], profile)
    return av.VideoFrame.from_ndarray(picture, format=format)


def _replace_bad(text: str) -> str:
    # PyAV 19 decodes bytes that are not UTF-8 to surrogates, which cannot be written anywhere.
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def remove_profile(frame: av.VideoFrame) -> av.VideoFrame:
    """Return a frame without its colour profile.

    PyAV 18 and 19 free the name of a profile twice if a frame's side data were read and the frame is collected, which
    ends the process.
    """
    graph = make_filter_graph(frame, ("sidedata", "mode=delete:type=ICC_PROFILE"))
    graph.vpush(frame)
    return graph.vpull()
