"""Frames to the images that a vision tower reads: resized, cropped, their colours scaled."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.core.errors import UserError
from dit_video.features.clip.resize import resize_bicubic


@dataclass(frozen=True, kw_only=True)
class ClipImages:
    """What `transformers`' `CLIPImageProcessor` is told; `weights.load_clip_images` reads it from a folder.

    Raises:
      UserError: a size below 1, or deviations that are not above zero.
    """

    resize: int | tuple[int, int] | None = 224
    """pixels of the shorter side, the longer one in proportion; or height and width, whatever the proportion"""
    crop: tuple[int, int] | None = (224, 224)
    """height and width of what is left around the centre"""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """of red, green and blue in [0, 1]"""

    def __post_init__(self):
        sizes = (*(self.resize if isinstance(self.resize, tuple) else (self.resize,)), *(self.crop or ()))
        if any(size is not None and size < 1 for size in sizes):
            raise UserError(f"the sizes of an image must be at least 1, not resize {self.resize}, crop {self.crop}")
        if min(self.std) <= 0:
            raise UserError(f"the deviations of colours must be above 0, not {self.std}")

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """The height and width that frames of a size are resized to."""
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        long = int(self.resize * max(height, width) / min(height, width))
        return (long, self.resize) if width <= height else (self.resize, long)


def prepare(frames: UInt8[np.ndarray, "T H W 3"], images: ClipImages) -> Float32[np.ndarray, "T h w 3"]:
    """`(cropped / 255 - mean) / std` of the resized frames.

    Raises:
      UserError: frames that are smaller than the crop.
    """
    resized = resize_bicubic(frames, *images.resized(*frames.shape[1:3]))
    if images.crop is not None:
        resized = _centre(resized, *images.crop)
    mean, std = np.asarray(images.mean, np.float32), np.asarray(images.std, np.float32)
    return (resized.astype(np.float32) / np.float32(255) - mean) / std


def _centre(frames: UInt8[np.ndarray, "T H W 3"], height: int, width: int) -> UInt8[np.ndarray, "T h w 3"]:
    given_height, given_width = frames.shape[1:3]
    if given_height < height or given_width < width:
        raise UserError(
            f"frames that are resized to {given_height}x{given_width} have no crop of {height}x{width}; resize them to "
            "more, or crop less"
        )
    top, left = (given_height - height) // 2, (given_width - width) // 2
    return frames[:, top : top + height, left : left + width]
