"""Folders of open weights in recipes: their parts, the limits of clips, and the rows that hold these."""

import os
from pathlib import Path
from typing import Any

from dit_video.core.errors import MissingError
from dit_video.experiment import DataConfig
from dit_video.families import PipelineParts, find_family
from dit_video.families.family import INDEX
from dit_video.models.autoencoders import latent_grid
from dit_video.tokens import Grid, PackedShape

_MAX_CLIPS_PER_ROW = 4
"""Largest number of clips of a row, when they are smaller than the largest."""


def read_open_parts(folder: str | os.PathLike) -> PipelineParts:
    """Read the configs of a folder in diffusers' layout, and check its weights by the headers of their files.

    Raises:
      MissingError: the folder does not exist, or lacks parts or files.
      UserError: a pipeline or a model that cannot be trained here, unsupported settings, or weights that do not fit.
    """
    folder = Path(folder)
    if (family := find_family(folder)) is None:
        raise MissingError(f"no such file: {folder / INDEX}")
    parts = family.read_parts(folder)
    family.check_weights(folder, parts)
    return parts


def make_data_config(
    parts: PipelineParts, *, max_pixels: int | None, max_frames: int | None, fps: float | None, **fields: Any
) -> DataConfig:
    """Return the config of clips of at most these sizes, which are the family's own where they are None."""
    size = parts.size
    return DataConfig(
        max_pixels=size.h * size.w if max_pixels is None else max_pixels,
        max_frames=size.t if max_frames is None else max_frames,
        fps=parts.fps if fps is None else fps,
        **fields,
    )


def make_row_shape(data: DataConfig, parts: PipelineParts) -> PackedShape:
    """Return the shape of rows that hold one clip of the largest size, or several smaller ones."""
    stride, patch = parts.autoencoder.stride, parts.denoiser.patch
    side = Grid(1, stride.h * patch.h, stride.w * patch.w)
    tokens = latent_grid(side._replace(t=data.max_frames), stride).t * (data.max_pixels // side.volume)
    return PackedShape(tokens=tokens, text=2 * parts.text.max_tokens, segments=_MAX_CLIPS_PER_ROW)
