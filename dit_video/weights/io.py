"""Weights in other projects' folders, to ours and back, bit for bit; a map of `foreign` tells where they lie.

A folder holds one safetensors file, or several with an index, as Hugging Face's libraries write them.
"""

import hashlib
import os
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dit_video.weights import streaming
from dit_video.weights.folders import TensorFolder
from dit_video.weights.parameter import Place, on_device, on_host
from dit_video.weights.streaming import FileMap, FolderSource, ParamsSource
from dit_video.weights.tensor_mapping import SHARD_BYTES, Names, stored_as


def read_foreign(
    folder: str | os.PathLike,
    stem: str,
    names: Names,
    like: Any,
    *,
    ignored: Collection[str] = (),
    dtype: Any = np.float32,
    place: Place = on_host,
) -> Any:
    """Our parameters from another project's folder, tensor by tensor.

    Args:
      folder: holds `stem.safetensors`, or `stem.safetensors.index.json` and the files that it names.
      stem: such as `model` or `diffusion_pytorch_model`.
      names: the model's map.
      like: our parameters' shapes: a tree of `jax.ShapeDtypeStruct`, whose structure the result has.
      ignored: their tensors that are of no use here; all others must be mapped.
      dtype: floating tensors are cast to it; None keeps the file's.
      place: reads each parameter to where it is kept, by its path: to devices, so that the host never holds a whole one
        of all layers; by default to the host.

    Raises:
      MissingError: no such folder, or no such file in it.
      UserError: pickled or corrupt files, tensors that are missing, unexpected or of another shape, or layers of
        several dtypes, which nothing casts.
    """
    with TensorFolder(folder, stem=stem) as tensors:
        source = FolderSource(tensors, FileMap.of(names), like, ignored=ignored)
        return streaming.read(source, like, source.depths, stored=stored_as(dtype), place=place)


def read_encoder(
    tensors: TensorFolder, names: Names, like: Any, *, ignored: Collection[str], dtype: str
) -> tuple[Any, str]:
    """The parameters of a frozen encoder, on the device, and a digest of their tensors as they are stored.

    The digest is of every tensor in our order, whatever files they lie in.

    Args:
      tensors: the folder, open.
      names: the model's map.
      like: our parameters' shapes.
      ignored: their tensors that are of no use here.
      dtype: of what enters matrix products, kernels and embeddings; all else is float32.
    """
    digest = hashlib.sha256()
    source = FolderSource(tensors, FileMap.of(names), like, ignored=ignored, digest=digest)
    params = streaming.read(
        source,
        like,
        source.depths,
        stored=lambda path: jnp.dtype(dtype) if path.endswith(("kernel", "embedding")) else np.float32,
        place=on_device,
    )
    return params, digest.hexdigest()


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
