"""Parameters from files to files, tensor by tensor: host memory holds little more than one tensor at a time.

A `FileMap` says where a project's files keep each of our parameters; reading through one and writing through another
converts. Layers of a stack are taken one by one, and what both sides keep in one way is copied as it is.
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
"""of a large tensor, in memory at once where it is taken as it is"""


class Fixed(NamedTuple):
    """A tensor that is a function of the config."""

    array: np.ndarray
    beside: str
    """the parameter whose dtype it has"""


class FileMap(NamedTuple):
    """Where some files keep our parameters, by our path."""

    parts: Mapping[str, tuple[Foreign, ...]]
    """tensors that lie side by side along our last axis; mostly one"""
    copies: Mapping[str, tuple[Foreign, ...]] = {}
    """tensors that hold the same once more"""
    fixed: Mapping[str, "Fixed"] = {}
    """tensors that are no parameters, by their name"""

    @staticmethod
    def of(names: Names) -> "FileMap":
        """Where each parameter is one tensor, or one a layer."""
        return FileMap({path: (foreign,) for path, foreign in names.items()})

    @staticmethod
    def own(like: Any, prefix: str = "") -> "FileMap":
        """Our own files: under our paths, layers stacked."""
        return FileMap.of({path: Foreign(prefix + path) for path in trees.flatten(like)})

    @property
    def depths(self) -> dict[str, int]:
        """How many layers those parameters have that are stacks of tensors."""
        return {path: part.layers for path, (part, *_) in self.parts.items() if part.layers is not None}

    def shapes(self, like: Any) -> dict[str, tuple[int, ...]]:
        """Of all their tensors, by name."""
        found = {name: fixed.array.shape for name, fixed in self.fixed.items()}
        for path, leaf in trees.flatten(like).items():
            parts, copies = self.parts[path], self.copies.get(path, ())
            own = (*leaf.shape[:-1], leaf.shape[-1] // len(parts)) if leaf.shape else ()
            found |= {name: their_shape(part, own) for part in parts for name in part.names}
            found |= {name: their_shape(copy, leaf.shape) for copy in copies for name in copy.names}
        return found


class ParamsSource:
    """Parameters in memory. Of a stack, `layer` says which block is meant; it is None for all others."""

    def __init__(self, params: Mapping[str, Any]):
        self._leaves = trees.flatten(params)

    def dtype(self, path: str, layer: int | None) -> np.dtype:
        return np.dtype(self._leaves[path].dtype)

    def block(self, path: str, layer: int | None) -> np.ndarray:
        """In our layout."""
        leaf = self._leaves[path]
        return np.asarray(leaf if layer is None else leaf[layer])

    def pieces(self, path: str, depth: int | None) -> Iterator[np.ndarray]:
        """One parameter, in stretches of its first axis; a stack of `depth` layers in layers."""
        return iter([self.block(path, None)])

    def rows(self, path: str, layer: int | None, like: Foreign) -> Iterator[np.ndarray] | None:
        return None


class FolderSource:
    """Parameters in an open folder of some names.

    Raises:
      UserError: tensors that are missing, unexpected or of another shape; copies that differ, or fixed tensors with
        something else in them.
    """

    def __init__(
        self, tensors: TensorFolder, names: FileMap, like: Any, *, ignored: Collection[str] = (), digest: Any = None
    ):
        """`ignored` are its tensors that are of no use; all others must be mapped.

        `digest`, of `hashlib`, is fed the tensors of every block that is read, as they are stored.
        """
        self._tensors, self._names, self._digest = tensors, names, digest
        found = {name: shape for name, shape in tensors.shapes.items() if name not in ignored}
        ours.match(tensors.folder, found, names.shapes(like))
        for path, copies in names.copies.items():
            (first,) = names.parts[path]
            for name in itertools.chain.from_iterable(copy.names for copy in copies):
                if not np.array_equal(tensors.read(name), tensors.read(first.name)):
                    raise UserError(
                        f"{tensors.folder}: {name} differs from {first.name}; here they are one parameter, so only "
                        "models whose layers share it can be read"
                    )
        for name, fixed in names.fixed.items():
            table = tensors.read(name)
            if not np.allclose(table.astype(np.float32), fixed.array, atol=2 * _resolution(table.dtype)):
                raise UserError(f"{tensors.folder}: {name} is not the table that it should be; it can't be kept here")

    @property
    def depths(self) -> dict[str, int]:
        """How many layers those parameters have that are stacks of tensors."""
        return self._names.depths

    def dtype(self, path: str, layer: int | None) -> np.dtype:
        return self._tensors.dtype(self._parts(path, layer)[0][0])

    def block(self, path: str, layer: int | None) -> np.ndarray:
        read = [foreign.to_ours(self._read(path, name, foreign, layer)) for name, foreign in self._parts(path, layer)]
        return read[0] if len(read) == 1 else np.concatenate(read, axis=-1)

    def pieces(self, path: str, depth: int | None) -> Iterator[np.ndarray]:
        if depth is not None:
            return (self.block(path, layer)[None] for layer in range(depth))
        (name, foreign), *more = self._parts(path, None)
        if more or foreign.pattern:
            return iter([self.block(path, None)])
        return self._noted(path, name)

    def rows(self, path: str, layer: int | None, like: Foreign) -> Iterator[np.ndarray] | None:
        (name, foreign), *more = self._parts(path, layer)
        stacked = layer is not None and foreign.layers is None
        if more or stacked or (foreign.pattern, foreign.sizes) != (like.pattern, like.sizes):
            return None
        return self._tensors.stretches(name, _ROWS_BYTES)

    def _parts(self, path: str, layer: int | None) -> list[tuple[str, Foreign]]:
        """The tensors of one block, by name."""
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
        """A tensor in stretches."""
        self._note(f"{path} 0 {self._tensors.dtype(name)} {self._tensors.shapes[name]} ".encode())
        for stretch in self._tensors.stretches(name, _ROWS_BYTES):
            self._note(stretch.reshape(-1).view(np.uint8).data)
            yield stretch

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
    """Parameters to where they are kept, in the structure of `like`: of a stack one layer is in memory at a time.

    Args:
      source: where they come from.
      like: their shapes: a tree of `jax.ShapeDtypeStruct`.
      depths: how many layers those have that are stacks.
      stored: the dtype that a floating parameter is cast to, by its path; None keeps the source's.
      place: reads each parameter to where it is kept, by its path; by default to the host.

    Raises:
      UserError: layers of several dtypes, which nothing casts.
    """

    def parameter(path: str, leaf: Any) -> Any:
        depth = depths.get(path)
        kept = source.dtype(path, None) if depth is None else _one_dtype(source, path, depth, stored(path))
        pieces = functools.partial(source.pieces, path, depth)
        return place(path, Parameter(tuple(leaf.shape), ours.stored(kept, stored(path)), pieces))

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
    """Write `stem.safetensors`, or several files with an index, as a layout has them; arguments are as for `read`.

    Floating tensors are cast to `dtype`; None keeps the source's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(sorted(_tensors(source, names, like, depths, dtype).items()))
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.nbytes
    files = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [f"{stem}.safetensors"]
    for file, members in zip(files, shards, strict=True):
        kept = {"format": "pt"} if metadata is None else metadata
        ours.save(folder / file, {name: tensors[name] for name in members}, metadata=kept)
    index = folder / f"{stem}.safetensors.index.json"
    if len(shards) == 1:
        index.unlink(missing_ok=True)
        return
    total = sum((folder / file).stat().st_size for file in files)
    of_tensor = {name: file for file, members in zip(files, shards, strict=True) for name in members}
    write_json(index, {"metadata": {"total_size": total}, "weight_map": of_tensor})
    (folder / f"{stem}.safetensors").unlink(missing_ok=True)  # an earlier one, which would be read before the index


