"""Denoisers of other projects, in and out: `config.json` and `diffusion_pytorch_model.safetensors`, or its parts."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dit_video.dit import DitConfig, WanDitConfig
from dit_video.errors import UserError
from dit_video.weights import diffusers, wan_transformer
from dit_video.weights.exchange import SHARD_BYTES
from dit_video.weights.wan_transformer import Layout

_KINDS = {wan_transformer.CLASS: wan_transformer.load, wan_transformer.AUTHORS_CLASS: wan_transformer.load}


def load_denoiser(
    folder: str | os.PathLike,
    *,
    dtype: Any = np.float32,
    kernels: Any = None,
    place: Callable[[str, np.ndarray], Any] = lambda path, array: array,
) -> tuple[WanDitConfig, dict[str, Any]]:
    """The config and parameters of a transformer, of diffusers or in its authors' layout.

    Args:
      folder: such as `transformer` of a pipeline of diffusers.
      dtype: floating tensors are cast to it; None keeps the file's.
      kernels: what those of linear maps are cast to, if to something else.
      place: what becomes of a parameter as soon as it is read, by its path.

    Raises:
      MissingError: no such folder, or files that it lacks.
      UserError: a model class that isn't known here, a setting of it that isn't, or weights that do not fit.
    """
    folder = Path(folder)
    document = _document(folder)
    return _KINDS[document["_class_name"]](folder, document, dtype=dtype, kernels=kernels, place=place)


def denoiser_config(folder: str | os.PathLike) -> WanDitConfig:
    """The config of a transformer, without its weights; arguments and errors are those of `load_denoiser`."""
    folder = Path(folder)
    return wan_transformer.read_config(folder, _document(folder))


def _document(folder: Path) -> dict[str, Any]:
    """`config.json` of a model that is known here."""
    document = diffusers.document_of(folder)
    kind = document.get("_class_name")
    if kind not in _KINDS:
        raise UserError(f"{folder} holds a model of class {kind}; known here: {', '.join(_KINDS)}")
    return document


def save_denoiser(
    folder: str | os.PathLike,
    config: DitConfig | WanDitConfig,
    params: dict[str, Any],
    *,
    layout: Layout = "diffusers",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a transformer as diffusers reads it, or its authors do; the inverse of `load_denoiser`.

    A file that would be larger than `shard_bytes` is split.

    Raises:
      UserError: a config that diffusers has no class for, or that the layout can't express.
    """
    if not isinstance(config, WanDitConfig):
        raise UserError(f"diffusers has no class for {type(config).__name__}; it can write {', '.join(_KINDS)}")
    wan_transformer.save(folder, config, params, layout=layout, shard_bytes=shard_bytes)
