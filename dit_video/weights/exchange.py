"""Weights in other projects' folders, to ours and back, bit for bit; a map of `foreign` tells where they lie.

A folder holds one safetensors file, or several with an index, as Hugging Face's libraries write them.
"""

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_video import tree as trees
from dit_video.errors import UserError
from dit_video.weights import safetensors as ours
from dit_video.weights import streaming
from dit_video.weights.folders import TensorFolder
from dit_video.weights.foreign import SHARD_BYTES, Names, Place, stored_as, their_shape
from dit_video.weights.streaming import FileMap, ParamsSource


def read_foreign(
    folder: str | os.PathLike,
    stem: str,
    names: Names,
    like: Any,
    *,
    ignored: Collection[str] = (),
    dtype: Any = np.float32,
    place: Place = lambda path, array: array,
) -> Any:
    """Our parameters from another project's folder, tensor by tensor.

    Args:
      folder: holds `stem.safetensors`, or `stem.safetensors.index.json` and the files that it names.
      stem: such as `model` or `diffusion_pytorch_model`.
      names: the model's map.
      like: our parameters' shapes: a tree of `jax.ShapeDtypeStruct`, whose structure the result has.
      ignored: their tensors that are of no use here; all others must be mapped.
      dtype: floating tensors are cast to it; None keeps the file's.
      place: what becomes of a parameter as soon as it is read, by its path: it may be laid out on devices, so that the
        host never holds all of them.

    Raises:
      MissingError: no such folder, or no such file in it.
      UserError: pickled or corrupt files, or tensors that are missing, unexpected or of another shape.
    """
    with TensorFolder(folder, stem=stem) as tensors:
        return read_tensors(tensors, names, like, ignored=ignored, stored=stored_as(dtype), place=place)


def read_tensors(
    tensors: TensorFolder,
    names: Names,
    like: Any,
    *,
    ignored: Collection[str] = (),
    stored: Callable[[str], Any],
    place: Place = lambda path, array: array,
    digest: Any = None,
) -> Any:
    """Our parameters from an open folder; what is not said here is as in `read_foreign`.

    Args:
      tensors: the folder.
      names: the model's map.
      like: our parameters' shapes.
      ignored: their tensors that are of no use here.
      stored: the dtype that a floating parameter is cast to, by its path; None keeps the file's.
      place: what becomes of a parameter as soon as it is read.
      digest: of `hashlib`; it is fed every tensor as it is stored, in our order, whatever files they lie in.
    """
    wanted = {
        name: their_shape(names[path], leaf.shape)
        for path, leaf in trees.flatten(like).items()
        for name in names[path].names
    }
    found = {name: shape for name, shape in tensors.shapes.items() if name not in ignored}
    ours.match(tensors.folder, found, wanted)

    def layers(path: str) -> Iterator[np.ndarray]:
        foreign = names[path]
        for index, name in enumerate(foreign.names):
            tensor = tensors.read(name)
            if digest is not None:
                _feed(digest, f"{path} {index}", tensor)
            yield foreign.to_ours(tensor.astype(ours.stored(tensor.dtype, stored(path)), copy=False))

    def parameter(path: str, leaf: Any) -> Any:
        if names[path].layers is None:
            return place(path, np.asarray(next(layers(path)), order="C"))
        return place(path, _stacked(tensors.folder, names[path].names, leaf.shape, layers(path)))

    return trees.map_with_path(parameter, like)


def read_encoder(
    tensors: TensorFolder, names: Names, like: Any, *, ignored: Collection[str], dtype: str
) -> tuple[Any, str]:
    """The parameters of a frozen encoder, on the device, and a digest of their tensors as they are stored.

    Arguments are as in `read_tensors`, but for `dtype`, which is that of what enters matrix products: kernels and
    embeddings. All else is float32.
    """
    digest = hashlib.sha256()
    params = read_tensors(
        tensors,
        names,
        like,
        ignored=ignored,
        stored=lambda path: jnp.dtype(dtype) if path.endswith(("kernel", "embedding")) else np.float32,
        # Waits: the host's copy is needed until it is on its device, and the next parameter's comes now.
        place=lambda path, array: jax.block_until_ready(jnp.asarray(array)),
        digest=digest,
    )
    return params, digest.hexdigest()


def _feed(digest: Any, name: str, tensor: np.ndarray) -> None:
    digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
    digest.update(np.ascontiguousarray(tensor).view(np.uint8).data)


def _stacked(folder: Path, names: list[str], shape: tuple[int, ...], layers: Iterator[np.ndarray]) -> np.ndarray:
    """All layers in one array, each read into its place: memory never holds them twice."""
    whole: np.ndarray | None = None
    for index, layer in enumerate(layers):
        if whole is None:
            whole = np.empty(shape, layer.dtype)
        if layer.dtype != whole.dtype:
            raise UserError(
                f"{folder}: {names[index]} is {layer.dtype} and {names[0]} {whole.dtype}, layers must have one dtype; "
                "read them as float32"
            )
        whole[index] = layer
    assert whole is not None
    return whole


def write_foreign(
    folder: str | os.PathLike,
    stem: str,
    names: Names,
    params: Mapping[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
    dtype: Any = None,
) -> None:
    """Write our parameters as another project's folder; the inverse of `read_foreign`.

    Files that would be larger than `shard_bytes` are split, with an index.
    """
    layout, source = FileMap.of(names), ParamsSource(params)
    streaming.write(folder, stem, source, layout, params, layout.depths, dtype=dtype, shard_bytes=shard_bytes)
