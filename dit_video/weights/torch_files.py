"""Tensors of PyTorch's files: archives of `torch.save`, its older format, and TorchScript; nothing of them is run."""

import io
import math
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
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

_MAX_DEPTH, _MAX_ENTRIES = 32, 1 << 20
"""Maximum number of containers within each other, and of entries of all: a short pickle can name one list any number of
times."""
_MAX_COPIES = 16
"""Maximum size of all tensors, in sizes of the values that the file stores: views share values, as tied weights do."""
_MAX_AXES, _MAX_EMPTY = 32, 1 << 31
"""Maximum number of axes, and length of an axis of a tensor without values."""
_ARCHIVE_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError),
    *(NotImplementedError, RuntimeError, OverflowError, MemoryError),
)
"""Errors of `zipfile` on damaged, encrypted or unknown archives."""


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
    _check_size(path, tensors, storages)
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
            members = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in members if name.endswith("/data.pkl")]
            if len(pickles) != 1 or len(members) != len(archive.infolist()):
                raise UserError(f"{path} is invalid: it is an archive, but not of PyTorch. Use a file of torch.save")
            root = pickles[0].removesuffix("data.pkl")
            prefix = f"{root}data/"
            values = [info for name, info in members.items() if name.startswith(prefix)]
            _check_members(path, [members[pickles[0]], *values])
            if f"{root}byteorder" in members:
                with archive.open(f"{root}byteorder") as file:
                    if file.read(16) != b"little":
                        raise UserError(f"{path} is invalid: its values are big-endian. Save it on another machine")
            content = parse_pickle(io.BytesIO(archive.read(pickles[0])), name=str(path))
            storages = {info.filename.removeprefix(prefix): archive.read(info) for info in values}
    except _ARCHIVE_ERRORS as error:
        raise UserError(f"{path} is damaged: {error}. Use a whole file") from error
    return _collect_tensors(path, content), storages


def _check_members(path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    """Check that parts of an archive are stored as they are, and do not overlap, so that they are no larger than it.

    Raises:
      UserError: they are.
    """
    if any(info.compress_type != zipfile.ZIP_STORED for info in members):
        rule = "torch.save stores values as they are"
        raise UserError(f"{path} is invalid: its values are compressed, and {rule}. Unpack it, and save it again")
    if sum(info.file_size for info in members) > path.stat().st_size:
        raise UserError(f"{path} is damaged: its parts are larger than the file. Use a whole file")


def _read_older_format(path: Path) -> tuple[dict[str, StoredTensor], dict[str, bytes]]:
    """Return the tensors of a file from before PyTorch 1.6 by name, and its storages by key.

    It has five pickles: a number, a version, the sizes of types, the content and the keys of storages. The number of
    values and the values of each storage follow.
    """
    with _WholeFile(io.FileIO(path)) as file:
        if file.read(1) != b"\x80":
            raise UserError(f"{path} is invalid: it is no file of PyTorch. Use one of torch.save or torch.jit.save")
        file.seek(0)
        if parse_pickle(file, name=str(path)) != _MAGIC_NUMBER:
            raise UserError(f"{path} is invalid: it is a pickle, but none of PyTorch. Use a file of torch.save")
        _, _, content, keys = (parse_pickle(file, name=str(path)) for _ in range(4))
        tensors = _collect_tensors(path, content)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise UserError(f"{path} is damaged: it has no list of storages. Use a whole file")
        sizes = {each.storage: _get_dtype(path, each).itemsize for each in tensors.values()}
        return tensors, {key: _read_storage(path, file, sizes.get(key)) for key in keys}


class _WholeFile(io.BufferedReader):
    """A file that reads no more than it has, so that a length in a pickle does not take memory of its own."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes, at most the rest of the file."""
        rest = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(rest if size is None or size < 0 else min(size, rest))


def _read_storage(path: Path, file: io.BufferedIOBase, item_size: int | None) -> bytes:
    if item_size is None:
        raise UserError(f"{path} is invalid: a storage belongs to no tensor. Save its state dict alone")
    size = int.from_bytes(file.read(8), "little") * item_size
    values = file.read(size)
    if len(values) < size:
        raise UserError(f"{path} is damaged: it ends within a tensor. Use a whole file")
    return values


def _collect_tensors(path: Path, content: Any) -> dict[str, StoredTensor]:
    """Return the tensors in nested containers by name."""
    tensors: dict[str, StoredTensor] = {}
    pending: list[tuple[tuple[Any, ...], Any]] = [((), content)]
    for _ in range(_MAX_ENTRIES):
        if not pending:
            return tensors
        keys, value = pending.pop()
        if isinstance(value, StoredTensor):
            name = ".".join(map(str, keys))
            if name in tensors:
                raise UserError(f"{path} is invalid: two tensors have the name {name}. Rename one, and save it again")
            tensors[name] = value
        elif isinstance(value, dict | list) or type(value) is tuple:
            if len(keys) > _MAX_DEPTH:
                rule = f"it has containers within {_MAX_DEPTH} others"
                raise UserError(f"{path} is invalid: {rule}. Save its tensors alone")
            items = value.items() if isinstance(value, dict) else enumerate(value)
            pending += reversed([((*keys, key), each) for key, each in items])
    raise UserError(f"{path} is invalid: it has more than {_MAX_ENTRIES} entries. Save its tensors alone")


def _check_size(path: Path, tensors: Mapping[str, StoredTensor], storages: Mapping[str, bytes]) -> None:
    """Check that views do not repeat the values of their storages more often than models do.

    Raises:
      UserError: they do.
    """
    size = sum(math.prod(each.shape) * _get_dtype(path, each).itemsize for each in tensors.values())
    if storages and size > _MAX_COPIES * sum(map(len, storages.values())):
        raise UserError(
            f"{path} is invalid: its tensors have {size} bytes, more than {_MAX_COPIES} times those that it stores. "
            "Use a whole file"
        )


def _get_dtype(path: Path, tensor: StoredTensor) -> np.dtype:
    if tensor.dtype not in _DTYPES:
        raise UserError(f"{path} is invalid: it has values of {tensor.dtype}. Convert them to float32 first")
    return _DTYPES[tensor.dtype]


def _make_array(path: Path, name: str, tensor: StoredTensor, storages: dict[str, bytes]) -> Shaped[np.ndarray, "..."]:
    """Return a tensor's values."""
    dtype = _get_dtype(path, tensor)
    if len(tensor.shape) != len(tensor.strides) or len(tensor.shape) > _MAX_AXES:
        raise UserError(f"{path} is damaged: the tensor {name} has no shape. Use a whole file")
    values = np.frombuffer(storages.get(tensor.storage, b""), np.uint8)
    values = values[: len(values) // dtype.itemsize * dtype.itemsize].view(dtype)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((length - 1) * stride for length, stride in steps)
    is_empty = 0 in tensor.shape and max(tensor.shape) <= _MAX_EMPTY
    if min((tensor.offset, *tensor.shape, *tensor.strides)) < 0 or not (last < len(values) or is_empty):
        raise UserError(f"{path} is damaged: the tensor {name} lies outside of its values. Use a whole file")
    if is_empty:
        return np.zeros(tensor.shape, dtype)
    strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
    return np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, strides, writeable=False).copy()
