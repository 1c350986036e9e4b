"""Views of clips that are encoded: crops in time, resolutions, and mirrored copies."""

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from dit_video.core.errors import check_at_least
from dit_video.core.rng import make_generator
from dit_video.data.clips import ClipInfo
from dit_video.data.sizes import SizeLimits, count_sampled_frames, fit_size
from dit_video.models.autoencoders import ClipCanvas
from dit_video.models.conditioning import KnownMask, MaskGenerator, fold_mask, make_mask_fields
from dit_video.tokens import Grid


@dataclass(frozen=True, kw_only=True)
class Augmentations:
    """Selection of the views of every clip.

    Raises:
      UserError: no crop, or a resolution without pixels.
    """

    clips_per_video: int = 1
    """Largest number of temporal crops of the training length, spread over the clip."""
    resolutions: tuple[int, ...] = ()
    """Further, smaller limits on the pixels of a frame, at each of which every clip is encoded too."""
    flips: bool = False
    """True to encode each view mirrored too. Captions that say left or right are then wrong."""

    def __post_init__(self):
        check_at_least(1, clips_per_video=self.clips_per_video, resolutions=min(self.resolutions, default=None))

    def list_limits(self, limits: SizeLimits) -> tuple[SizeLimits, ...]:
        """Return the limits of every resolution, beginning with the largest: a clip has a view at each of them."""
        smaller = (min(resolution, limits.max_pixels) for resolution in self.resolutions)
        return (limits, *(replace(limits, max_pixels=max_pixels) for max_pixels in smaller))


class View(NamedTuple):
    """One of the ways in which a clip is encoded."""

    name: str
    clip: int
    start: int
    """First of the sampled frames that the view shows."""
    limits: SizeLimits
    size: Grid
    flipped: bool


def list_views(infos: Sequence[ClipInfo], limits: SizeLimits, augmentations: Augmentations) -> list[View]:
    """Return the views of every clip, without a smaller resolution that equals the clip's own.

    A view is named `clip.mp4@0`, by its first frame, followed by `~64x96` in a smaller resolution and by `~flipped`.

    Raises:
      UserError: a clip without a size within the limits.
    """
    clip_views = []
    for number, info in enumerate(infos):
        sizes: dict[Grid, SizeLimits] = {}
        for size_limits in augmentations.list_limits(limits):
            sizes.setdefault(fit_size(info, size_limits), size_limits)
        for (size, size_limits), start, flipped in itertools.product(
            sizes.items(),
            _get_crop_starts(info, limits, augmentations.clips_per_video),
            (False, True)[: 1 + augmentations.flips],
        ):
            smaller_name = f"~{size.h}x{size.w}" if size_limits is not limits else ""
            name = f"{info.name}@{start}{smaller_name}" + "~flipped" * flipped
            clip_views.append(View(name, number, start, size_limits, size, flipped))
    return clip_views


def _get_crop_starts(info: ClipInfo, limits: SizeLimits, max_crops: int) -> list[int]:
    spare = count_sampled_frames(info, limits) - fit_size(info, limits).t
    count = min(max_crops, spare + 1)
    return sorted({round(spare * index / max(1, count - 1)) for index in range(count)})


def draw_view_masks(
    masks: Sequence[MaskGenerator], canvases: Sequence[ClipCanvas], views: Sequence[View]
) -> list[dict[int, KnownMask]]:
    """Return a mask of each kind for every view of some canvases, a function of the view's name.

    Nothing is known in a view whose size has no mask of a kind.
    """
    drawn: list[dict[int, KnownMask]] = []
    for kind, mask in enumerate(masks):
        drawn.append({})
        for slot in (slot for canvas in canvases for slot in canvas.slots):
            view = views[slot.clip]
            known = mask.draw(make_generator(kind, "mask of a view", zlib.crc32(view.name.encode())), view.size)
            drawn[-1][slot.clip] = np.zeros(view.size, bool) if known is None else known
    return drawn


def place_masks(
    shape: tuple[int, ...], canvases: Sequence[ClipCanvas], masks: dict[int, KnownMask]
) -> Bool[np.ndarray, "B T H W"]:
    """Return the masks of views at their places on canvases, in an array of a batch's shape."""
    placed = np.zeros(shape, bool)
    for row, canvas in enumerate(canvases):
        for clip, top, left in canvas.slots:
            t, h, w = masks[clip].shape
            placed[row, :t, top : top + h, left : left + w] = masks[clip]
    return placed


def make_mask_values(
    latents: Sequence[Float32[np.ndarray, "t h w c"]], masks: Sequence[KnownMask], stride: Grid
) -> dict[str, np.ndarray]:
    """Return the fields of a view: for each kind of mask its latents, zero if nothing is known, and its shares."""
    values = dict[str, np.ndarray]()
    for kind, (kind_latents, mask) in enumerate(zip(latents, masks, strict=True)):
        pair = make_mask_fields(channels=kind_latents.shape[-1], temporal_stride=stride.t, kind=kind)
        arrays = kind_latents if mask.any() else np.zeros_like(kind_latents), fold_mask(mask, stride)
        values |= {field.name: array for field, array in zip(pair, arrays, strict=True)}
    return values
