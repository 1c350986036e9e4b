"""Nested dictionaries of arrays as one safetensors file, with names such as `blocks/attention/query/kernel`.

Reading goes through the `safetensors` library. Writing is done here: the library orders the metadata at random, so that
its file differs from run to run, while this one is a function of its content.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from dit_video.core import trees as trees
from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import atomic_path

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""NumPy's name of a dtype and the format's (https://huggingface.co/docs/safetensors, "Format")."""

NUMPY = {theirs: np.dtype(ours) for ours, theirs in _DTYPES.items()}
"""and back"""

_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_SHOWN = 10


@dataclass(frozen=True)
class Streamed:
    """An array to be written that is read only then, in stretches of its first axis."""

    shape: tuple[int, ...]
    dtype: np.dtype
    """what is read is cast to it"""
    read: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def save(
    path: str | os.PathLike, tree: Mapping[str, Any], *, metadata: Mapping[str, str] | None = None, dtype: Any = None
) -> None:
    """Write the arrays of a nested dictionary to `path`, atomically; floating ones are cast to `dtype` if one is given.

    Args:
      path: the file, by convention `*.safetensors`; one that exists is replaced.
      tree: a nested dictionary of JAX or NumPy arrays, or of `Streamed` ones. Keys hold no `/`, which joins them in the
        file.
      metadata: free text by name, kept in the header.
      dtype: a floating dtype such as `jnp.bfloat16`, or None to write what is given. Integers and booleans stay.

    Raises:
      ValueError: two arrays get one name, or a dtype that the format lacks.
    """
    arrays = trees.flatten(tree)
    if len(arrays) != len(jax.tree.leaves(tree)):
        raise ValueError("two arrays have one name: keys must not contain '/'")
    dtypes = {name: stored(array.dtype, dtype) for name, array in arrays.items()}
    for name, kept in dtypes.items():
        if kept.name not in _DTYPES:
            raise ValueError(f"{name} has dtype {kept.name}, which a safetensors file cannot hold here")
    # Wide dtypes first: every array then starts at a multiple of its item size.
    order = sorted(arrays, key=lambda name: (-dtypes[name].itemsize, name))
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = {name: str(metadata[name]) for name in sorted(metadata)}
    end = 0
    for name in order:
        start, end = end, end + int(np.prod(arrays[name].shape, dtype=np.int64)) * dtypes[name].itemsize
        header[name] = {
            "dtype": _DTYPES[dtypes[name].name],
            "shape": list(arrays[name].shape),
            "data_offsets": [start, end],
        }
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        _write_header(file, header)
        for name in order:
            array = arrays[name]
            for stretch in array.read() if isinstance(array, Streamed) else (array,):
                values = np.asarray(jax.device_get(stretch)).astype(dtypes[name], order="C", copy=False)
                file.write(values.reshape(-1).view(np.uint8).data)


def load(path: str | os.PathLike, *, like: Any = None, dtype: Any = np.float32) -> Any:
    """Read the arrays of a file as a nested dictionary of NumPy arrays.

    Args:
      path: a safetensors file, of `save` or of any other program (names without `/` give a flat dictionary).
      like: a tree of `jax.ShapeDtypeStruct`: its names and shapes must be the file's, and the result has its structure.
      dtype: floating arrays are cast to it (bfloat16 to float32 is exact); None keeps what the file holds.

    Raises:
      MissingError: no such file.
      UserError: a pickled, truncated or corrupt file, or one whose tensors are not those of `like`.
    """
    path = Path(path)
    refuse(path)
    arrays: dict[str, np.ndarray] = {}
    try:
        with safetensors.safe_open(os.fspath(path), framework="np") as file:
            names = list(file.keys())
            if like is not None:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
                match(path, shapes, {name: tuple(leaf.shape) for name, leaf in trees.flatten(like).items()})
            for name in names:
                array = file.get_tensor(name)
                arrays[name] = array.astype(stored(array.dtype, dtype), copy=False)
    except safetensors.SafetensorError as error:
        raise corrupt(path, error) from error
    except AttributeError as error:
        raise unread_dtype(path, error) from error
    if like is None:
        return trees.unflatten(arrays)
    return trees.map_with_path(lambda name, _: arrays[name], like)


def load_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The free text of a file's header.

    Raises:
      MissingError: no such file.
      UserError: a pickled, truncated or corrupt file.
    """
    path = Path(path)
    refuse(path)
    try:
        with safetensors.safe_open(os.fspath(path), framework="np") as file:
            return dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise corrupt(path, error) from error


def stored(given: Any, cast: Any) -> np.dtype:
    """The dtype after casting floating arrays to `cast`."""
    return np.dtype(given if cast is None or not jnp.issubdtype(given, jnp.floating) else cast)


def _write_header(file: BinaryIO, header: dict[str, Any]) -> None:
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)


def refuse(path: Path) -> None:
    """Raise for a path that is no file, and for a pickle: reading one can run any code."""
    if not path.is_file():
        raise MissingError(f"no such file: {path}; give the path of a .safetensors file")
    with path.open("rb") as file:
        start = file.read(9)
    # A pickle of protocol 2 to 5 starts with 0x80 and its number; so does a header of, say, 640 bytes, whose ninth
    # byte is the brace that opens its JSON.
    pickled = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and start[8:] != b"{"
    if path.suffix.lower() in _PICKLED or pickled or start[:4] == b"PK\x03\x04":
        raise UserError(
            f"{path} is a pickled file, which can run any code when it is read; convert it where torch is installed: "
            'python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{path.name}', weights_only=True), '{path.stem}.safetensors')\""
        )


def match(path: Path, given: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise one error that names every kind of difference."""
    missing = [name for name in wanted if name not in given]
    unexpected = sorted(given.keys() - wanted.keys())
    misshapen = [
        f"{name} {list(given[name])} instead of {list(wanted[name])}"
        for name in wanted
        if name in given and given[name] != wanted[name]
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(kinds.values()):
        parts = [f"{len(found)} {kind} ({listing(found)})" for kind, found in kinds.items() if found]
        raise UserError(f"{path} does not fit the model, tensors: {'; '.join(parts)}; use the config it was made with")


def listing(names: list[str]) -> str:
    more = [f"… {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return ", ".join(names[:_SHOWN] + more)


def unread_dtype(path: Path, error: object) -> UserError:
    """For a dtype that NumPy lacks, or what the library raises for it."""
    return UserError(f"{path} holds a dtype that is not read here ({error}); convert it to bfloat16 first")


def corrupt(path: Path, error: object) -> UserError:
    return UserError(f"{path} is not a whole safetensors file ({error}); copy or download it again")
