"""Conversion of decoded frames to upright pictures in square pixels and full-range RGB of BT.709."""

import math
from fractions import Fraction
from typing import NamedTuple, cast

import av
import numpy as np
from av.sidedata.sidedata import SideData, SideDataContainer, Type
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from jaxtyping import UInt8, UInt16

from dit_video.core.errors import DecodeError
from dit_video.core.resize import resize
from dit_video.video.background import BLACK, Colour, blend
from dit_video.video.colours import TRANSFERS, convert_to_srgb, map_to_sdr
from dit_video.video.encode import ACCURATE_FLAGS
from dit_video.video.reader import check_size, make_filter_graph, wrap_decode_errors

RESIZE_FLAGS = ACCURATE_FLAGS & ~Interpolation.BICUBIC | Interpolation.BILINEAR
"""Flags of swscale's triangle filter, which is widened when downsampling, as in `core.resize`."""

_UNKNOWN, _BT709, _BT601 = (0, 2), 1, 6
_COLORSPACES = {
    _BT709: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    _BT601: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
}
"""Colour spaces by ISO/IEC 23091-2's number for matrix coefficients."""
_UNSUPPORTED = {
    **{8: "YCgCo", 10: "constant-luminance BT.2020", 11: "ST 2085", 12: "derived", 13: "derived", 14: "ICtCp"},
    **{15: "IPT-C2", 16: "YCgCo-Re", 17: "YCgCo-Ro"},
}
"""Names of matrix coefficients that ffmpeg's scaler does not support either."""
_MAX_TILT = math.tan(math.radians(1))
"""Tangent of the angle that is left out, as ffmpeg does: matrices are rounded."""
_UNNAMED_SIDE_DATA = sorted(set(range(64)) - {kind.value for kind in Type})
"""Numbers of side data that PyAV has no name for."""


class Orientation(NamedTuple):
    """The steps that make a picture upright: transpose it, then flip its rows, then its columns."""

    transposed: bool
    flip_rows: bool
    flip_columns: bool


def read_orientation(frame: av.VideoFrame, name: str = "the video") -> Orientation:
    """Return the orientation of a frame of the file `name`.

    The display matrix of ISO/IEC 14496-12 maps a stored point (x, y) to (a x + c y, b x + d y), in 16.16 fixed point.

    Raises:
      DecodeError: If the picture is turned by another angle than a right one: it would have corners without pixels.
    """
    matrix = _read_side_data(frame, Type.DISPLAYMATRIX)
    if matrix is None:
        return Orientation(False, False, False)
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5]
    transposed = abs(int(b)) > abs(int(a))
    # The smaller part of a side's vector divided by the larger one is the tangent of the angle that is left.
    smaller, larger = ((a, d), (b, c)) if transposed else ((b, c), (a, d))
    if any(abs(int(part)) > _MAX_TILT * abs(int(whole)) for part, whole in zip(smaller, larger, strict=True)):
        angle = math.degrees(math.atan2(b, a)) % 360
        raise DecodeError(
            f"{name} is shown turned by {angle:.0f} degrees, with empty corners, and a clip may be by 90, 180 or 270; "
            "encode it upright, or remove it"
        )
    return Orientation(transposed, bool((b if transposed else d) < 0), bool((c if transposed else a) < 0))


def _read_side_data(frame: av.VideoFrame, kind: Type) -> SideData | None:
    try:
        # PyAV's stub gives the attribute another type, with a single key.
        return cast(SideDataContainer, frame.side_data).get(kind)
    except ValueError:  # PyAV reads no side data of a frame with an unknown kind of it: EXIF, view id, LCEVC …
        graph = make_filter_graph(frame, *(("sidedata", f"mode=delete:type={kind}") for kind in _UNNAMED_SIDE_DATA))
        graph.vpush(frame)
        return cast(SideDataContainer, graph.vpull().side_data).get(kind)


def get_transfer(frame: av.VideoFrame) -> str:
    """Return the transfer function of a frame: "pq", "hlg", or "sdr" for all others."""
    return TRANSFERS.get(int(frame.color_trc), "sdr")


def compute_display_size(frame: av.VideoFrame, sample_aspect: Fraction, name: str) -> tuple[int, int]:
    """Return height and width of the upright picture in square pixels; a width is `round(width * sample_aspect)`.

    Raises:
      DecodeError: If the picture exceeds `MAX_PIXELS`, is turned by no right angle, or ffmpeg can't read its
        orientation.
    """
    with wrap_decode_errors(name):
        transposed = read_orientation(frame, name).transposed
    return _compute_display_size(frame, sample_aspect, transposed, name)


def _compute_display_size(frame: av.VideoFrame, aspect: Fraction, transposed: bool, name: str) -> tuple[int, int]:
    width = max(1, round(frame.width * aspect))
    check_size(frame.height, width, name)
    return (width, frame.height) if transposed else (frame.height, width)


def make_resize_error(name: str, before: tuple[int, int], after: tuple[int, int], time: float) -> DecodeError:
    """Return the error that a file's frames change their height and width at `time`, in seconds."""
    sizes = f"from {before[0]}x{before[1]} to {after[0]}x{after[1]} at {time:.2f} s"
    return DecodeError(f"{name} changes its frame size {sizes}, and a clip has one; cut the file there")


