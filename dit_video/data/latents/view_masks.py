"""Masks of known pixels of views, of which latents with all else grey are cached."""

import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32

from dit_video.core.rng import make_generator
from dit_video.data.latents.views import View
from dit_video.models.autoencoders import ClipCanvas
from dit_video.models.conditioning import KnownMask, MaskGenerator, fold_mask, make_mask_fields
from dit_video.tokens import Grid


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
