"""Denoisers of other projects, in and out: `config.json` and `diffusion_pytorch_model.safetensors`, or its parts.

Image transformers of classes may also be one file, named as their authors name it.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from dit_video.backbones.dit import DitConfig
from dit_video.backbones.wan import WanDitConfig
from dit_video.core.errors import UserError
from dit_video.families.dit import transformer as dit_transformer
from dit_video.families.wan import transformer as wan_transformer
from dit_video.families.wan.transformer import Layout
from dit_video.weights import diffusers, native_format
from dit_video.weights.parameter import Place, on_host
from dit_video.weights.tensor_mapping import SHARD_BYTES, stored_as

_IMAGES = (dit_transformer.CLASS, dit_transformer.OLDER_CLASS, *dit_transformer.AUTHORS_CLASSES)
KINDS = (*wan_transformer.CLASSES, *_IMAGES)
"""the classes of other projects that are known"""
KNOWN = (*KINDS, native_format.CLASS)


def load_denoiser(
    folder: str | os.PathLike,
    *,
    dtype: Any = np.float32,
    kernels: Any = None,
    place: Place = on_host,
) -> tuple[DitConfig | WanDitConfig, dict[str, Any]]:
    """The config and parameters of a transformer, of diffusers, in its authors' layout or in our own.

    Args:
      folder: such as `transformer` of a pipeline of diffusers; or a file of the authors of DiT and SiT, such as
        `DiT-XL-2-256x256.safetensors`.
      dtype: floating tensors are cast to it; None keeps the file's.
      kernels: what those of linear maps are cast to, if to something else.
      place: reads each parameter to where it is kept, by its path; by default to the host.

    Raises:
      MissingError: no such folder, or files that it lacks.
      UserError: a model class that isn't known here, a setting of it that isn't, or weights that do not fit.
    """
    folder = Path(folder)
    if folder.is_file():
        return dit_transformer.load_file(folder, dtype=dtype, kernels=kernels, place=place)
    document = _document(folder)
    kind = document["_class_name"]
    if kind in wan_transformer.CLASSES:
        return wan_transformer.load(folder, document, dtype=dtype, kernels=kernels, place=place)
    if kind != native_format.CLASS:
        return dit_transformer.load(folder, document, dtype=dtype, kernels=kernels, place=place)

    config = _own(folder, document)
    return config, native_format.read_part(folder, document, stored=stored_as(dtype, kernels), place=place)[1]


def denoiser_config(folder: str | os.PathLike) -> DitConfig | WanDitConfig:
    """The config of a transformer, without its weights; errors are those of `load_denoiser`.

    Args:
      folder: of the model; what is one file alone has its config in its tensors' shapes too.
    """
    folder = Path(folder)
    document = _document(folder)
    if document["_class_name"] == native_format.CLASS:
        return _own(folder, document)
    if document["_class_name"] in wan_transformer.CLASSES:
        return wan_transformer.read_config(folder, document)
    return dit_transformer.config_of(folder, document)


def _document(folder: Path) -> dict[str, Any]:
    """`config.json` of a model that is known here."""
    document = diffusers.document_of(folder)
    kind = document.get("_class_name")
    if kind not in KNOWN:
        raise UserError(f"{folder} holds a model of class {kind}; known here: {', '.join(KNOWN)}")
    return document


def _own(folder: Path, document: dict[str, Any]) -> DitConfig | WanDitConfig:
    """The config of a model in our own layout, if it is a denoiser's."""
    config = native_format.part_config(folder, document)
    if not isinstance(config, DitConfig | WanDitConfig):
        raise UserError(f"{folder} holds a {type(config).__name__}, which is no denoiser's")
    return config


def save_denoiser(
    folder: str | os.PathLike,
    config: DitConfig | WanDitConfig,
    params: dict[str, Any],
    *,
    layout: Layout = "diffusers",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a transformer as diffusers reads it, or its authors do; the inverse of `load_denoiser`.

    A `WanDitConfig` is written as a Wan; a `DitConfig` as a SiT, if its time is reversed, or as a DiT. What would be a
    larger file than `shard_bytes` is split.

    Raises:
      UserError: a config that diffusers has no class for, or that the layout can't express.
    """
    if isinstance(config, WanDitConfig):
        wan_transformer.save(folder, config, params, layout=layout, shard_bytes=shard_bytes)
    else:
        dit_transformer.save(folder, config, params, layout=layout, shard_bytes=shard_bytes)