class RgbConverter:
    """A converter of a file's frames to RGB pictures.

    Args:
      name: Name of the file, for messages.
      sample_aspect: Width of a stored pixel divided by its height.
      size: Height and width of the pictures; None uses their display size.
      profile: Colour profile of the pictures; None for a frame's own profile, if it has one.
      background: Colour behind transparent pixels.
    """

    def __init__(
        self,
        name: str,
        sample_aspect: Fraction,
        size: tuple[int, int] | None,
        *,
        profile: bytes | None = None,
        background: Colour = BLACK,
    ):
        self._name, self._aspect, self._size, self._profile = name, sample_aspect, size, profile
        self._background = background
        self._reformatter, self._stored_size = VideoReformatter(), (0, 0)

    def __call__(self, frame: av.VideoFrame, time: float) -> UInt8[np.ndarray, "H W 3"]:
        """Convert a frame that is shown at `time`, in seconds.

        Raises:
          DecodeError: If the frame is too large, or has another size than the first one; or ffmpeg can't convert its
            colours or format.
        """
        size = frame.height, frame.width
        if self._stored_size not in ((0, 0), size):
            raise make_resize_error(self._name, self._stored_size, size, time)
        self._stored_size = size
        with wrap_decode_errors(self._name, f"at {time:.2f} s"):
            transposed, flip_rows, flip_columns = read_orientation(frame, self._name)
            display_size = _compute_display_size(frame, self._aspect, transposed, self._name)
            height, width = self._size or display_size
            picture = self._convert_stored(frame, *((width, height) if transposed else (height, width)))
            if get_transfer(frame) == "sdr":
                profile = self._profile or _read_side_data(frame, Type.ICC_PROFILE)
                picture = picture if profile is None else convert_to_srgb(picture, bytes(profile))
        if transposed:
            picture = picture.swapaxes(0, 1)
        return np.ascontiguousarray(picture[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])

    def _convert_stored(self, frame: av.VideoFrame, height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
        """Return the picture before it is made upright."""
        if has_alpha(frame):
            image = blend(self._reformat(frame, "gbrap"), self._background)
        elif (transfer := get_transfer(frame)) != "sdr":
            return map_to_sdr(self._reformat(frame, "gbrp16le", height, width), transfer, int(frame.color_primaries))
        elif frame.format.is_rgb:
            image = self._reformat(frame, "gbrp")
        else:  # swscale resizes YUV without converting it, with no more rounding than `core.resize`.
            return self._reformat(frame, "gbrp", height, width)
        return resize(image[None], height, width)[0]

    def _reformat(
        self, frame: av.VideoFrame, format: str, height: int | None = None, width: int | None = None
    ) -> UInt8[np.ndarray, "H W C"] | UInt16[np.ndarray, "H W C"]:
        is_same_size = (height or frame.height, width or frame.width) == (frame.height, frame.width)
        full_range = is_full_range(frame)
        if frame.format.name.startswith("gray") and not full_range:
            # swscale takes all gray for full range, so limited-range gray is converted as YUV.
            yuv_format = "yuv444p" if frame.format.name == "gray" else "yuv444p16le"
            frame = self._reformatter.reformat(
                frame, format=yuv_format, src_color_range=ColorRange.JPEG, dst_color_range=ColorRange.JPEG, threads=1
            )
        # swscale writes planar RGB of YUV four times as fast as packed RGB, with the same values.
        return self._reformatter.reformat(
            frame,
            width,
            height,
            format,
            src_colorspace=self._get_colorspace(frame),
            src_color_range=ColorRange.JPEG if full_range else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
            interpolation=ACCURATE_FLAGS if is_same_size else RESIZE_FLAGS,
            threads=1,
        ).to_ndarray()

    def _get_colorspace(self, frame: av.VideoFrame) -> Colorspace | None:
        space = int(frame.colorspace)
        if frame.format.is_rgb or frame.format.has_palette:
            return None
        if space not in _COLORSPACES and space not in _UNKNOWN:
            matrix = _UNSUPPORTED.get(space, f"the unknown matrix {space}")
            raise DecodeError(
                f"{self._name} has colours in {matrix}, which ffmpeg can't convert; convert the file to BT.709"
            )
        if space not in _COLORSPACES and get_transfer(frame) != "sdr":
            return Colorspace.BT2020
        if space not in _COLORSPACES:
            # Players' assumption (mpv's mp_csp_guess_colorspace): high definition is BT.709, the rest BT.601.
            space = _BT709 if frame.width >= 1280 or frame.height > 576 else _BT601
        return _COLORSPACES[space]


def has_alpha(frame: av.VideoFrame) -> bool:
    """Return whether a frame's format has transparency; any colour of a palette may be transparent."""
    return frame.format.has_palette or any(part.is_alpha for part in frame.format.components)


def is_transparent(frame: av.VideoFrame) -> bool:
    """Return whether a pixel of a frame is transparent."""
    return has_alpha(frame) and bool(frame.reformat(format="rgba", threads=1).to_ndarray()[..., 3].min() < 255)


def is_full_range(frame: av.VideoFrame) -> bool:
    """Return whether colours are in full range: YUV if tagged so, gray unless tagged limited, others always."""
    name, color_range = frame.format.name, int(frame.color_range)
    if name.startswith("gray"):
        return color_range != ColorRange.MPEG
    is_always_full = frame.format.is_rgb or frame.format.has_palette or name.startswith(("yuvj", "ya", "mono"))
    return is_always_full or color_range == ColorRange.JPEG
