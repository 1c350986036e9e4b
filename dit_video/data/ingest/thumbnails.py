"""The small pictures of a file's frames that measures are taken on."""

import av
import numpy as np
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from jaxtyping import Real, UInt8

from dit_video.video.reader import complaints
from dit_video.video.to_rgb import is_full_range, is_transparent, orientation, over_black

LONG_SIDE = 256
"""Pixels of a thumbnail's longer side, whatever the clip's size: small ones are enlarged, so that measures compare."""
SHORT_SIDE = 16
"""Pixels at least of the shorter one; pictures longer than 16:1 are squeezed."""

_TRIANGLE = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
"""swscale's bilinear filter widens with the scale, so that shrinking doesn't alias; these flags give the same values on
all processors."""


class Pictures:
    """Small pictures of one file's frames: as they are stored, not turned, pixels taken as square.

    Args:
      name: of the file, for messages.

    Its methods raise `DecodeError` on a frame that ffmpeg can't convert.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # Each keeps what swscale prepared for its last conversion.
        self._small, self._whole = VideoReformatter(), VideoReformatter()
        self._size: tuple[int, int] | None = None
        self._orientation: tuple[bool, bool, bool] | None = None

    def thumbnail(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
        """Full-range RGB, the longer side `LONG_SIDE`; transparent pixels over black. All of one size."""
        if self._size is None:
            scale = LONG_SIDE / max(frame.height, frame.width)
            self._size = max(SHORT_SIDE, round(frame.height * scale)), max(SHORT_SIDE, round(frame.width * scale))
        picture = self._converted(self._small, frame, "rgb24", *self._size)
        return over_black(picture) if is_transparent(frame) else picture

    def luma(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "H W"]:
        """Full-range luma at the stored size; transparent pixels over black."""
        if is_transparent(frame):
            picture = over_black(self._converted(self._whole, frame, "rgba", frame.height, frame.width))
            return np.rint(picture @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
        return self._converted(self._whole, frame, "gray", frame.height, frame.width)

    def upright(self, picture: Real[np.ndarray, "H W"], frame: av.VideoFrame) -> Real[np.ndarray, "h w"]:
        """A picture of a frame as it is shown: by quarter turns and reflections."""
        if self._orientation is None:
            # Of the first frame alone: one whose side data were read refers to itself, and would stay in memory until
            # the garbage collector runs, which counts objects and not bytes.
            self._orientation = orientation(frame)
        turned, flip_rows, flip_columns = self._orientation
        picture = picture.swapaxes(0, 1) if turned else picture
        return picture[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]

    def _converted(
        self, convert: VideoReformatter, frame: av.VideoFrame, format: str, height: int, width: int
    ) -> UInt8[np.ndarray, "h w *channels"]:
        with complaints(self._name):
            return convert.reformat(
                frame,
                width,
                height,
                format="rgba" if is_transparent(frame) else format,
                src_color_range=ColorRange.JPEG if is_full_range(frame) else ColorRange.MPEG,
                dst_color_range=ColorRange.JPEG,
                interpolation=_TRIANGLE,
                threads=1,
            ).to_ndarray()
