"""Conversion of parameters from files to files, tensor by tensor.

Host memory holds little more than one tensor at a time. A `FileMap` says where a project's files store each of our
parameters; reading through one and writing through another converts. Stacks are read layer by layer, and tensors whose
layout is the same on both sides are copied in chunks.
"""

import functools
import itertools
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit_video.core import trees as trees
from dit_video.core.errors import UserError
from dit_video.core.files import write_json
from dit_video.weights import safetensors as ours
from dit_video.weights.folders import TensorFolder
from dit_video.weights.parameter import Parameter, Place, on_host
from dit_video.weights.tensor_mapping import SHARD_BYTES, Foreign, Names, their_shape

_ROWS_BYTES = 16_000_000
"""Size of the chunks in which tensors are copied, in bytes."""


class Fixed(NamedTuple):
    """A tensor that is a function of the config, not a parameter."""

    array: np.ndarray
    beside: str
    """Path of the parameter whose dtype it has."""


class FileMap(NamedTuple):
    """Locations of our parameters in some project's files, by our path."""

    parts: Mapping[str, tuple[Foreign, ...]]
    """Tensors whose concatenation along our last axis is the parameter; mostly one."""
    copies: Mapping[str, tuple[Foreign, ...]] = {}
    """Tensors that repeat the parameter."""
    fixed: Mapping[str, "Fixed"] = {}
    """Tensors that are not parameters, by name."""

    @staticmethod
    def of(names: Names) -> "FileMap":
        """Return the file map of a tensor map, where each parameter is one tensor, or one per layer."""
        return FileMap({path: (foreign,) for path, foreign in names.items()})

    @staticmethod
    def own(like: Any, prefix: str = "") -> "FileMap":
        """Return the file map of our native format, where tensors have our paths and layers are stacked."""
        return FileMap.of({path: Foreign(prefix + path) for path in trees.flatten(like)})

    @property
    def depths(self) -> dict[str, int]:
        """Return the number of layers of each parameter that stacks one tensor per layer."""
        return {path: part.layers for path, (part, *_) in self.parts.items() if part.layers is not None}

    def shapes(self, like: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors in the files, by name."""
        shapes = {name: fixed.array.shape for name, fixed in self.fixed.items()}
        for path, leaf in trees.flatten(like).items():
            parts, copies = self.parts[path], self.copies.get(path, ())
            part_shape = (*leaf.shape[:-1], leaf.shape[-1] // len(parts)) if leaf.shape else ()
            shapes |= {name: their_shape(part, part_shape) for part in parts for name in part.names}
            shapes |= {name: their_shape(copy, leaf.shape) for copy in copies for name in copy.names}
        return shapes


class ParamsSource:
    """Parameters in memory; `layer` selects a block of a stack and is None for all other parameters."""

    def __init__(self, params: Mapping[str, Any]):
        self._leaves = trees.flatten(params)

    def dtype(self, path: str, layer: int | None) -> np.dtype:
        """Return the dtype of a block."""
        return np.dtype(self._leaves[path].dtype)

    def block(self, path: str, layer: int | None) -> np.ndarray:
        """Return a block in our layout."""
        leaf = self._leaves[path]
        return np.asarray(leaf if layer is None else leaf[layer])

    def pieces(self, path: str, depth: int | None) -> Iterator[np.ndarray]:
        """Return the chunks of a parameter along its first axis; a stack of `depth` layers layer by layer."""
        return iter([self.block(path, None)])

    def rows(self, path: str, layer: int | None, like: Foreign) -> Iterator[np.ndarray] | None:
        """Return None: parameters in memory have no chunks that could be copied without conversion."""
        return None


class FolderSource:
    """Parameters in an open folder.

    Raises:
      UserError: tensors are missing, unexpected or of another shape, copies differ, or constants have other values.
    """

    def __init__(
        self, tensors: TensorFolder, names: FileMap, like: Any, *, ignored: Collection[str] = (), digest: Any = None
    ):
        """Check the folder's tensors against a map.

        Args:
          tensors: the open folder.
          file_map: where its files store our parameters.
          like: shapes of our parameters: a tree of `jax.ShapeDtypeStruct`.
          ignored: names of tensors to skip; all others must be mapped.
          digest: `hashlib` object that is updated with every block that is read, as it is stored.
        """
        self._tensors, self._names, self._digest = tensors, names, digest
        shapes = {name: shape for name, shape in tensors.shapes.items() if name not in ignored}
        ours.match(tensors.folder, shapes, names.shapes(like))
        for path, copies in names.copies.items():
            (first,) = names.parts[path]
            for name in itertools.chain.from_iterable(copy.names for copy in copies):
                if not np.array_equal(tensors.read(name), tensors.read(first.name)):
                    raise UserError(
                        f"{tensors.folder}: {name} differs from {first.name}, but they are one parameter here: only "
                        "models whose layers share it are supported"
                    )
        for name, constant in names.fixed.items():
            table = tensors.read(name)
            if not np.allclose(table.astype(np.float32), constant.array, atol=2 * _resolution(table.dtype)):
                raise UserError(
                    f"{tensors.folder}: {name} differs from the table computed from the config, and it can't be kept"
                )

    @property
    def depths(self) -> dict[str, int]:
        """Return the number of layers of each parameter that stacks one tensor per layer."""
        return self._names.depths

    def dtype(self, path: str, layer: int | None) -> np.dtype:
        """Return the dtype of a block."""
        return self._tensors.dtype(self._parts(path, layer)[0][0])

    def block(self, path: str, layer: int | None) -> np.ndarray:
        """Return a block in our layout."""
        parts = [foreign.to_ours(self._read(path, name, foreign, layer)) for name, foreign in self._parts(path, layer)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def pieces(self, path: str, depth: int | None) -> Iterator[np.ndarray]:
        """Return the chunks of a parameter along its first axis; a stack of `depth` layers layer by layer."""
        if depth is not None:
            return (self.block(path, layer)[None] for layer in range(depth))
        (name, foreign), *more = self._parts(path, None)
        if more or foreign.pattern:
            return iter([self.block(path, None)])
        return self._noted(path, name)

    def rows(self, path: str, layer: int | None, like: Foreign) -> Iterator[np.ndarray] | None:
        """Return the chunks of a block's tensor if its layout is that of `like`, else None."""
        (name, foreign), *more = self._parts(path, layer)
        stacked = layer is not None and foreign.layers is None
        if more or stacked or (foreign.pattern, foreign.sizes) != (like.pattern, like.sizes):
            return None
        return self._tensors.stretches(name, _ROWS_BYTES)

    def _parts(self, path: str, layer: int | None) -> list[tuple[str, Foreign]]:
        """Return the tensors of one block, with their names."""
        return [
            (foreign.name if layer is None or foreign.layers is None else foreign.names[layer], foreign)
            for foreign in self._names.parts[path]
        ]

    def _read(self, path: str, name: str, foreign: Foreign, layer: int | None) -> np.ndarray:
        if layer is None or foreign.layers is not None:
            tensor = self._tensors.read(name)
        else:
            tensor = self._tensors.row(name, layer)
        self._note(f"{path} {layer or 0} {tensor.dtype} {tensor.shape} ".encode())
        self._note(tensor.reshape(-1).view(np.uint8).data)
        return tensor

    def _noted(self, path: str, name: str) -> Iterator[np.ndarray]:
        """Yield a tensor in chunks and update the digest, as `_read_tensor` does for whole tensors."""
        self._note(f"{path} 0 {self._tensors.dtype(name)} {self._tensors.shapes[name]} ".encode())
        for chunk in self._tensors.stretches(name, _ROWS_BYTES):
            self._note(chunk.reshape(-1).view(np.uint8).data)
            yield chunk

    def _note(self, content: Any) -> None:
        if self._digest is not None:
            self._digest.update(content)


Source = ParamsSource | FolderSource


def read(
    source: Source,
    like: Any,
    depths: Mapping[str, int],
    *,
    stored: Callable[[str], Any],
    place: Place = on_host,
) -> Any:
    """Read parameters to their destination, in the structure of `like`; one layer of a stack is in memory at a time.

    Args:
      source: source of the parameters.
      like: shapes of the parameters: a tree of `jax.ShapeDtypeStruct`.
      depths: number of layers of each stacked parameter.
      dtype_fn: returns the dtype that a floating parameter is cast to, given its path; None keeps the source's.
      place: reads each parameter to its destination, given its path; by default to the host.

    Raises:
      UserError: layers of a stack have several dtypes that nothing casts.
    """

    def parameter(path: str, leaf: Any) -> Any:
        depth = depths.get(path)
        source_dtype = source.dtype(path, None) if depth is None else _one_dtype(source, path, depth, stored(path))
        pieces = functools.partial(source.pieces, path, depth)
        return place(path, Parameter(tuple(leaf.shape), ours.stored(source_dtype, stored(path)), pieces))

    return trees.map_with_path(parameter, like)


def write(
    folder: str | os.PathLike,
    stem: str,
    source: Source,
    names: FileMap,
    like: Any,
    depths: Mapping[str, int],
    *,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `stem.safetensors`, or several files with an index, in the layout of a file map.

    Args:
      folder: destination; created if it does not exist.
      stem: base name of the files.
      source: source of the parameters.
      file_map: where the files store our parameters.
      like: shapes of the parameters: a tree of `jax.ShapeDtypeStruct`.
      depths: number of layers of each parameter that the source or the files store layer by layer.
      dtype: dtype that floating tensors are cast to; None keeps the source's.
      shard_bytes: maximum size of a file; larger ones are split.
      metadata: text for the files' headers; by default that of PyTorch's files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(sorted(_tensors(source, names, like, depths, dtype).items()))
    shards: list[list[str]] = [[]]
    shard_size = 0
    for name, tensor in tensors.items():
        if shards[-1] and shard_size + tensor.nbytes > shard_bytes:
            shards.append([])
            shard_size = 0
        shards[-1].append(name)
        shard_size += tensor.nbytes
    files = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [f"{stem}.safetensors"]
    for file, members in zip(files, shards, strict=True):
        file_metadata = {"format": "pt"} if metadata is None else metadata
        ours.save(folder / file, {name: tensors[name] for name in members}, metadata=file_metadata)
    index = folder / f"{stem}.safetensors.index.json"
    if len(shards) == 1:
        index.unlink(missing_ok=True)
        return
    total = sum((folder / file).stat().st_size for file in files)
    weight_map = {name: file for file, members in zip(files, shards, strict=True) for name in members}
    write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / f"{stem}.safetensors").unlink(missing_ok=True)  # An older file would be read before the index.


def _tensors(
    source: Source, names: FileMap, like: Any, depths: Mapping[str, int], dtype: Any
) -> dict[str, ours.Streamed]:
    """Return all tensors of a layout, none of them read yet."""
    shapes = names.shapes(like)
    tensors: dict[str, ours.Streamed] = {}

    def add(name: str, read: Callable[[], Iterator[np.ndarray]], source_dtype: Any) -> None:
        tensors[name] = ours.Streamed(shapes[name], ours.stored(source_dtype, dtype), read)

    for path in trees.flatten(like):
        parts = names.parts[path]
        for index, foreign in enumerate(parts):
            for number, name in enumerate(foreign.names):
                depth, layer = depths.get(path), None if foreign.layers is None else number
                if layer is None and depth is not None:
                    block_dtype = _one_dtype(source, path, depth, dtype)
                else:
                    block_dtype = source.dtype(path, layer)
                add(name, _blocks(source, path, foreign, layer, depth, (index, len(parts))), block_dtype)
        for copy in names.copies.get(path, ()):
            for name in copy.names:
                add(name, _blocks(source, path, copy, None, None, (0, 1)), source.dtype(path, None))
    for name, constant in names.fixed.items():
        add(name, functools.partial(iter, [constant.array]), source.dtype(constant.beside, None))
    return tensors


def _blocks(
    source: Source, path: str, foreign: Foreign, layer: int | None, depth: int | None, part: tuple[int, int]
) -> Callable[[], Iterator[np.ndarray]]:
    """Return a function that reads one of their tensors in chunks of its first axis."""
    index, count = part

    def theirs(array: np.ndarray) -> np.ndarray:
        width = array.shape[-1] // count if array.ndim else 0
        return foreign.to_theirs(array[..., index * width : (index + 1) * width] if count > 1 else array)

    def read() -> Iterator[np.ndarray]:
        if layer is None and depth is not None:
            return (theirs(source.block(path, number)) for number in range(depth))
        raw_chunks = source.rows(path, layer, foreign) if count == 1 else None
        return iter([theirs(source.block(path, layer))]) if raw_chunks is None else raw_chunks

    return read


def _one_dtype(source: Source, path: str, depth: int, dtype: Any) -> np.dtype:
    """Return the common dtype of a stack's layers, or that of the first layer if they are cast to `dtype` anyway."""
    dtypes = [source.dtype(path, layer) for layer in range(depth)]
    if dtype is None and len(set(dtypes)) > 1:
        names = ", ".join(sorted({layer_dtype.name for layer_dtype in dtypes}))
        raise UserError(f"layers of {path} have dtypes {names}, but a stack has a single one. Use dtype= to cast them")
    return dtypes[0]


def _resolution(dtype: np.dtype) -> float:
    """Return the spacing of a dtype's numbers around one."""
    return {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(dtype.name, 2.0**-22)
