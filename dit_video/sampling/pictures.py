"""Pictures of requests: images and clips that a sampled clip keeps or follows, fitted to its size."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8

from dit_video.core.errors import UserError
from dit_video.core.resize import resize_and_crop
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
    """Return frames at a clip's height and width; see `resize_and_crop`."""
    return resize_and_crop(frames, size.h, size.w)