def _tensors(
    source: Source, names: FileMap, like: Any, depths: Mapping[str, int], dtype: Any
) -> dict[str, ours.Streamed]:
    """All tensors of a layout, none of them read yet."""
    shapes = names.shapes(like)
    found: dict[str, ours.Streamed] = {}

    def add(name: str, of: Callable[[], Iterator[np.ndarray]], given: Any) -> None:
        found[name] = ours.Streamed(shapes[name], ours.stored(given, dtype), of)

    for path in trees.flatten(like):
        parts = names.parts[path]
        for index, foreign in enumerate(parts):
            for number, name in enumerate(foreign.names):
                depth, layer = depths.get(path), None if foreign.layers is None else number
                if layer is None and depth is not None:
                    kept = _one_dtype(source, path, depth, dtype)
                else:
                    kept = source.dtype(path, layer)
                add(name, _blocks(source, path, foreign, layer, depth, (index, len(parts))), kept)
        for copy in names.copies.get(path, ()):
            for name in copy.names:
                add(name, _blocks(source, path, copy, None, None, (0, 1)), source.dtype(path, None))
    for name, fixed in names.fixed.items():
        add(name, functools.partial(iter, [fixed.array]), source.dtype(fixed.beside, None))
    return found


def _blocks(
    source: Source, path: str, foreign: Foreign, layer: int | None, depth: int | None, part: tuple[int, int]
) -> Callable[[], Iterator[np.ndarray]]:
    """One of their tensors, in stretches of its first axis."""
    index, count = part

    def theirs(array: np.ndarray) -> np.ndarray:
        width = array.shape[-1] // count if array.ndim else 0
        return foreign.to_theirs(array[..., index * width : (index + 1) * width] if count > 1 else array)

    def read() -> Iterator[np.ndarray]:
        if layer is None and depth is not None:
            return (theirs(source.block(path, each)) for each in range(depth))
        same = source.rows(path, layer, foreign) if count == 1 else None
        return iter([theirs(source.block(path, layer))]) if same is None else same

    return read


def _one_dtype(source: Source, path: str, depth: int, dtype: Any) -> np.dtype:
    """That of all layers of a stack; where all are cast, any."""
    dtypes = [source.dtype(path, layer) for layer in range(depth)]
    if dtype is None and len(set(dtypes)) > 1:
        names = ", ".join(sorted({each.name for each in dtypes}))
        raise UserError(f"the layers of {path} are {names}, a stack has one dtype; give one to cast them to")
    return dtypes[0]


def _resolution(dtype: np.dtype) -> float:
    """Of numbers around one."""
    return {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(dtype.name, 2.0**-22)
