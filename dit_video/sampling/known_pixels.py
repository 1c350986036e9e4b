"""Known pixels of a requested clip: those of images, clips and masks, at the size of the clip."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from scipy.ndimage import distance_transform_edt, uniform_filter

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

    def restore(self, frames: UInt8[np.ndarray, "T H W 3"]) -> UInt8[np.ndarray, "T H W 3"]:
        """Return a decoded clip with the pixels that are kept to the end as they were given.

        The autoencoder's error, which ends where pixels are known, would show as a jump of sharpness. So it goes on in
        time, for the nearest known frames before and after: as far as what is decoded stays the same, and halved with
        each frame where it changes. At the border of a region within a frame, known pixels become decoded ones over
        some pixels.
        """
        is_exact = self.strength == 1
        if not is_exact.any():
            return frames
        decoded = frames.astype(np.float32)
        error = np.where(is_exact[..., None], self.frames - decoded, np.float32(0))
        inner = np.stack([_measure_depth(mask) for mask in is_exact])
        share = np.clip(inner / (_FEATHER + 1), 0, 1)[..., None]
        restored = decoded + np.where(is_exact[..., None], share * error, _carry_error(error, decoded, is_exact))
        return np.clip(np.rint(restored), 0, 255).astype(np.uint8)

    def select(self, part: IsKnown) -> "KnownPixels":
        """Return the known pixels of a part."""
        return self._replace(strength=np.where(part, self.strength, np.float32(0)))


_FEATHER = 4
"""Number of known pixels at the border of a region that are mixed with decoded ones."""
_SAME_LEVELS = 6.0
"""Change of decoded pixels, of 255 levels, from which they no longer count as the same."""
_FADE = 0.5
"""Factor of the error from frame to frame where the decoded pixels change."""


def _measure_depth(mask: Bool[np.ndarray, "H W"]) -> Float32[np.ndarray, "H W"]:
    """Return the distance of a frame's known pixels to the nearest unknown one; far from any in a known frame."""
    if mask.all():
        return np.full(mask.shape, np.inf, np.float32)
    return np.asarray(distance_transform_edt(mask), np.float32)


def _carry_error(
    error: Float32[np.ndarray, "T H W 3"], decoded: Float32[np.ndarray, "T H W 3"], is_exact: IsKnown
) -> Float32[np.ndarray, "T H W 3"]:
    """Return the errors of known pixels, carried to the other frames of the same place."""
    total, weights = np.zeros_like(error), np.zeros(error.shape[:3], np.float32)
    largest = np.zeros_like(weights)
    for order in (range(len(error)), range(len(error) - 1, -1, -1)):
        known_error = known_decoded = np.zeros_like(error[0])
        distance = np.full(error.shape[1:3], np.inf, np.float32)
        for frame in order:
            is_here = is_exact[frame, ..., None]
            distance = np.where(is_exact[frame], 0, distance + 1)
            known_error = np.where(is_here, error[frame], known_error)
            known_decoded = np.where(is_here, decoded[frame], known_decoded)
            change = uniform_filter(np.abs(decoded[frame] - known_decoded).max(axis=-1), 3)
            weight = np.maximum(np.exp(-((change / _SAME_LEVELS) ** 2)), _FADE**distance)
            weight = np.where(np.isfinite(distance), weight, 0)
            nearness = weight / np.maximum(distance, 1)  # the nearer of two known frames counts more
            total[frame] += nearness[..., None] * known_error
            weights[frame] += nearness
            largest[frame] = np.maximum(largest[frame], weight)
    return largest[..., None] * total / np.maximum(weights, np.float32(1e-6))[..., None]


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

    Frames after the clip's last are left out, as those of `fit_clip` are.

    Raises:
      UserError: If the first frame is outside of the clip.
    """
    start = condition.frame + size.t if condition.frame < 0 else condition.frame
    if not 0 <= start < size.t:
        fix = f"Use 0 to {size.t - 1}, or negative numbers, which count from the end"
        raise UserError(f"frame={condition.frame} of a condition is invalid for a clip of {size.t}. {fix}.")
    return start, fit_frames(condition.content.frames[: size.t - start], size)


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
