"""Preprocessing of frames for a vision tower: resize, crop, normalise colours."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from dit_video.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ClipImageProcessor:
    """Options of `transformers`' `CLIPImageProcessor`; `weights.load_clip_images` reads them from a folder.

    Raises:
      UserError: a size below 1, or standard deviations that are not above zero.
    """

    resize: int | tuple[int, int] | None = 224
    """Pixels of the shorter side, with the aspect ratio kept; or height and width; None does not resize."""
    crop: tuple[int, int] | None = (224, 224)
    """Height and width of the centre crop; None does not crop."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of red, green and blue in [0, 1]."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of red, green and blue in [0, 1]."""

    def __post_init__(self):
        sizes = (*(self.resize if isinstance(self.resize, tuple) else (self.resize,)), *(self.crop or ()))
        if any(size is not None and size < 1 for size in sizes):
            raise UserError(f"resize={self.resize}, crop={self.crop} is invalid: use sizes of at least 1")
        if min(self.std) <= 0:
            raise UserError(f"std={self.std} is invalid: use values above 0")

    def compute_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that frames of a size are resized to."""
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        long = int(self.resize * max(height, width) / min(height, width))
        return (long, self.resize) if width <= height else (self.resize, long)


def preprocess_frames(
    frames: UInt8[np.ndarray, "T H W 3"], processor: ClipImageProcessor
) -> Float32[np.ndarray, "T h w 3"]:
    """Return `(cropped / 255 - mean) / std` of the resized frames.

    Raises:
      UserError: frames that are smaller than the crop.
    """
    resized = resize_bicubic(frames, *processor.compute_size(*frames.shape[1:3]))
    if processor.crop is not None:
        resized = _crop_centre(resized, *processor.crop)
    mean, std = np.asarray(processor.mean, np.float32), np.asarray(processor.std, np.float32)
    return (resized.astype(np.float32) / np.float32(255) - mean) / std


def resize_bicubic(frames: UInt8[np.ndarray, "T H W 3"], height: int, width: int) -> UInt8[np.ndarray, "T h w 3"]:
    """Resize frames by Pillow's antialiased bicubic filter, as in CLIP's training and `transformers`."""
    resized = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames]
    return np.stack([np.asarray(picture) for picture in resized])


def _crop_centre(frames: UInt8[np.ndarray, "T H W 3"], height: int, width: int) -> UInt8[np.ndarray, "T h w 3"]:
    frame_height, frame_width = frames.shape[1:3]
    if frame_height < height or frame_width < width:
        raise UserError(
            f"crop={height}x{width} is invalid for frames that are resized to {frame_height}x{frame_width}: use a "
            "larger resize or a smaller crop"
        )
    top, left = (frame_height - height) // 2, (frame_width - width) // 2
    return frames[:, top : top + height, left : left + width]
