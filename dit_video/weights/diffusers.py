"""Common parts of diffusers' model folders: files, layouts of linear maps and convolutions, settings."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.weights.tensor_map import TensorMapping

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


def check_class(folder: Path, kind: Any, supported: Collection[str]) -> None:
    """Check the class of the model in a folder.

    Raises:
      UserError: the class is not supported.
    """
    if kind not in supported:
        raise UserError(f"{folder} has a model of class {kind}. Supported classes are {', '.join(supported)}")


def get_settings(
    folder: Path, document: Mapping[str, Any], defaults: Mapping[str, Any], *, unused: Collection[str] = ()
) -> dict[str, Any]:
    """Return the arguments of a model's class: its defaults, updated by the document.

    Args:
      folder: folder of the model, for error messages.
      document: content of its `config.json`.
      defaults: all arguments of the class, with its defaults.
      unused: settings of published documents that the class does not have, and that change nothing.

    Raises:
      UserError: the document has an argument that is neither in `defaults` nor unused.
    """
    settings = {name: value for name, value in document.items() if not name.startswith("_") and name not in unused}
    values = {**defaults, **settings}
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


def compute_shortest_decimal(value: Any) -> float:
    """Return the shortest decimal that rounds to the same float32."""
    return float(str(np.float32(value)))
