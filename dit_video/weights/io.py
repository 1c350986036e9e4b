"""Reading and writing of other projects' model folders, bit for bit, through a tensor map (`tensor_map`).

A folder holds one safetensors file, or several with an index, as Hugging Face's libraries write them.
"""

import functools
import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax.numpy as jnp
import numpy as np

from dit_video.core import trees
from dit_video.core.errors import MissingError, UserError
from dit_video.weights import streaming
from dit_video.weights.folders import TensorFolder
from dit_video.weights.parameter import Placement, place_on_device
from dit_video.weights.safetensors import check_safetensors_file, check_tensors_match
from dit_video.weights.streaming import FileMap, FolderSource, ParamsSource
from dit_video.weights.tensor_map import SHARD_BYTES, TensorMap

EncoderConfigT = TypeVar("EncoderConfigT")


@dataclass(frozen=True)
class LoadedEncoder(Generic[EncoderConfigT]):
    """A frozen encoder's config and parameters, as read from a folder."""

    config: EncoderConfigT
    params: dict[str, Any]
    digest: str
    """Digest of the tensors as they are stored, however they are split into files."""
    ignored: tuple[str, ...]
    """Names of the tensors that were not read: other parts of the model, and old folders' lists of positions."""


def read_params(
    folder: str | os.PathLike,
    stem: str,
    tensor_map: TensorMap,
    like: Any,
    *,
    ignored: Collection[str] = (),
) -> Any:
    """Read our parameters in float32 from another project's folder to the host, one tensor at a time.

    Args:
      folder: folder with `stem.safetensors`, or with `stem.safetensors.index.json` and the files that it lists.
      stem: base name of the files, such as `model` or `diffusion_pytorch_model`.
      tensor_map: the model's map.
      like: shapes of our parameters: a tree of `jax.ShapeDtypeStruct`, whose structure the result has.
      ignored: names of tensors to skip; all others must be mapped.

    Raises:
      MissingError: the folder or one of its files does not exist.
      UserError: files are pickled or corrupt, or tensors are missing, unexpected or of another shape.
    """
    with TensorFolder(folder, stem=stem) as tensors:
        source = FolderSource(tensors, FileMap.from_tensor_map(tensor_map), like, ignored=ignored)
        return streaming.read(source, like, dtype_fn=lambda path: np.float32)


def convert_arrays(
    arrays: Mapping[str, np.ndarray], tensor_map: TensorMap, like: Any, *, source: str | os.PathLike
) -> dict[str, Any]:
    """Return our parameters in float32 from another project's arrays in memory, those that a map names.

    Args:
      arrays: the arrays by their names; others than the map's are not used.
      tensor_map: the model's map.
      like: shapes of our parameters.
      source: file of the arrays, for errors.

    Raises:
      UserError: arrays are missing or of another shape.
    """
    expected = FileMap.from_tensor_map(tensor_map).compute_shapes(like)
    shapes = {name: array.shape for name, array in arrays.items() if name in expected}
    check_tensors_match(Path(source), shapes, expected, fix="use the published file")
    params = {path: mapping.to_ours(arrays[mapping.name]) for path, mapping in tensor_map.items()}
    return trees.unflatten({path: array.astype(np.float32) for path, array in params.items()})


def read_network_file(
    path: str | os.PathLike,
    tensor_map: TensorMap,
    like: Any,
    *,
    network: str,
    recipe: str,
    ignored: Collection[str] = (),
) -> Any:
    """Read the parameters of a network from one safetensors file that the user made of its published weights.

    Args:
      path: the file.
      tensor_map: the network's map.
      like: shapes of our parameters.
      network: name of the network in errors.
      recipe: sentence in errors that says how to make the file.
      ignored: names of tensors to skip; all others must be mapped.

    Raises:
      MissingError: the file does not exist.
      UserError: the file is pickled or corrupt, or tensors are missing, unexpected, of another shape or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"no such file of {network} weights: {path}. {recipe}")
    check_safetensors_file(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file. {recipe}")
    try:
        params = read_params(path.parent, path.stem, tensor_map, like, ignored=ignored)
    except UserError as error:
        raise UserError(f"{path.name} is invalid as {network} weights: {error}. {recipe}") from error
    bad = [name for name, array in trees.flatten(params).items() if not np.isfinite(array).all(axis=None)]
    if bad:
        raise UserError(
            f"{path.name} is invalid as {network} weights: {bad[0]} has values that are not finite. {recipe}"
        )
    return params


def check_tensors(tensors: TensorFolder, tensor_map: TensorMap, like: Any, *, ignored: Collection[str] = ()) -> None:
    """Check that a folder has the tensors of a map, in the shapes of `like`, without reading them.

    Arguments are those of `read_encoder_params`.

    Raises:
      UserError: tensors are missing, unexpected or of another shape.
    """
    FolderSource(tensors, FileMap.from_tensor_map(tensor_map), like, ignored=ignored)


def get_encoder_dtype(path: str, *, dtype: str) -> Any:
    """Return the dtype of a frozen encoder's parameter: `dtype` for inputs of matrix products, float32 for others."""
    return jnp.dtype(dtype) if path.endswith(("kernel", "embedding")) else np.float32


def read_encoder_params(
    tensors: TensorFolder,
    tensor_map: TensorMap,
    like: Any,
    *,
    ignored: Collection[str],
    dtype: str,
    place: Placement = place_on_device,
) -> tuple[Any, str]:
    """Read a frozen encoder's parameters; return them and a digest of the tensors as they are stored.

    The digest covers every tensor in our order, however they are split into files.

    Args:
      tensors: the open folder.
      tensor_map: the model's map.
      like: shapes of our parameters.
      ignored: names of tensors to skip.
      dtype: dtype of kernels and embeddings, the inputs of matrix products; all other parameters are float32.
      place: reads each parameter to its destination, given its path; by default to the default device.
    """
    digest = hashlib.sha256()
    source = FolderSource(tensors, FileMap.from_tensor_map(tensor_map), like, ignored=ignored, digest=digest)
    params = streaming.read(
        source,
        like,
        dtype_fn=functools.partial(get_encoder_dtype, dtype=dtype),
        place=place,
    )
    return params, digest.hexdigest()


def write_params(
    folder: str | os.PathLike,
    stem: str,
    tensor_map: TensorMap,
    params: Mapping[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
    dtype: Any = None,
) -> None:
    """Write our parameters as another project's folder; the inverse of `read_params`.

    Files that would be larger than `shard_bytes` are split, with an index.
    """
    file_map, source = FileMap.from_tensor_map(tensor_map), ParamsSource(params)
    streaming.write(folder, stem, source, file_map, params, dtype=dtype, shard_bytes=shard_bytes)
