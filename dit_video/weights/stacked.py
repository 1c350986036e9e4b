"""Weights of models whose layers are stacked here, and lie one by one in other projects' folders."""

import hashlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_video import tree as trees
from dit_video.weights.exchange import SHARD_BYTES, Foreign, their_shape, write_foreign
from dit_video.weights.folders import TensorFolder
from dit_video.weights.safetensors import match

StackedNames = Mapping[str, Foreign | Sequence[Foreign]]
"""By our path: one tensor, or those of all layers, which ours has along its first axis."""


def layers_of(pattern: str, name: str, layers: int) -> list[Foreign]:
    """The tensors of all layers; `name` has a `*` where the layer's number stands."""
    return [Foreign(name.replace("*", str(layer)), pattern) for layer in range(layers)]


def read_stacked(
    tensors: TensorFolder,
    names: StackedNames,
    like: Any,
    *,
    ignored: Collection[str] = (),
    stored: Callable[[str], Any],
) -> tuple[Any, str]:
    """Our parameters and a digest of their tensors as they are stored, whatever files they lie in.

    Read tensor by tensor: host memory holds no more than one parameter of all layers at a time besides the result.

    Args:
      tensors: the open folder.
      names: the model's map.
      like: our parameters' shapes: a tree of `jax.ShapeDtypeStruct`, whose structure the result has.
      ignored: their tensors that are of no use here; all others must be mapped.
      stored: the dtype of a parameter, by its path.

    Raises:
      UserError: a damaged file, or tensors that are missing, unexpected or of another shape.
    """
    wanted = {
        foreign.name: their_shape(foreign, shape)
        for path, leaf in trees.flatten(like).items()
        for foreign, shape in _parts(names[path], leaf.shape)
    }
    match(tensors.folder, {name: shape for name, shape in tensors.shapes.items() if name not in ignored}, wanted)
    digest = hashlib.sha256()

    def read(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        array, members = np.empty(leaf.shape, stored(path)), names[path]
        for index, foreign in enumerate(_all(members)):
            tensor = tensors.read(foreign.name)
            _feed(digest, f"{path} {index}", tensor)
            array[... if isinstance(members, Foreign) else index] = foreign.to_ours(tensor)
        # Waits: the host's copy is needed until it is on its device, and the next parameter's comes now.
        return jax.block_until_ready(jnp.asarray(array))

    params = trees.map_with_path(read, like)
    return params, digest.hexdigest()


def write_stacked(
    folder: str | os.PathLike,
    stem: str,
    names: StackedNames,
    params: Mapping[str, Any],
    *,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """The inverse of `read_stacked`: `stem.safetensors`, or several files with an index."""
    written: dict[str, np.ndarray] = {}
    for path, leaf in trees.flatten(params).items():
        array, members = np.asarray(leaf), names[path]
        for index, foreign in enumerate(_all(members)):
            written[foreign.name] = foreign.to_theirs(array[... if isinstance(members, Foreign) else index])
    same = {name: Foreign(name) for name in written}  # the layers are unstacked and turned above
    write_foreign(Path(folder), stem, same, written, shard_bytes=shard_bytes, dtype=dtype)


def _all(members: Foreign | Sequence[Foreign]) -> Sequence[Foreign]:
    return [members] if isinstance(members, Foreign) else members


def _parts(members: Foreign | Sequence[Foreign], shape: tuple[int, ...]) -> list[tuple[Foreign, tuple[int, ...]]]:
    """Each tensor, and what it is in our layout."""
    own = shape if isinstance(members, Foreign) else shape[1:]
    return [(foreign, own) for foreign in _all(members)]


def _feed(digest: Any, name: str, tensor: np.ndarray) -> None:
    digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
    digest.update(np.ascontiguousarray(tensor).view(np.uint8).data)
