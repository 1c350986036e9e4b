"""Common parts of diffusers' model folders: files, layouts of linear maps and convolutions, settings."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_video.core.errors import UserError
from dit_video.core.files import read_json, write_json
from dit_video.weights.folders import TensorFolder
from dit_video.weights.io import read_params, write_params
from dit_video.weights.tensor_map import SHARD_BYTES, TensorMap, TensorMapping

STEM = "diffusion_pytorch_model"
CONV_2D = "o i h w -> 1 h w i o"
"""Layout of a 2D convolution's kernel."""
DENSE = "o i -> i o"
"""Layout of a linear map's kernel."""
CONV_1X1 = "o i 1 1 -> i o"
"""Layout of a linear map's kernel that is stored as a 1x1 convolution."""


def read_document(folder: Path) -> dict[str, Any]:
    """Read a folder's `config.json`.

    Raises:
      MissingError: the folder or the file does not exist.
      UserError: the file holds no JSON object.
    """
    document = read_json(folder / "config.json")
    if not isinstance(document, dict):
        raise UserError(f"{folder / 'config.json'} is not a JSON object with settings. Copy or download it again")
    return document


def get_settings(folder: Path, document: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a model's class: its defaults, updated by the document.

    Raises:
      UserError: the document has an argument that is not in `defaults`.
    """
    values = {**defaults, **{name: value for name, value in document.items() if not name.startswith("_")}}
    if unknown := sorted(values.keys() - defaults.keys()):
        raise UserError(f"{folder / 'config.json'} has settings that are not supported: {', '.join(unknown)}")
    return values


def check_supported(folder: Path, settings: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """Check that settings have the only values that are supported.

    Raises:
      UserError: a setting has another value; the first one is named.
    """
    for name, value in supported.items():
        if settings[name] != value:
            raise UserError(f"{folder / 'config.json'}: {name}={settings[name]} is not supported, only {value}")


def map_kernel_and_bias(ours: str, theirs: str, pattern: str, *, layers: int | None = None) -> dict[str, TensorMapping]:
    """Return the mappings of the kernel and the bias of a convolution or a linear map."""
    kernel = TensorMapping(f"{theirs}.weight", pattern, layers=layers)
    return {f"{ours}/kernel": kernel, f"{ours}/bias": TensorMapping(f"{theirs}.bias", layers=layers)}


def map_scale_and_shift(ours: str, theirs: str, *, layers: int | None = None) -> dict[str, TensorMapping]:
    """Return the names of a norm's scale and shift."""
    scale = TensorMapping(f"{theirs}.weight", layers=layers)
    return {f"{ours}/scale": scale, f"{ours}/shift": TensorMapping(f"{theirs}.bias", layers=layers)}


def list_tensor_names(folder: Path) -> set[str]:
    """Return the names of all tensors in a folder.

    Raises:
      MissingError: the folder or one of its files does not exist.
      UserError: files are pickled or corrupt.
    """
    with TensorFolder(folder, stem=STEM) as tensors:
        return set(tensors.shapes)


def read(folder: Path, tensor_map: TensorMap, like: Any) -> dict[str, Any]:
    """Read parameters of the shapes `like`; see `read_params`."""
    return read_params(folder, STEM, tensor_map, like)


def write(
    folder: str | os.PathLike,
    document: dict[str, Any],
    tensor_map: TensorMap,
    params: Mapping[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write weights and settings.

    The latents' normalisation is part of the settings, so it is left out of the weights.
    """
    weights = {name: part for name, part in params.items() if name != "normalizer"}
    write_params(folder, STEM, tensor_map, weights, shard_bytes=shard_bytes)
    write_json(Path(folder) / "config.json", document)


def compute_shortest_decimal(value: Any) -> float:
    """Return the shortest decimal that rounds to the same float32."""
    return float(str(np.float32(value)))
