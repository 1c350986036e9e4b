"""Pictures of requests: images and clips that a sampled clip keeps or follows, fitted to its size."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8

from dit_video.core.errors import UserError
from dit_video.core.resize import resize
from dit_video.tokens import Grid
from dit_video.video import Clip

Image = Clip | UInt8[np.ndarray, "H W 3"]
"""A clip of one frame, or its pixels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Condition:
    """An image or a clip that a sampled clip has from a frame on; named as `LTXVideoCondition` in diffusers.

    Raises:
      UserError: a strength that is not above 0 and at most 1.
    """

    content: Clip | Image
    """Image, as a clip of one frame or as pixels `[H W 3]`, or a clip; it is fitted to the height and width."""
    frame: int = 0
    """Number of the sampled clip's frame that is the first of the content; negative numbers count from the end."""
    mask: Bool[np.ndarray, "T H W"] | Bool[np.ndarray, " T"] | None = None
    """Pixels, or frames, of the content that are kept (True); None for all."""
    strength: float = 1.0
    """Degree to which the content is kept: 1 keeps it, smaller values let the model change it."""

    def __post_init__(self):
        if not 0 < self.strength <= 1:
            raise UserError(f"strength={self.strength} is invalid: it must be above 0 and at most 1")


def fit_image(image: Clip | np.ndarray, size: Grid) -> UInt8[np.ndarray, "h w 3"]:
    """Return an image at the height and width of a clip, without distortion; see `fit_frames`.

    Raises:
      UserError: a clip of several frames, or pixels that are not uint8 `[H W 3]`.
    """
    if isinstance(image, Clip):
        if len(image.frames) != 1:
            raise UserError(f"a clip of {len(image.frames)} frames is no image; use Clip(clip.frames[:1], clip.fps)")
        return fit_frames(image.frames, size)[0]
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or 0 in pixels.shape or pixels.dtype != np.uint8:
        raise UserError(
            f"an image of {pixels.dtype} {list(pixels.shape)} is invalid: it must be a clip of one frame, or uint8 "
            "pixels [H W 3]. Use dit_video.core.pixels.to_uint8"
        )
    return fit_frames(pixels[None], size)[0]


def fit_frames(frames: UInt8[np.ndarray, "T H W 3"], size: Grid) -> UInt8[np.ndarray, "T h w 3"]:
    """Resize frames to cover a clip's height and width, and crop what exceeds them on both sides alike.

    The aspect ratio is kept to within one pixel: diffusers' pipelines crop the last image of Wan's clips so.
    """
    height, width = frames.shape[1:3]
    scale = max(size.h / height, size.w / width)
    covering = max(size.h, round(height * scale)), max(size.w, round(width * scale))
    top, left = (covering[0] - size.h) // 2, (covering[1] - size.w) // 2
    return resize(frames, *covering)[:, top : top + size.h, left : left + size.w]


def compute_fitted_size(height: int, width: int, *, area: int, multiple: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width with a picture's aspect ratio and about this area, rounded down to multiples.

    This is the size that diffusers' examples of Wan's image-to-video sample an image at.
    """
    sides = math.sqrt(area * height / width), math.sqrt(area * width / height)
    height, width = (max(step, round(side) // step * step) for side, step in zip(sides, multiple, strict=True))
    return height, width
