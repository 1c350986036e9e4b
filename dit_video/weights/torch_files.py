"""Tensors of PyTorch's files: archives of `torch.save`, its older format, and TorchScript; nothing of them is run."""

import io
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from dit_video.core.errors import MissingError, UserError
from dit_video.weights.safetensors import save
from dit_video.weights.torch_pickle import StoredTensor, parse_pickle

_DTYPES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
"""First pickle of the format before PyTorch 1.6."""

_MAX_DEPTH = 32


def read_torch_tensors(path: str | os.PathLike) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Return all tensors of a PyTorch file by their names, with the keys of nested containers joined by dots.

    It reads what `torch.save` writes of a state dict, alone or within dictionaries and lists, in its current format and
    in that before PyTorch 1.6, and what `torch.jit.save` writes. No code of the file is run; see `torch_pickle`.

    Raises:
      MissingError: the file does not exist.
      UserError: the file is damaged, of another format, or holds anything but tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"no such file: {path}")
    tensors, storages = _read_archive(path) if zipfile.is_zipfile(path) else _read_older_format(path)
    return {name: _make_array(path, name, tensor, storages) for name, tensor in tensors.items()}


def convert_torch_file(source: str | os.PathLike, destination: str | os.PathLike, *, dtype: Any = None) -> None:
    """Write the tensors of a PyTorch file to a safetensors file, with their names.

    Args:
      source: the file.
      destination: a safetensors file that does not exist.
      dtype: dtype that floating tensors are cast to; None keeps theirs.

    Raises:
      MissingError: the source does not exist.
      UserError: as `read_torch_tensors`, or the destination exists or has another suffix.
    """
    destination = Path(destination)
    if destination.exists() or destination.suffix != ".safetensors":
        rule = "exists" if destination.exists() else "has another suffix"
        raise UserError(f"destination={destination} is invalid: it {rule}. Use a new file with the suffix .safetensors")
    save(destination, read_torch_tensors(source), dtype=dtype)


def _read_archive(path: Path) -> tuple[dict[str, StoredTensor], dict[str, bytes]]:
    """Return the tensors of an archive by name, and its storages by key."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickles = [name for name in names if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise UserError(f"{path} is invalid: it is an archive, but not of PyTorch. Use a file of torch.save")
            root = pickles[0].removesuffix("data.pkl")
            if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
                raise UserError(f"{path} is invalid: its values are big-endian. Save it on another machine")
            tensors = dict(_list_tensors(path, parse_pickle(io.BytesIO(archive.read(pickles[0])), name=str(path))))
            prefix = f"{root}data/"
            return tensors, {name.removeprefix(prefix): archive.read(name) for name in names if name.startswith(prefix)}
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is damaged: {error}. Use a whole file") from error


def _read_older_format(path: Path) -> tuple[dict[str, StoredTensor], dict[str, bytes]]:
    """Return the tensors of a file from before PyTorch 1.6 by name, and its storages by key.

    It has five pickles: a number, a version, the sizes of types, the content and the keys of storages. The number of
    values and the values of each storage follow.
    """
    with path.open("rb") as file:
        if file.read(1) != b"\x80":
            raise UserError(f"{path} is invalid: it is no file of PyTorch. Use one of torch.save or torch.jit.save")
        file.seek(0)
        if parse_pickle(file, name=str(path)) != _MAGIC_NUMBER:
            raise UserError(f"{path} is invalid: it is a pickle, but none of PyTorch. Use a file of torch.save")
        _, _, content, keys = (parse_pickle(file, name=str(path)) for _ in range(4))
        tensors = dict(_list_tensors(path, content))
        sizes = {each.storage: _get_dtype(path, each).itemsize for each in tensors.values()}
        return tensors, {key: _read_storage(path, file, sizes.get(key)) for key in map(str, keys)}


def _read_storage(path: Path, file: io.BufferedIOBase, item_size: int | None) -> bytes:
    if item_size is None:
        raise UserError(f"{path} is invalid: a storage belongs to no tensor. Save its state dict alone")
    size = int.from_bytes(file.read(8), "little") * item_size
    values = file.read(size)
    if len(values) < size:
        raise UserError(f"{path} is damaged: it ends within a tensor. Use a whole file")
    return values


def _list_tensors(path: Path, content: Any, *keys: Any) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors in nested containers, with their names."""
    if isinstance(content, StoredTensor):
        yield ".".join(map(str, keys)), content
    elif isinstance(content, dict | list) or type(content) is tuple:
        if len(keys) > _MAX_DEPTH:
            raise UserError(f"{path} is invalid: it has containers within {_MAX_DEPTH} others. Save its tensors alone")
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _list_tensors(path, value, *keys, key)


def _get_dtype(path: Path, tensor: StoredTensor) -> np.dtype:
    if tensor.dtype not in _DTYPES:
        raise UserError(f"{path} is invalid: it has values of {tensor.dtype}. Convert them to float32 first")
    return _DTYPES[tensor.dtype]


def _make_array(path: Path, name: str, tensor: StoredTensor, storages: dict[str, bytes]) -> Shaped[np.ndarray, "..."]:
    """Return a tensor's values."""
    dtype = _get_dtype(path, tensor)
    values = np.frombuffer(storages.get(tensor.storage, b""), np.uint8)
    values = values[: len(values) // dtype.itemsize * dtype.itemsize].view(dtype)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((length - 1) * stride for length, stride in steps)
    is_empty = 0 in tensor.shape
    is_inside = last < len(values) and math.prod(tensor.shape) <= len(values)
    if min((tensor.offset, *tensor.shape, *tensor.strides)) < 0 or not (is_inside or is_empty):
        raise UserError(f"{path} is damaged: the tensor {name} lies outside of its values. Use a whole file")
    if is_empty:
        return np.zeros(tensor.shape, dtype)
    strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
    return np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, strides, writeable=False).copy()
