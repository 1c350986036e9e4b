"""The native format of a model: `config.json`, and `model.safetensors` with our parameter names and stacked layers."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_video.core import config_json
from dit_video.core import trees as trees
from dit_video.core.errors import UserError
from dit_video.core.files import write_json
from dit_video.nn import get_param_shapes
from dit_video.weights import streaming
from dit_video.weights.folders import TensorFolder
from dit_video.weights.parameter import Placement, place_on_host
from dit_video.weights.safetensors import check_safetensors_file
from dit_video.weights.streaming import FileMap, FolderSource, ParamSource
from dit_video.weights.tensor_map import SHARD_BYTES

CLASS, STEM = "dit_video", "model"


def read_native(
    folder: Path,
    config: Any,
    *,
    dtype_fn: Callable[[str], Any] = lambda path: np.float32,
    place: Placement = place_on_host,
) -> dict[str, Any]:
    """Read the parameters of a folder in the native format.

    Args:
      folder: folder of the model.
      config: its config, from `read_native_config`.
      dtype_fn: returns the dtype that a floating parameter is cast to, given its path; None keeps the file's.
      place: reads each parameter to its destination, given its path; by default to the host.

    Raises:
      MissingError: files are missing.
      UserError: the weights do not fit the config.
    """
    with open_native(folder, config) as source:
        return streaming.read(source, source.like, dtype_fn=dtype_fn, place=place)


@contextlib.contextmanager
def open_native(folder: Path, config: Any, shapes: dict[str, Any] | None = None) -> Iterator[FolderSource]:
    """Open the parameters of a folder in the native format; errors are those of `read_native`.

    `shapes` are those of the parameters, which are computed if they are not passed.
    """
    shapes = get_param_shapes(config.make) if shapes is None else shapes
    with TensorFolder(folder, stem=STEM) as tensors:
        yield FolderSource(tensors, FileMap.from_params(shapes), shapes)


def read_params_file(path: Path, like: Any, *, place: Placement = place_on_host) -> dict[str, Any]:
    """Read the parameters of a file of our own in float32, one after the other, in chunks.

    Args:
      path: safetensors file of `safetensors.save`.
      like: shapes of the parameters, a tree of `jax.ShapeDtypeStruct`.
      place: reads each parameter to its destination, given its path; by default to the host.

    Raises:
      MissingError: the file does not exist.
      UserError: the file is pickled, truncated or corrupt, or its tensors are not those of `like`.
    """
    with open_params_file(path, like) as source:
        return streaming.read(source, like, dtype_fn=lambda path: np.float32, place=place)


def read_shapes(path: Path) -> dict[str, Any]:
    """Read the shapes of the parameters in a file of our own; errors are those of `read_params_file`."""
    with TensorFolder(path.parent, stem=path.stem) as tensors:
        shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in tensors.shapes.items()}
    return trees.unflatten(shapes)


@contextlib.contextmanager
def open_params_file(path: Path, like: Any) -> Iterator[FolderSource]:
    """Open the parameters of a file of our own; arguments and errors are those of `read_params_file`."""
    check_safetensors_file(path)
    with TensorFolder(path.parent, stem=path.stem) as tensors:
        yield FolderSource(tensors, FileMap.from_params(like), like)


def read_native_config(folder: Path, document: Mapping[str, Any], kind: Any = object, owner: str = "a model") -> Any:
    """Return the config in a folder's `config.json`.

    Args:
      folder: folder of the model.
      document: content of its `config.json`.
      kind: type that the config must have.
      owner: owner of such configs, for the message.

    Raises:
      UserError: the document has no config of a model, one of another version, or one of another type.
    """
    config = config_json.from_json(document.get("config"))
    if not hasattr(config, "make"):
        raise UserError(f"{folder / 'config.json'} has no config of a model. Convert the model again")
    if not isinstance(config, kind):
        raise UserError(f"{folder} has a {type(config).__name__}, which is not {owner}'s config")
    return config


def write_native(
    folder: str | os.PathLike,
    config: Any,
    source: ParamSource,
    *,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder in the native format, one tensor at a time; the inverse of `read_native`.

    Args:
      folder: destination; created if it does not exist.
      config: config of the model.
      source: source of its parameters.
      dtype: dtype that floating tensors are cast to; None keeps the source's.
      shard_bytes: maximum size of a file; larger ones are split, with an index.
    """
    shapes = get_param_shapes(config.make)
    file_map = FileMap.from_params(shapes)
    streaming.write(folder, STEM, source, file_map, shapes, dtype=dtype, shard_bytes=shard_bytes, metadata={})
    write_json(Path(folder) / "config.json", {"_class_name": CLASS, "config": config_json.to_json(config)})
