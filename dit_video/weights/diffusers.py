"""What all folders of diffusers' models have: the files, the layout of a linear map and of a convolution, settings."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_video.core.errors import UserError
from dit_video.core.files import read_json, write_json
from dit_video.weights.folders import TensorFolder
from dit_video.weights.io import read_foreign, write_foreign
from dit_video.weights.tensor_mapping import SHARD_BYTES, Foreign, Names

STEM = "diffusion_pytorch_model"
PICTURE = "o i h w -> 1 h w i o"
"""the kernel of a convolution over pictures"""
DENSE = "o i -> i o"
"""the kernel of a linear map"""
DENSE_PICTURE = "o i 1 1 -> i o"
"""the kernel of a linear map that is written as a convolution"""


def document_of(folder: Path) -> dict[str, Any]:
    """What `config.json` says.

    Raises:
      MissingError: no such folder, or no such file in it.
      UserError: a file that holds no settings.
    """
    document = read_json(folder / "config.json")
    if not isinstance(document, dict):
        raise UserError(f"{folder / 'config.json'} holds no settings of a model; copy or download it again")
    return document


def settings(folder: Path, document: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model's class: its defaults, and what the document says otherwise.

    Raises:
      UserError: an argument that has no default here, so isn't known.
    """
    given = {**defaults, **{name: value for name, value in document.items() if not name.startswith("_")}}
    if unknown := sorted(given.keys() - defaults.keys()):
        raise UserError(f"{folder / 'config.json'} has settings that are not known here: {', '.join(unknown)}")
    return given


def check_fixed(folder: Path, given: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Refuse settings that aren't known here with other values.

    Raises:
      UserError: the first of them.
    """
    for name, value in fixed.items():
        if given[name] != value:
            raise UserError(f"{folder / 'config.json'}: {name} {given[name]} is not known here, only {value}")


def both(ours: str, theirs: str, pattern: str) -> dict[str, Foreign]:
    """Kernel and bias of a convolution or a linear map."""
    return {f"{ours}/kernel": Foreign(f"{theirs}.weight", pattern), f"{ours}/bias": Foreign(f"{theirs}.bias")}


def tensor_names(folder: Path) -> set[str]:
    """The names of all tensors in a folder.

    Raises:
      MissingError: no such folder, or no such file in it.
      UserError: pickled or corrupt files.
    """
    with TensorFolder(folder, stem=STEM) as tensors:
        return set(tensors.shapes)


def read(folder: Path, names: Names, like: Any) -> dict[str, Any]:
    """Parameters of the shapes `like`; see `read_foreign`."""
    return read_foreign(folder, STEM, names, like)


def write(
    folder: str | os.PathLike,
    document: dict[str, Any],
    names: Names,
    params: Mapping[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Weights and settings. The latents' normalisation goes by the settings, so it is left out of the weights."""
    weights = {name: part for name, part in params.items() if name != "normalizer"}
    write_foreign(folder, STEM, names, weights, shard_bytes=shard_bytes)
    write_json(Path(folder) / "config.json", document)


def decimal(value: Any) -> float:
    """The shortest decimal that gives a float32 back."""
    return float(str(np.float32(value)))
