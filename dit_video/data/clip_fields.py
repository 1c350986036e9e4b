"""Values of conditioning by fields, computed from clips as they are encoded: for a cache, or as they are read."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.core.grid import Grid
from dit_video.data.clips import ClipSource
from dit_video.data.sizes import SizeLimits, get_sampled_fps
from dit_video.models.autoencoders import latent_grid
from dit_video.models.conditioning import ClipConditioning, ClipView, FrameCrop


def compute_clip_fields(
    conditioning: Sequence[ClipConditioning],
    clips: ClipSource,
    index: int,
    limits: SizeLimits,
    *,
    frames: UInt8[np.ndarray, "T H W 3"],
    stride: Grid,
    start: int,
    crop: FrameCrop | None = None,
    is_flipped: bool = False,
    encoded: Mapping[int, Float32[np.ndarray, "t h w c"]],
) -> dict[str, np.ndarray]:
    """Return the values of a clip by the name of their field.

    Args:
      conditioning: The conditioning.
      clips: The clips, with the columns that the conditioning names.
      index: Number of the clip.
      limits: Limits by which it was sampled.
      frames: Its frames as they are encoded.
      stride: Stride of the autoencoder.
      start: Number of the clip's frames, at the training rate, that precede the first one of `frames`.
      crop: Part of the resized frames that they are; None for whole frames.
      is_flipped: Whether they are mirrored.
      encoded: Latents of the frames for each of `encoded_prefixes`.
    """
    if not conditioning:
        return {}
    info = clips.infos[index]
    fps = get_sampled_fps(info, limits)
    view = ClipView(
        name=info.name,
        frames=frames,
        fps=fps,
        frame_stride=info.fps / fps,
        latents=latent_grid(Grid(*frames.shape[:3]), stride),
        stride=stride,
        start=start,
        crop=crop,
        is_flipped=is_flipped,
        encoded=encoded,
    )
    return {
        each.field.name: each.from_clip(view._replace(columns=clips.read_columns(index, each.columns)))
        for each in conditioning
    }
