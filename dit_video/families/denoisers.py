"""Denoisers of all families, or in the native format: `config.json` and weights in safetensors.

A family's denoiser may also be a single file, with the name that its authors gave it.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from dit_video.core.errors import UserError
from dit_video.families.denoiser_format import DenoiserFormat, FileLayout, load_files, read_files_config
from dit_video.families.registry import list_families
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.sampling.expansion import INSTRUCTIONS
from dit_video.weights.lora import LoraModule
from dit_video.weights.parameter import Placement, place_on_host
from dit_video.weights.tensor_map import SHARD_BYTES


def list_formats() -> tuple[DenoiserFormat, ...]:
    """Return the file formats of all families' denoisers."""
    return tuple(family.denoiser for family in list_families())


def find_format(config: BackboneConfig) -> DenoiserFormat | None:
    """Return the file format for models with this config; None if no family has one."""
    return next((each for each in list_formats() if isinstance(config, each.config_class)), None)


def get_lora_modules(config: BackboneConfig, *, primary_layout: FileLayout = "diffusers") -> dict[str, LoraModule]:
    """Return the modules that LoRA files of the config's family may change, by their names in the files."""
    denoiser_format = find_format(config)
    return {} if denoiser_format is None else denoiser_format.get_lora_modules(config, primary_layout=primary_layout)


def get_prompt_instructions(config: BackboneConfig) -> str:
    """Return the instructions for a language model that expands prompts as models of the config's family read them."""
    denoiser_format = find_format(config)
    return INSTRUCTIONS if denoiser_format is None else denoiser_format.prompt_instructions


def load_denoiser(
    folder: str | os.PathLike,
    *,
    dtype: Any = np.float32,
    kernel_dtype: Any = None,
    place: Placement = place_on_host,
) -> tuple[BackboneConfig, dict[str, Any]]:
    """Read a denoiser of any family, or in the native format; arguments, results and errors are those of `load_files`.

    `folder` is a model's folder, such as a pipeline's `transformer`, or a file from its authors.
    """
    return load_files(list_formats(), folder, dtype=dtype, kernel_dtype=kernel_dtype, place=place)


def read_denoiser_config(folder: str | os.PathLike) -> BackboneConfig:
    """Read the config of a denoiser in a folder, without its weights; errors are those of `load_files`."""
    return read_files_config(list_formats(), Path(folder))


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
      UserError: If no family has files for the config, or the layout can't express it.
    """
    if (denoiser_format := find_format(config)) is None:
        raise UserError(f"no family has files for a {type(config).__name__}; write it in the native format (dit_video)")
    denoiser_format.save(folder, config, params, layout=layout, shard_bytes=shard_bytes)
