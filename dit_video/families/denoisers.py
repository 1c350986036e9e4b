"""Denoisers of all families, or in the native format: `config.json` and weights in safetensors.

A family's denoiser may also be a single file, with the name that its authors gave it.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from dit_video.backbones.protocol import BackboneConfig
from dit_video.core.errors import UserError
from dit_video.families.family import DenoiserFormat, FileLayout
from dit_video.families.registry import list_families
from dit_video.weights import diffusers, native_format
from dit_video.weights.folders import TensorFolder
from dit_video.weights.lora import LoraModule
from dit_video.weights.parameter import Placement, place_on_host
from dit_video.weights.tensor_map import SHARD_BYTES, make_dtype_fn


def list_denoiser_classes() -> tuple[str, ...]:
    """Return the model classes of other projects whose files can be read."""
    return tuple(name for family in list_families() for name in family.denoiser.layouts)


def find_format(config: BackboneConfig) -> DenoiserFormat | None:
    """Return the file format for models of a config; None if no family has any."""
    formats = (family.denoiser for family in list_families())
    return next((each for each in formats if isinstance(config, each.config_class)), None)


def get_lora_modules(config: BackboneConfig, *, primary_layout: FileLayout = "diffusers") -> dict[str, LoraModule]:
    """Return the linear maps that LoRA files of the config's family may adapt, by their names there."""
    denoiser_format = find_format(config)
    return {} if denoiser_format is None else denoiser_format.get_lora_modules(config, primary_layout=primary_layout)


def load_denoiser(
    folder: str | os.PathLike,
    *,
    dtype: Any = np.float32,
    kernel_dtype: Any = None,
    place: Placement = place_on_host,
) -> tuple[BackboneConfig, dict[str, Any]]:
    """Read the config and parameters of a denoiser of diffusers, in its authors' layout or in the native format.

    Args:
      folder: folder such as a pipeline's `transformer`, or a file of a model's authors such as
        `DiT-XL-2-256x256.safetensors`.
      dtype: dtype that floating tensors are cast to; None keeps the file's.
      kernel_dtype: dtype that the kernels of linear maps are cast to; None casts them to `dtype`, too.
      place: reads each parameter to its destination, given its path; by default to the host.

    Raises:
      MissingError: the folder or one of its files does not exist.
      UserError: the model class or one of its settings is not supported, or the weights do not fit.
    """
    folder = Path(folder)
    dtype_fn = make_dtype_fn(dtype, kernel_dtype)
    if folder.is_file():
        denoiser_format, tensors, document = open_denoiser_file(folder)
        with tensors:
            return denoiser_format.read(tensors, folder, document, dtype_fn, place)
    document = _read_document(folder)
    if document["_class_name"] == native_format.CLASS:
        config = native_format.read_native_config(folder, document, BackboneConfig, "a denoiser")
        return config, native_format.read_native(folder, config, dtype_fn=dtype_fn, place=place)
    return get_format(document).load(folder, dtype=dtype, kernel_dtype=kernel_dtype, place=place)


def read_denoiser_config(folder: str | os.PathLike) -> BackboneConfig:
    """Read the config of a denoiser in a folder, without its weights; raises as `load_denoiser` does."""
    folder = Path(folder)
    document = _read_document(folder)
    if document["_class_name"] == native_format.CLASS:
        return native_format.read_native_config(folder, document, BackboneConfig, "a denoiser")
    return get_format(document).read_config(folder, document)


def get_format(document: dict[str, Any]) -> DenoiserFormat:
    """Return the format of the files with this `config.json`, whose class is one of `list_denoiser_classes`."""
    return next(family.denoiser for family in list_families() if document["_class_name"] in family.denoiser.layouts)


def open_denoiser_file(path: Path) -> tuple[DenoiserFormat, TensorFolder, dict[str, Any]]:
    """Open a denoiser in a single file; return its format, its tensors and what its `config.json` would say.

    Raises:
      MissingError: the file does not exist.
      UserError: the file is of no family.
    """
    for family in list_families():
        if (opened := family.denoiser.open_file(path)) is not None:
            return family.denoiser, *opened
    raise UserError(f"{path} is a file of no known model; name a model's folder, with a config.json")


def _read_document(folder: Path) -> dict[str, Any]:
    """Read `config.json`; raise UserError if the model class is not supported."""
    document = diffusers.read_document(folder)
    diffusers.check_class(folder, document.get("_class_name"), (*list_denoiser_classes(), native_format.CLASS))
    return document


def save_denoiser(
    folder: str | os.PathLike,
    config: BackboneConfig,
    params: dict[str, Any],
    *,
    layout: FileLayout = "diffusers",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a denoiser as diffusers or its authors read it; the inverse of `load_denoiser`.

    Files that would be larger than `shard_bytes` are split.

    Raises:
      UserError: no family has files for the config, or the layout can't express it.
    """
    if (denoiser_format := find_format(config)) is None:
        raise UserError(f"no family has files for a {type(config).__name__}; write it in the native format (dit_video)")
    denoiser_format.save(folder, config, params, layout=layout, shard_bytes=shard_bytes)
