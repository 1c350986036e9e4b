"""A model in our own layout: `config.json`, and `model.safetensors` with our names and stacked layers."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.files import write_json
from dit_video.nn import param_shapes
from dit_video.weights import streaming
from dit_video.weights.folders import TensorFolder
from dit_video.weights.parameter import Place, on_host
from dit_video.weights.streaming import FileMap, FolderSource, Source
from dit_video.weights.tensor_mapping import SHARD_BYTES

CLASS, STEM = "dit_video", "model"


def read_part(
    folder: Path,
    document: Mapping[str, Any],
    *,
    stored: Callable[[str], Any] = lambda path: np.float32,
    place: Place = on_host,
) -> tuple[Any, dict[str, Any]]:
    """The config and parameters of a folder, whose config file is `document`.

    Args:
      folder: of the part.
      document: what its `config.json` says.
      stored: the dtype that a floating parameter is cast to, by its path; None keeps the file's.
      place: reads each parameter to where it is kept, by its path; by default to the host.

    Raises:
      MissingError: files that it lacks.
      UserError: a config of another version, or weights that do not fit.
    """
    config = part_config(folder, document)
    shapes = param_shapes(config.make)
    with TensorFolder(folder, stem=STEM) as tensors:
        source = FolderSource(tensors, FileMap.own(shapes), shapes)
        return config, streaming.read(source, shapes, {}, stored=stored, place=place)


def part_config(folder: Path, document: Mapping[str, Any]) -> Any:
    """The config of a part.

    Raises:
      UserError: none, or one of another version.
    """
    config = config_json.from_json(document.get("config"))
    if not hasattr(config, "make"):
        raise UserError(f"{folder / 'config.json'} holds no config of a model; convert it again")
    return config


def write_part(
    folder: str | os.PathLike,
    config: Any,
    source: Source,
    *,
    depths: Mapping[str, int] = {},
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """The inverse of `read_part`, tensor by tensor.

    Args:
      folder: made if it isn't there.
      config: the model's.
      source: of its parameters.
      depths: how many layers the source has of those that are stacks, if it has them one by one.
      dtype: floating tensors are cast to it; None keeps the source's.
      shard_bytes: what would be a larger file is split, with an index.
    """
    shapes = param_shapes(config.make)
    streaming.write(
        folder, STEM, source, FileMap.own(shapes), shapes, depths, dtype=dtype, shard_bytes=shard_bytes, metadata={}
    )
    write_json(Path(folder) / "config.json", {"_class_name": CLASS, "config": config_json.to_json(config)})
