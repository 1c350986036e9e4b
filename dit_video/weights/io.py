"""Reading and writing other projects' model folders, bit for bit, through a tensor map (`tensor_map`).

A folder holds one safetensors file, or several with an index, as Hugging Face's libraries write them.
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dit_video.core import config_json, trees
from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import write_json
from dit_video.nn import get_param_shapes
from dit_video.weights import streaming
from dit_video.weights.folders import TensorFolder
from dit_video.weights.kernels import add_kernels
from dit_video.weights.parameter import Placement, place_on_device, place_on_host
from dit_video.weights.safetensors import check_safetensors_file, check_tensors_match, load_metadata
from dit_video.weights.streaming import FileMap, FolderSource, ParamSource, ParamsSource
from dit_video.weights.tensor_map import SHARD_BYTES, TensorMap

NATIVE_CLASS, STEM = "dit_video", "model"


def read_native(
    folder: Path,
    config: Any,
    *,
    dtype_fn: Callable[[str], Any] = lambda path: np.float32,
    place: Placement = place_on_host,
) -> dict[str, Any]:
    """Read the parameters of a folder in the native format.

    Args:
      folder: Folder of the model.
      config: Its config, from `read_native_config`.
      dtype_fn: Returns the dtype that a floating parameter is cast to, given its path; None keeps the file's.
      place: Reads each parameter to its destination, given its path; by default to the host.

    Raises:
      MissingError: If files are missing.
      UserError: If the weights do not fit the config.
    """
    with open_native(folder, config) as source:
        return streaming.read(source, source.like, dtype_fn=dtype_fn, place=place)


@contextlib.contextmanager
def open_native(folder: Path, config: Any, shapes: dict[str, Any] | None = None) -> Iterator[FolderSource]:
    """Open the parameters of a folder in the native format; errors are those of `read_native`.

    `shapes` are the parameters' shapes, which are computed if they are not passed.
    """
    shapes = get_param_shapes(config.make) if shapes is None else shapes
    with TensorFolder(folder, stem=STEM) as tensors:
        yield FolderSource(tensors, FileMap.from_params(shapes), shapes)


def read_params_file(path: Path, like: Any, *, place: Placement = place_on_host) -> dict[str, Any]:
    """Read the parameters in one of our own files in float32, one after the other, in chunks.

    Args:
      path: safetensors file from `safetensors.save`.
      like: Shapes of the parameters, a tree of `jax.ShapeDtypeStruct`.
      place: Reads each parameter to its destination, given its path; by default to the host.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file is pickled, truncated or corrupt, or its tensors do not match `like`.
    """
    with open_params_file(path, like) as source:
        return streaming.read(source, source.like, dtype_fn=lambda path: np.float32, place=place)


def read_shapes(path: Path) -> dict[str, Any]:
    """Read the shapes of the parameters in one of our own files; errors are those of `read_params_file`."""
    with TensorFolder(path.parent, stem=path.stem) as tensors:
        shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in tensors.shapes.items()}
    return trees.unflatten(shapes)


@contextlib.contextmanager
def open_params_file(path: Path, like: Any) -> Iterator[FolderSource]:
    """Open the parameters in one of our own files; arguments and errors are those of `read_params_file`.

    In `like` of the source, the file's kernels (`nn.Kernel`) take the place of arrays.
    """
    metadata = load_metadata(path)
    with TensorFolder(path.parent, stem=path.stem) as tensors:
        like = add_kernels(like, tensors.shapes, metadata)
        yield FolderSource(tensors, FileMap.from_params(like), like)


def read_native_config(folder: Path, document: Mapping[str, Any], kind: Any = object, owner: str = "a model") -> Any:
    """Return the config in a folder's `config.json`.

    Args:
      folder: Folder of the model.
      document: Content of its `config.json`.
      kind: Type that the config must have.
      owner: Owner of such configs, for the message.

    Raises:
      UserError: If the document has no model config, or the config has another version or type.
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
      folder: Destination; created if it does not exist.
      config: Config of the model.
      source: Source of its parameters.
      dtype: Dtype that floating tensors are cast to; None keeps the source's.
      shard_bytes: Maximum size of a file; larger ones are split, with an index.

    Raises:
      UserError: If other processes cannot import a class of the config.
    """
    document = {"_class_name": NATIVE_CLASS, "config": config_json.to_portable_json(config)}
    shapes = get_param_shapes(config.make)
    file_map = FileMap.from_params(shapes)
    streaming.write(folder, STEM, source, file_map, shapes, dtype=dtype, shard_bytes=shard_bytes, metadata={})
    write_json(Path(folder) / "config.json", document)


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
      folder: Folder with `stem.safetensors`, or with `stem.safetensors.index.json` and the files that it lists.
      stem: Base name of the files, such as `model` or `diffusion_pytorch_model`.
      tensor_map: The model's map.
      like: Shapes of our parameters: a tree of `jax.ShapeDtypeStruct`, whose structure the result has.
      ignored: Names of tensors to skip; all others must be mapped.

    Raises:
      MissingError: If the folder or one of its files does not exist.
      UserError: If files are pickled or corrupt, or tensors are missing, unexpected or of another shape.
    """
    with TensorFolder(folder, stem=stem) as tensors:
        source = FolderSource(tensors, FileMap.from_tensor_map(tensor_map), like, ignored=ignored)
        return streaming.read(source, like, dtype_fn=lambda path: np.float32)


def convert_arrays(
    arrays: Mapping[str, np.ndarray], tensor_map: TensorMap, like: Any, *, source: str | os.PathLike
) -> dict[str, Any]:
    """Return our parameters in float32 from the arrays of another project that a map names.

    Args:
      arrays: The arrays by name; those that the map does not name are not used.
      tensor_map: The model's map.
      like: Shapes of our parameters.
      source: File of the arrays, for errors.

    Raises:
      UserError: If arrays are missing or of another shape.
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
    """Read the parameters of a network from one safetensors file that the user made from its published weights.

    Args:
      path: The file.
      tensor_map: The network's map.
      like: Shapes of our parameters.
      network: Name of the network in errors.
      recipe: Sentence in errors that says how to make the file.
      ignored: Names of tensors to skip; all others must be mapped.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file is pickled or corrupt, or tensors are missing, unexpected, of another shape or not finite.
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
      UserError: If tensors are missing, unexpected or of another shape.
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
      tensors: The open folder.
      tensor_map: The model's map.
      like: Shapes of our parameters.
      ignored: Names of tensors to skip.
      dtype: Dtype of kernels and embeddings, the inputs of matrix products; all other parameters are float32.
      place: Reads each parameter to its destination, given its path; by default to the default device.
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
