"""Denoisers of diffusers, of their authors or in the native format: `config.json` and weights in safetensors.

Class-conditional image transformers may also be a single file with the name that their authors gave it.
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
from dit_video.families.wan.transformer import WanLayout
from dit_video.weights import diffusers, native_format
from dit_video.weights.parameter import Placement, place_on_host
from dit_video.weights.tensor_map import SHARD_BYTES, make_dtype_fn

_DIT_CLASSES = (dit_transformer.CLASS, dit_transformer.LEGACY_CLASS, *dit_transformer.AUTHORS_CLASSES)
EXTERNAL_CLASSES = (*wan_transformer.CLASSES, *_DIT_CLASSES)
"""Supported model classes of other projects."""
SUPPORTED_CLASSES = (*EXTERNAL_CLASSES, native_format.CLASS)


def load_denoiser(
    folder: str | os.PathLike,
    *,
    dtype: Any = np.float32,
    kernel_dtype: Any = None,
    place: Placement = place_on_host,
) -> tuple[DitConfig | WanDitConfig, dict[str, Any]]:
    """Read the config and parameters of a transformer of diffusers, in its authors' layout or in the native format.

    Args:
      folder: folder such as a pipeline's `transformer`, or a file of the authors of DiT and SiT such as
        `DiT-XL-2-256x256.safetensors`.
      dtype: dtype that floating tensors are cast to; None keeps the file's.
      kernel_dtype: dtype that the kernels of linear maps are cast to; None casts them to `dtype`, too.
      place: reads each parameter to its destination, given its path; by default to the host.

    Raises:
      MissingError: the folder or one of its files does not exist.
      UserError: the model class or one of its settings is not supported, or the weights do not fit.
    """
    folder, dtype_fn = Path(folder), make_dtype_fn(dtype, kernel_dtype)
    if folder.is_file():
        return dit_transformer.load_file(folder, dtype_fn=dtype_fn, place=place)
    document = _read_document(folder)
    if document["_class_name"] == native_format.CLASS:
        config = _read_native_config(folder, document)
        return config, native_format.read_native(folder, document, dtype_fn=dtype_fn, place=place)[1]
    transformer = wan_transformer if document["_class_name"] in wan_transformer.CLASSES else dit_transformer
    return transformer.load(folder, document, dtype_fn=dtype_fn, place=place)


def read_denoiser_config(folder: str | os.PathLike) -> DitConfig | WanDitConfig:
    """Read the config of a transformer in a folder, without its weights; raises as `load_denoiser` does."""
    folder = Path(folder)
    document = _read_document(folder)
    if document["_class_name"] == native_format.CLASS:
        return _read_native_config(folder, document)
    if document["_class_name"] in wan_transformer.CLASSES:
        return wan_transformer.read_config(folder, document)
    return dit_transformer.parse_config(folder, document)


def _read_document(folder: Path) -> dict[str, Any]:
    """Read `config.json`; raise UserError if the model class is not supported."""
    document = diffusers.read_document(folder)
    kind = document.get("_class_name")
    if kind not in SUPPORTED_CLASSES:
        raise UserError(f"{folder} has a model of class {kind}. Supported classes are {', '.join(SUPPORTED_CLASSES)}")
    return document


def _read_native_config(folder: Path, document: dict[str, Any]) -> DitConfig | WanDitConfig:
    """Return a native config; raise UserError if it is not a denoiser's."""
    config = native_format.read_native_config(folder, document)
    if not isinstance(config, DitConfig | WanDitConfig):
        raise UserError(f"{folder} has a {type(config).__name__}, which is not a denoiser's config")
    return config


def save_denoiser(
    folder: str | os.PathLike,
    config: DitConfig | WanDitConfig,
    params: dict[str, Any],
    *,
    layout: WanLayout = "diffusers",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a transformer as diffusers or its authors read it; the inverse of `load_denoiser`.

    A `WanDitConfig` is written as a Wan, a `DitConfig` as a SiT if its time is reversed, else as a DiT. Files that
    would be larger than `shard_bytes` are split.

    Raises:
      UserError: diffusers has no class for the config, or the layout can't express it.
    """
    transformer = wan_transformer if isinstance(config, WanDitConfig) else dit_transformer
    transformer.save(folder, config, params, layout=layout, shard_bytes=shard_bytes)
