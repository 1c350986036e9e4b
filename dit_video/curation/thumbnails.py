"""Thumbnails of a file's frames, on which measures are taken."""

import av
import numpy as np
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from jaxtyping import Real, UInt8

from dit_video.video.reader import wrap_decode_errors
from dit_video.video.to_rgb import blend_over_black, is_full_range, is_transparent, read_orientation

LONG_SIDE = 256
"""Length of a thumbnail's longer side in pixels. Smaller frames are enlarged, so that measures are comparable."""
MIN_SHORT_SIDE = 16
"""Minimum length of the shorter side in pixels; frames longer than 16:1 are squeezed."""

_INTERPOLATION = (
    Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
)
"""The bilinear filter of swscale widens with the scale, so that shrinking does not alias; these flags give the same
values on all processors."""
_PLANAR_YUV = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p")
"""Formats whose first plane is luma in 8 bits."""
_FULL_RANGE = np.clip(np.rint((np.arange(256) - 16) * 255 / 219), 0, 255).astype(np.uint8)
"""Full-range luma by limited-range luma."""
_AREA = _INTERPOLATION & ~Interpolation.BILINEAR | Interpolation.AREA
"""Flags of the average over areas."""


class ThumbnailMaker:
    """A converter of one file's frames to thumbnails and luma, as stored: not turned, with pixels taken as square.

    Its methods raise `DecodeError` for a frame that ffmpeg cannot convert.

    Args:
      name: name of the file, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # Each caches swscale's context for one size of output, so there is one per size.
        self._thumbnail_reformatter, self._full_size_reformatter = VideoReformatter(), VideoReformatter()
        self._tiny_reformatter = VideoReformatter()
        self._size: tuple[int, int] | None = None
        self._orientation: tuple[bool, bool, bool] | None = None

    def make_thumbnail(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
        """Return full-range RGB with the longer side `LONG_SIDE`, all of one size; transparency is over black."""
        if self._size is None:
            scale = LONG_SIDE / max(frame.height, frame.width)
            height, width = (max(MIN_SHORT_SIDE, round(side * scale)) for side in (frame.height, frame.width))
            self._size = height, width
        picture = self._convert(self._thumbnail_reformatter, frame, "rgb24", *self._size)
        return blend_over_black(picture) if is_transparent(frame) else picture

    def make_tiny_picture(self, frame: av.VideoFrame, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
        """Return full-range RGB of a few pixels, each the average of an area, at an eighth of a thumbnail's cost."""
        picture = self._convert(self._tiny_reformatter, frame, "rgb24", height, width, _AREA)
        return blend_over_black(picture) if is_transparent(frame) else picture

    def make_luma(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "H W"]:
        """Return full-range luma at the stored size; transparency is over black."""
        if frame.format.name in _PLANAR_YUV:  # the same values as swscale's, ten times as fast
            plane = frame.planes[0]
            stored = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[
                : frame.height, : frame.width
            ]
            return stored if is_full_range(frame) else _FULL_RANGE[stored]
        picture = self._convert(self._full_size_reformatter, frame, "gray", frame.height, frame.width)
        if not is_transparent(frame):
            return picture
        return np.rint(blend_over_black(picture) @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)

    def turn_upright(self, picture: Real[np.ndarray, "H W"], frame: av.VideoFrame) -> Real[np.ndarray, "h w"]:
        """Return a frame as it is shown, by quarter turns and reflections."""
        if self._orientation is None:
            # Read from the first frame alone: a frame whose side data were read refers to itself, and would stay in
            # memory until the garbage collector runs, which counts objects and not bytes.
            self._orientation = read_orientation(frame)
        is_transposed, flip_rows, flip_columns = self._orientation
        picture = picture.swapaxes(0, 1) if is_transposed else picture
        return picture[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]

    def _convert(
        self,
        reformatter: VideoReformatter,
        frame: av.VideoFrame,
        format: str,
        height: int,
        width: int,
        filter: int = _INTERPOLATION,
    ) -> UInt8[np.ndarray, "h w *channels"]:
        with wrap_decode_errors(self._name):
            return reformatter.reformat(
                frame,
                width,
                height,
                format="rgba" if is_transparent(frame) else format,
                src_color_range=ColorRange.JPEG if is_full_range(frame) else ColorRange.MPEG,
                dst_color_range=ColorRange.JPEG,
                interpolation=filter,
                threads=1,
            ).to_ndarray()
