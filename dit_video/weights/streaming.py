"""Conversion of parameters from files to files, tensor by tensor.

Host memory holds little more than one tensor at a time. A `FileMap` says where a project's files store each of our
parameters; reading through one map and writing through another converts the files. Stacks are read layer by layer, and
tensors whose layout is the same on both sides are copied in chunks.
"""

import functools
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from dit_video.core import trees
from dit_video.core.errors import UserError
from dit_video.core.files import write_json
from dit_video.nn import is_kernel
from dit_video.weights import safetensors as ours
from dit_video.weights.folders import TensorFolder
from dit_video.weights.parameter import Parameter, Placement, place_on_host
from dit_video.weights.tensor_map import SHARD_BYTES, TensorMap, TensorMapping, get_their_shape

_CHUNK_BYTES = 16_000_000
"""Size of the chunks in which tensors are copied, in bytes."""


class ConstantTensor(NamedTuple):
    """A tensor that is a function of the config, not a parameter."""

    array: np.ndarray
    dtype_path: str
    """Path of the parameter whose dtype it has."""


class FileMap(NamedTuple):
    """Locations of our parameters in some project's files, by our path."""

    parts: Mapping[str, tuple[TensorMapping, ...]]
    """Tensors whose concatenation along our last axis is the parameter; usually one."""
    copies: Mapping[str, tuple[TensorMapping, ...]] = {}
    """Tensors that repeat the parameter."""
    constants: Mapping[str, "ConstantTensor"] = {}
    """Tensors that are not parameters, by name."""

    @staticmethod
    def from_tensor_map(tensor_map: TensorMap) -> "FileMap":
        """Return the file map of a tensor map, where each parameter is one tensor, or one per layer."""
        return FileMap({path: (foreign,) for path, foreign in tensor_map.items()})

    @staticmethod
    def from_params(like: Any, prefix: str = "") -> "FileMap":
        """Return the file map of our native format, where tensors have our paths and layers are stacked."""
        return FileMap.from_tensor_map({path: TensorMapping(prefix + path) for path in trees.flatten(like)})

    @property
    def depths(self) -> dict[str, int]:
        """Return the number of layers of each parameter that stacks one tensor per layer."""
        return {path: part.layers for path, (part, *_) in self.parts.items() if part.layers is not None}

    def compute_shapes(self, like: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors in the files, by name."""
        shapes = {name: fixed.array.shape for name, fixed in self.constants.items()}
        for path, leaf in trees.flatten(like).items():
            parts, copies = self.parts[path], self.copies.get(path, ())
            part_shape = (*leaf.shape[:-1], leaf.shape[-1] // len(parts)) if leaf.shape else ()
            shapes |= {name: get_their_shape(part, part_shape) for part in parts for name in part.names}
            shapes |= {name: get_their_shape(copy, leaf.shape) for copy in copies for name in copy.names}
        return shapes


class ParamsSource:
    """Parameters in memory; `layer` selects a block of a stack and is None for all other parameters.

    Raises:
      UserError: If a kernel is not an array.
    """

    depths: Mapping[str, int] = {}
    """Number of layers of each parameter that is stored layer by layer; in memory no parameter is."""

    def __init__(self, params: Mapping[str, Any]):
        kernels = (leaf for leaf in trees.flatten(params, is_leaf=is_kernel).items() if is_kernel(leaf[1]))
        for path, kernel in kernels:
            rule = f"{path} is a {type(kernel).__name__}, not an array, which other programs' formats cannot hold"
            raise UserError(f"the weights cannot be written: {rule}. Use Pipeline.save, or weights that are arrays")
        self._leaves = trees.flatten(params)

    def get_dtype(self, path: str, layer: int | None) -> np.dtype:
        """Return the dtype of a block."""
        return np.dtype(self._leaves[path].dtype)

    def read_block(self, path: str, layer: int | None) -> np.ndarray:
        """Return a block in our layout."""
        leaf = self._leaves[path]
        return np.asarray(leaf if layer is None else leaf[layer])

    def read_chunks(self, path: str, depth: int | None) -> Iterator[np.ndarray]:
        """Return the chunks of a parameter along its first axis; a stack of `depth` layers layer by layer."""
        return iter([self.read_block(path, None)])

    def read_raw_chunks(self, path: str, layer: int | None, like: TensorMapping) -> Iterator[np.ndarray] | None:
        """Return None: parameters in memory have no chunks that could be copied without conversion."""
        return None


class FolderSource:
    """Parameters in an open folder.

    Raises:
      UserError: If tensors are missing, unexpected or of another shape, copies differ, or constants have other values.
    """

    def __init__(
        self, tensors: TensorFolder, file_map: FileMap, like: Any, *, ignored: Collection[str] = (), digest: Any = None
    ):
        """Check the folder's tensors against a map.

        Args:
          tensors: The open folder.
          file_map: Where its files store our parameters.
          like: Shapes of our parameters: a tree of `jax.ShapeDtypeStruct`.
          ignored: Names of tensors to skip; all others must be mapped.
          digest: `hashlib` object that is updated with every block that is read, as it is stored.
        """
        self._tensors, self._file_map, self._digest, self.like = tensors, file_map, digest, like
        self.depths = file_map.depths
        """Number of layers of each parameter that stacks one tensor per layer."""
        shapes = {name: shape for name, shape in tensors.shapes.items() if name not in ignored}
        ours.check_tensors_match(tensors.folder, shapes, file_map.compute_shapes(like))
        for path, copies in file_map.copies.items():
            (first,) = file_map.parts[path]
            for name in itertools.chain.from_iterable(copy.names for copy in copies):
                if not np.array_equal(tensors.read(name), tensors.read(first.name)):
                    raise UserError(
                        f"{tensors.folder}: {name} differs from {first.name}, but they are one parameter here: only "
                        "models whose layers share it are supported"
                    )
        for name, constant in file_map.constants.items():
            table = tensors.read(name)
            resolution = {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(table.dtype.name, 2.0**-22)
            if not np.allclose(table.astype(np.float32), constant.array, atol=2 * resolution):
                raise UserError(f"{tensors.folder}: {name} differs from the table of the config, and it can't be kept")

    def get_dtype(self, path: str, layer: int | None) -> np.dtype:
        """Return the dtype of a block."""
        return self._tensors.get_dtype(self._list_tensors(path, layer)[0][0])

    def read_block(self, path: str, layer: int | None) -> np.ndarray:
        """Return a block in our layout."""
        tensors = self._list_tensors(path, layer)
        parts = [foreign.to_ours(self._read_tensor(path, name, foreign, layer)) for name, foreign in tensors]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def read_chunks(self, path: str, depth: int | None) -> Iterator[np.ndarray]:
        """Return the chunks of a parameter along its first axis; a stack of `depth` layers layer by layer."""
        if depth is not None:
            return (self.read_block(path, layer)[None] for layer in range(depth))
        (name, foreign), *more = self._list_tensors(path, None)
        if more or foreign.pattern:
            return iter([self.read_block(path, None)])
        return self._read_hashed_chunks(path, name)

    def read_raw_chunks(self, path: str, layer: int | None, like: TensorMapping) -> Iterator[np.ndarray] | None:
        """Return the chunks of a block's tensor if it has the layout of `like`, else None."""
        (name, foreign), *more = self._list_tensors(path, layer)
        stacked = layer is not None and foreign.layers is None
        if more or stacked or (foreign.pattern, foreign.axis_sizes) != (like.pattern, like.axis_sizes):
            return None
        return self._tensors.read_chunks(name, _CHUNK_BYTES)

    def _list_tensors(self, path: str, layer: int | None) -> list[tuple[str, TensorMapping]]:
        """Return the tensors of one block, with their names."""
        return [
            (foreign.name if layer is None or foreign.layers is None else foreign.names[layer], foreign)
            for foreign in self._file_map.parts[path]
        ]

    def _read_tensor(self, path: str, name: str, mapping: TensorMapping, layer: int | None) -> np.ndarray:
        if layer is None or mapping.layers is not None:
            tensor = self._tensors.read(name)
        else:
            tensor = self._tensors.read_row(name, layer)
        self._update_digest(f"{path} {layer or 0} {tensor.dtype} {tensor.shape} ".encode())
        self._update_digest(tensor.reshape(-1).view(np.uint8).data)
        return tensor

    def _read_hashed_chunks(self, path: str, name: str) -> Iterator[np.ndarray]:
        """Yield a tensor in chunks and update the digest, as `_read_tensor` does for whole tensors."""
        self._update_digest(f"{path} 0 {self._tensors.get_dtype(name)} {self._tensors.shapes[name]} ".encode())
        for chunk in self._tensors.read_chunks(name, _CHUNK_BYTES):
            self._update_digest(chunk.reshape(-1).view(np.uint8).data)
            yield chunk

    def _update_digest(self, content: Any) -> None:
        if self._digest is not None:
            self._digest.update(content)


ParamSource = ParamsSource | FolderSource


def read(
    source: ParamSource,
    like: Any,
    *,
    dtype_fn: Callable[[str], Any],
    place: Placement = place_on_host,
) -> Any:
    """Read parameters to their destination, in the structure of `like`; one layer of a stack is in memory at a time.

    Args:
      source: Source of the parameters.
      like: Shapes of the parameters: a tree of `jax.ShapeDtypeStruct`.
      dtype_fn: Returns the dtype that a floating parameter is cast to, given its path; None keeps the source's.
      place: Reads each parameter to its destination, given its path; by default to the host.

    Raises:
      UserError: If the layers of a stack have several dtypes and are not cast to one.
    """

    def parameter(path: str, leaf: Any) -> Any:
        depth, dtype = source.depths.get(path), dtype_fn(path)
        source_dtype = source.get_dtype(path, None) if depth is None else _get_stack_dtype(source, path, depth, dtype)
        chunks = functools.partial(source.read_chunks, path, depth)
        return place(path, Parameter(tuple(leaf.shape), ours.cast_dtype(source_dtype, dtype), chunks))

    return trees.map_with_path(parameter, like)


def write(
    folder: str | os.PathLike,
    stem: str,
    source: ParamSource,
    file_map: FileMap,
    like: Any,
    *,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    is_writer: bool = True,
) -> None:
    """Write `stem.safetensors`, or several files with an index, in the layout of a file map.

    Args:
      folder: Destination; created if it does not exist.
      stem: Base name of the files.
      source: Source of the parameters.
      file_map: Where the files store our parameters.
      like: Shapes of the parameters: a tree of `jax.ShapeDtypeStruct`.
      dtype: Dtype that floating tensors are cast to; None keeps the source's.
      shard_bytes: Maximum size of a file; larger ones are split.
      metadata: Text for the files' headers; by default that of PyTorch's files.
      is_writer: False in a process that only reads the source, in the order in which another process writes it.
    """
    folder = Path(folder)
    if is_writer:
        folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(sorted(_stream_tensors(source, file_map, like, dtype).items()))
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=shard_bytes,
    )
    file_metadata = {"format": "pt"} if metadata is None else metadata
    # A model without parameters gets a file, too.
    for file, names in (split.filename_to_tensors or {f"{stem}.safetensors": []}).items():
        contents = {name: tensors[name] for name in names}
        ours.save(folder / file, contents, metadata=file_metadata, is_writer=is_writer)
    if not is_writer:
        return
    index = folder / f"{stem}.safetensors.index.json"
    if split.is_sharded:
        write_json(index, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
        (folder / f"{stem}.safetensors").unlink(missing_ok=True)  # An older file would be read before the index.
    else:
        index.unlink(missing_ok=True)


def _stream_tensors(source: ParamSource, file_map: FileMap, like: Any, dtype: Any) -> dict[str, ours.StreamedArray]:
    """Return all tensors of a layout, without reading any of them."""
    shapes, depths = file_map.compute_shapes(like), {**file_map.depths, **source.depths}
    tensors: dict[str, ours.StreamedArray] = {}

    def add(name: str, read: Callable[[], Iterator[np.ndarray]], source_dtype: Any) -> None:
        tensors[name] = ours.StreamedArray(shapes[name], ours.cast_dtype(source_dtype, dtype), read)

    for path in trees.flatten(like):
        parts = file_map.parts[path]
        for index, foreign in enumerate(parts):
            for number, name in enumerate(foreign.names):
                depth, layer = depths.get(path), None if foreign.layers is None else number
                if layer is None and depth is not None:
                    block_dtype = _get_stack_dtype(source, path, depth, dtype)
                else:
                    block_dtype = source.get_dtype(path, layer)
                read = functools.partial(_read_chunks, source, path, foreign, layer, depth, (index, len(parts)))
                add(name, read, block_dtype)
        for copy in file_map.copies.get(path, ()):
            for name in copy.names:
                read = functools.partial(_read_chunks, source, path, copy, None, None, (0, 1))
                add(name, read, source.get_dtype(path, None))
    for name, constant in file_map.constants.items():
        add(name, functools.partial(iter, [constant.array]), source.get_dtype(constant.dtype_path, None))
    return tensors


def _read_chunks(
    source: ParamSource, path: str, mapping: TensorMapping, layer: int | None, depth: int | None, part: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Yield one of their tensors in chunks along its first axis."""
    index, count = part
    blocks: Iterable[np.ndarray]
    if layer is None and depth is not None:
        blocks = (source.read_block(path, number) for number in range(depth))
    else:
        raw_chunks = source.read_raw_chunks(path, layer, mapping) if count == 1 else None
        if raw_chunks is not None:
            yield from raw_chunks
            return
        blocks = [source.read_block(path, layer)]
    for block in blocks:
        if count > 1:
            width = block.shape[-1] // count
            block = block[..., index * width : (index + 1) * width]
        yield mapping.to_theirs(block)


def _get_stack_dtype(source: ParamSource, path: str, depth: int, dtype: Any) -> np.dtype:
    """Return the common dtype of a stack's layers, or the first layer's if they are cast to `dtype` anyway."""
    dtypes = [source.get_dtype(path, layer) for layer in range(depth)]
    if dtype is None and len(set(dtypes)) > 1:
        names = ", ".join(sorted({layer_dtype.name for layer_dtype in dtypes}))
        raise UserError(f"layers of {path} have dtypes {names}, but a stack has a single one. Use dtype= to cast them")
    return dtypes[0]
