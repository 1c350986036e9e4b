"""Known pixels of a requested clip: those of images, clips and masks, at the size of the clip."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from scipy.ndimage import distance_transform_edt

from dit_video.core.errors import UserError
from dit_video.models.conditioning import GREY, IsKnown, blank_unknown
from dit_video.sampling.pictures import Mask
from dit_video.sampling.request import Condition, Request, fit_frames
from dit_video.tokens import Grid
from dit_video.video import Clip


class KnownPixels(NamedTuple):
    """Pixels of a clip that are kept, and how strongly."""

    frames: UInt8[np.ndarray, "T H W 3"]
    """Frames, of any content where they are unknown."""
    strength: Float32[np.ndarray, "T H W"]
    """Strength of every pixel: 0 where it is unknown, 1 where it is kept to the end."""

    @property
    def is_known(self) -> IsKnown:
        """Return True for known pixels."""
        return self.strength > 0

    def blank(self) -> Float32[np.ndarray, "T H W 3"]:
        """Return the frames in 0..255, with unknown pixels grey."""
        return blank_unknown(self.frames, self.is_known)

    def spread(self) -> Float32[np.ndarray, "T H W 3"]:
        """Return the frames in 0..255, with every unknown pixel as the nearest known one in space and time.

        Latents of known pixels, which also depend on those around them, are then closer to those of a natural clip than
        with grey, which a model only reads if it is trained with it.
        """
        is_known = self.is_known
        if is_known.all():
            return self.frames.astype(np.float32)
        nearest = distance_transform_edt(~is_known, return_distances=False, return_indices=True)
        assert nearest is not None
        return self.frames[tuple(nearest)].astype(np.float32)

    def select(self, part: IsKnown) -> "KnownPixels":
        """Return the known pixels of a part."""
        return self._replace(strength=np.where(part, self.strength, np.float32(0)))


def collect_known_pixels(request: Request) -> KnownPixels | None:
    """Return the known pixels of a request's `image`, `last_image`, `video` with `generated`, and `conditions`, if any.

    Raises:
      UserError: If pictures do not fit the request or each other, or pixels are known twice.
    """
    size = request.grid
    known = KnownPixels(np.full((*size, 3), round(GREY), np.uint8), np.zeros(size, np.float32))
    if request.generated is not None and request.video is None:
        raise UserError("video=None is invalid with generated, a mask of its pixels. Give video=, or image=")
    if request.video is not None and request.generated is not None:
        frames = fit_clip("video", request.video, size)
        _place(known, "video", 0, frames, ~fit_mask(request.generated, request.video, size))
    for name, image, frame in (("image", request.image, 0), ("last_image", request.last_image, size.t - 1)):
        if image is not None:
            _place(known, name, frame, fit_frames(image.frames, size), np.ones((1, *size[1:]), bool))
    for condition in request.conditions:
        start, frames = locate_condition(condition, size)
        is_kept = np.ones(frames.shape[:3], bool)
        if condition.generated is not None:
            is_kept = ~fit_mask(condition.generated, condition.content, Grid(len(frames), *size[1:]))
        _place(known, f"frame={condition.frame} of a condition", start, frames, is_kept, condition.strength)
    return known if known.strength.any() else None


def locate_condition(condition: Condition, size: Grid) -> tuple[int, UInt8[np.ndarray, "T h w 3"]]:
    """Return the number of a condition's first frame in a clip, and its frames at the clip's height and width.

    Raises:
      UserError: If frames are outside of the clip.
    """
    frames, start = fit_frames(condition.content.frames, size), condition.frame
    start = start + size.t if start < 0 else start
    if start < 0 or start + len(frames) > size.t:
        rule = f"frames {start} to {start + len(frames) - 1} are not all in a clip of {size.t}"
        fix = "Use another frame, or fewer frames"
        raise UserError(f"frame={condition.frame} of a condition is invalid: {rule}. {fix}.")
    return start, frames


def fit_clip(name: str, clip: Clip, size: Grid) -> UInt8[np.ndarray, "T h w 3"]:
    """Return the first frames of a clip for a requested clip, at its height and width.

    A clip of a camera rarely has a length that a model samples, and diffusers leaves out its last frames, too.

    Raises:
      UserError: If the clip is shorter than the requested one.
    """
    if len(clip.frames) < size.t:
        raise UserError(
            f"{name} of {len(clip.frames)} frames is invalid for a clip of {size.t}: it must be at least as long. Use "
            "a smaller size or a longer clip"
        )
    return fit_frames(clip.frames[: size.t], size)


def fit_mask(mask: Mask, video: Clip, size: Grid) -> Bool[np.ndarray, "t h w"]:
    """Return a video's mask, True where pixels are generated, at the size of the clip, fitted as the video is.

    Raises:
      UserError: If the mask has another shape.
    """
    frames = video.frames.shape[:3]
    if mask.shape not in (frames, frames[1:], frames[:1]):
        shapes = f"{list(frames)}, {list(frames[1:])} for all of its frames, or [{frames[0]}] for whole frames"
        rule = f"it must have the shape of the video, {shapes}"
        raise UserError(
            f"generated of shape {list(mask.shape)} is invalid: {rule}. Use True where pixels are generated"
        )
    if mask.ndim == 1:
        return np.broadcast_to(mask[: size.t, None, None], size).copy()
    pixels = np.broadcast_to(np.where(mask, 255, 0).astype(np.uint8)[..., None], (*frames, 3))
    return fit_frames(pixels[: size.t], size)[..., 0] > GREY


def _place(
    known: KnownPixels, name: str, start: int, frames: np.ndarray, is_kept: np.ndarray, strength: float = 1.0
) -> None:
    """Put known pixels in place.

    Raises:
      UserError: If some of the pixels are known already.
    """
    part = slice(start, start + len(frames))
    if (known.strength[part][is_kept] > 0).any():
        raise UserError(f"{name} is invalid: some of its pixels are also kept of another picture. Use one of them")
    known.frames[part][is_kept] = frames[is_kept]
    known.strength[part][is_kept] = strength
