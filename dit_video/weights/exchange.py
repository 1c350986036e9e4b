"""Weights in other projects' folders: their names and layouts to ours and back, bit for bit.

A model's map gives, for each of our paths, the other project's name and an einops pattern from its layout to ours, so
that one map serves both ways. A folder holds one safetensors file, or several with an index, as Hugging Face's
libraries write them.
"""

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from dit_video import tree as trees
from dit_video.errors import UserError
from dit_video.files import write_json
from dit_video.weights import safetensors as ours
from dit_video.weights.folders import TensorFolder

SHARD_BYTES = 5_000_000_000


class Foreign(NamedTuple):
    """Where a parameter lies in another project's files."""

    name: str
    """for a stack of layers with `{}` in the place of a layer's number"""
    pattern: str = ""
    """an einops pattern from theirs to ours, such as `o i -> i o`; empty where the layouts are the same"""
    sizes: tuple[tuple[str, int], ...] = ()
    """of axes that the pattern splits or joins, where the arrays don't tell"""
    layers: int | None = None
    """how many layers our parameter has along its first axis, each a tensor of theirs; None: it is one tensor"""

    @property
    def names(self) -> list[str]:
        """of their tensors, in order"""
        return [self.name] if self.layers is None else [self.name.format(layer) for layer in range(self.layers)]

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """One of their tensors in our layout."""
        return rearrange(array, self.pattern, **dict(self.sizes)) if self.pattern else array

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """The inverse: of a stack, one layer."""
        if not self.pattern:
            return array
        theirs, ours = self.pattern.split("->")
        return rearrange(array, f"{ours} -> {theirs}", **dict(self.sizes))


Names = Mapping[str, Foreign]
"""By our path."""


def read_foreign(
    folder: str | os.PathLike,
    stem: str,
    names: Names,
    like: Any,
    *,
    ignored: Collection[str] = (),
    dtype: Any = np.float32,
    place: Callable[[str, np.ndarray], Any] = lambda path, array: array,
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
    shapes = {
        name: their_shape(names[path], leaf.shape)
        for path, leaf in trees.flatten(like).items()
        for name in names[path].names
    }
    with TensorFolder(folder, stem=stem) as tensors:
        found = {name: shape for name, shape in tensors.shapes.items() if name not in ignored}
        ours.match(Path(folder), found, shapes)

        def read(name: str, foreign: Foreign) -> np.ndarray:
            array = tensors.read(name)
            return foreign.to_ours(array.astype(ours.stored(array.dtype, dtype), copy=False))

        def parameter(path: str, leaf: Any) -> Any:
            foreign = names[path]
            if foreign.layers is None:
                return place(path, np.ascontiguousarray(read(foreign.name, foreign)))
            return place(path, _stacked(Path(folder), foreign.names, leaf.shape, lambda name: read(name, foreign)))

        return trees.map_with_path(parameter, like)


def _stacked(folder: Path, names: list[str], shape: tuple[int, ...], read: Callable[[str], np.ndarray]) -> np.ndarray:
    """All layers in one array, each read into its place: memory never holds them twice."""
    whole: np.ndarray | None = None
    for index, name in enumerate(names):
        layer = read(name)
        if whole is None:
            whole = np.empty(shape, layer.dtype)
        if layer.dtype != whole.dtype:
            raise UserError(
                f"{folder}: {name} is {layer.dtype} and {names[0]} {whole.dtype}, layers must have one dtype; "
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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    leaves = {
        name: (names[path], leaf if names[path].layers is None else leaf[layer])
        for path, leaf in trees.flatten(params).items()
        for layer, name in enumerate(names[path].names)
    }
    shards: list[list[str]] = [[]]
    used = 0
    for name in sorted(leaves):
        size = int(np.prod(leaves[name][1].shape)) * ours.stored(leaves[name][1].dtype, dtype).itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    single = len(shards) == 1
    of_tensor: dict[str, str] = {}
    for number, members in enumerate(shards, 1):
        file = f"{stem}.safetensors" if single else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {name: leaves[name][0].to_theirs(np.asarray(leaves[name][1])) for name in members}
        ours.save(folder / file, arrays, metadata={"format": "pt"}, dtype=dtype)
        of_tensor |= dict.fromkeys(members, file)
    if not single:
        total = sum((folder / file).stat().st_size for file in set(of_tensor.values()))
        write_json(
            folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": of_tensor}
        )
        (folder / f"{stem}.safetensors").unlink(missing_ok=True)  # an earlier one, which would be read before the index


def their_shape(foreign: Foreign, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What shape their tensor must have, for a stack each of theirs."""
    one = shape if foreign.layers is None else shape[1:]
    return foreign.to_theirs(np.broadcast_to(np.zeros((), np.int8), one)).shape
