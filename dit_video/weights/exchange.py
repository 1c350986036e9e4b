"""Weights in other projects' folders: their names and layouts to ours and back, bit for bit.

A model's map gives, for each of our paths, the other project's name and an einops pattern from its layout to ours, so
that one map serves both ways. A folder holds one safetensors file, or several with an index, as Hugging Face's
libraries write them.
"""

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
Place = Callable[[str, np.ndarray], Any]
"""From a path and its parameter to what is kept of it."""


def stored_as(dtype: Any, kernels: Any = None) -> Callable[[str], Any]:
    """The dtype that a floating parameter is cast to, by its path: `dtype`, but that of linear maps' kernels `kernels`.

    None keeps what the file has; for `kernels` it is as for all others.
    """
    return lambda path: kernels if kernels is not None and path.endswith("kernel") else dtype


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
