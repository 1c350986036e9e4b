"""Tensors in PyTorch's files: archives of `torch.save`, its older format, and TorchScript; no code in them is run."""

import io
import math
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from dit_video.core.errors import MissingError, UserError
from dit_video.weights.safetensors import save

_MODULE_PREFIX = "__torch__"
"""Prefix of the names of classes that TorchScript compiles."""
_CONTAINER_FUNCTIONS = (
    "torch.jit._pickle.build_boollist",
    "torch.jit._pickle.build_doublelist",
    "torch.jit._pickle.build_intlist",
    "torch.jit._pickle.build_tensorlist",
    "torch.jit._pickle.restore_type_tag",
    "torch.Size",
    "torch._utils._rebuild_parameter",
)
"""Functions that return their first argument, except for its type."""
_TENSOR_FUNCTIONS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_IGNORED_PREFIXES = ("torch.float", "torch.bfloat", "torch.int", "torch.uint", "torch.bool", "torch.device")
"""Prefixes of names of constants and classes that say nothing about the tensors' values."""


class StoredTensor(NamedTuple):
    """A tensor of a file: a view of one of its storages."""

    storage: str
    """Key of the storage in the file."""
    dtype: str
    """PyTorch's class of the storage, such as `FloatStorage`."""
    offset: int
    """Position of the first value in the storage."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Distance between neighbours along each axis, in values."""


class _Name(NamedTuple):
    """A name that a pickle refers to, as a class or a function."""

    name: str


class _Storage(NamedTuple):
    key: str
    dtype: str


_MARK = object()
"""Position on the stack where a container's content begins."""
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NEW_CONTAINERS: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_VALUES = frozenset(
    (
        *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING"),
        *("BINBYTES", "SHORT_BINBYTES"),
    )
)
"""Instructions that push their own argument."""
_SMALL_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_KEYS = (str, int, float, bool, bytes, type(None))
"""Allowed types of dictionary keys; hashing nested tuples could take arbitrarily long."""
_MAX_WHOLE_NUMBER = 1 << 63
_DAMAGES = (
    *(ValueError, IndexError, KeyError, TypeError, AttributeError, EOFError),
    *(OverflowError, MemoryError, RecursionError, struct.error),
)
"""Errors of instructions that do not follow the format."""


def parse_pickle(file: BufferedIOBase, *, name: str) -> Any:
    """Return the containers of the pickle at the file's position, with `StoredTensor` for tensors.

    Afterwards the file's position is behind the pickle.

    Args:
      file: The file.
      name: Name of the file in errors.

    Raises:
      UserError: If the pickle is damaged, or names anything but tensors and plain containers.
    """
    machine = _Machine(name)
    try:
        for instruction, argument, _ in pickletools.genops(cast(IO[bytes], file)):
            machine.run(instruction.name, argument)
    except _DAMAGES as error:
        raise UserError(
            f"{name} is damaged: its pickle does not follow the format ({error}). Use a whole file"
        ) from error
    return machine.result


class _Machine:
    """The stack and the memory of a pickle."""

    def __init__(self, name: str):
        self.result: Any = None
        self._name = name
        self._stack: list[Any] = []
        self._memory: dict[int, Any] = {}

    def run(self, instruction: str, argument: Any) -> None:
        """Run one instruction.

        Raises:
          UserError: If the instruction could run code.
        """
        stack = self._stack
        if instruction in _VALUES:
            stack.append(argument)
        elif instruction in _CONSTANTS:
            stack.append(_CONSTANTS[instruction])
        elif instruction in _NEW_CONTAINERS:
            stack.append(_NEW_CONTAINERS[instruction]())
        elif instruction in _SMALL_TUPLES:
            count = _SMALL_TUPLES[instruction]
            stack[-count:] = [tuple(stack[-count:])]
        elif instruction in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memory[int(argument)] = stack[-1]
        elif instruction in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memory[int(argument)])
        elif instruction not in ("PROTO", "FRAME"):
            self._run_step(instruction, argument)

    def _run_step(self, instruction: str, argument: Any) -> None:
        """Run an instruction that changes what is on the stack."""
        stack = self._stack
        match instruction:
            case "MARK":
                stack.append(_MARK)
            case "MEMOIZE":
                self._memory[len(self._memory)] = stack[-1]
            case "TUPLE":
                stack.append(tuple(self._pop_marked()))
            case "LIST":
                stack.append(self._pop_marked())
            case "DICT":
                stack.append(_pair(self._pop_marked()))
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                values = self._pop_marked()
                stack[-1].extend(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1].update(_pair([key, value]))
            case "SETITEMS":
                values = self._pop_marked()
                stack[-1].update(_pair(values))
            case "GLOBAL":
                stack.append(self._check_name(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self._check_name(".".join((module, name))))
            case "BINPERSID":
                stack.append(_make_storage(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._rebuild(function.name, arguments))
            case "BUILD":
                state = stack.pop()
                if isinstance(state, dict) and isinstance(stack[-1], dict) and "_metadata" not in state:
                    stack[-1].update(state)
            case "STOP":
                self.result = stack.pop()
            case _:
                raise self._refuse(f"the instruction {instruction}")

    def _pop_marked(self) -> list[Any]:
        """Pop the values behind the last mark."""
        stack = self._stack
        start = next((place for place in range(len(stack) - 1, -1, -1) if stack[place] is _MARK), None)
        if start is None:
            raise IndexError("a mark is missing")
        values = stack[start + 1 :]
        del stack[start:]
        return values

    def _check_name(self, name: str) -> _Name:
        accepted = (*_TENSOR_FUNCTIONS, *_CONTAINER_FUNCTIONS, "collections.OrderedDict")
        is_storage = name.startswith("torch.") and name.endswith("Storage")
        if name in accepted or is_storage or name.startswith((_MODULE_PREFIX, *_IGNORED_PREFIXES)):
            return _Name(name)
        raise self._refuse(name)

    def _rebuild(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Return the value that a call stands for, without calling anything."""
        if name in _TENSOR_FUNCTIONS:
            storage, offset, shape, strides = arguments[:4]
            if not all(type(each) is int and abs(each) < _MAX_WHOLE_NUMBER for each in (offset, *shape, *strides)):
                raise ValueError("a shape has other values than whole numbers")
            return StoredTensor(storage.key, storage.dtype, offset, tuple(shape), tuple(strides))
        if name in _CONTAINER_FUNCTIONS:
            return arguments[0]
        if name == "collections.OrderedDict":
            return _pair([each for pair in arguments[0] for each in pair]) if arguments else {}
        if name.startswith(_MODULE_PREFIX):
            return {}
        if name.startswith(_IGNORED_PREFIXES):
            return None
        raise self._refuse(f"a call of {name}")

    def _refuse(self, what: str) -> UserError:
        return UserError(
            f"{self._name} is invalid: its pickle has {what}, which is neither a tensor nor a plain container, and "
            "could run code. Use a file of tensors alone, such as that of torch.save(model.state_dict(), path)"
        )


def _pair(values: list[Any]) -> dict[Any, Any]:
    """Return the dictionary of alternating keys and values."""
    keys = values[::2]
    if not all(type(key) in _KEYS and (type(key) is not int or abs(key) < _MAX_WHOLE_NUMBER) for key in keys):
        raise TypeError("a dictionary has other keys than names and numbers")
    return dict(zip(keys, values[1::2], strict=True))


def _make_storage(persistent_id: tuple[Any, ...]) -> _Storage:
    """Return the storage that a pickle refers to: `("storage", class, key, device, count)`, and a view or None."""
    kind, dtype, key, *rest = persistent_id
    if kind != "storage" or any(rest[2:]) or type(key) not in (str, int):
        raise ValueError("it refers to something else than a storage")
    return _Storage(str(key), dtype.name.rsplit(".", 1)[-1])


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
"""Maximum depth of nested containers, and maximum number of entries in all of them: a short pickle can name one list
any number of times."""
_MAX_COPIES = 16
"""Maximum size of all tensors, as a multiple of the values that the file stores: views share values, as tied weights
do."""
_MAX_AXES, _MAX_EMPTY = 32, 1 << 31
"""Maximum number of axes, and length of an axis of a tensor without values."""
_ARCHIVE_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError),
    *(NotImplementedError, RuntimeError, OverflowError, MemoryError),
)
"""Errors of `zipfile` on damaged, encrypted or unknown archives."""


def read_torch_tensors(path: str | os.PathLike) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Return all tensors of a PyTorch file by their names, with the keys of nested containers joined by dots.

    It reads state dicts that `torch.save` wrote, alone or within dictionaries and lists, in the current format or the
    one before PyTorch 1.6, and files of `torch.jit.save`. No code in the file is run; see `parse_pickle`.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file is damaged, of another format, or holds anything but tensors and plain containers.
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
      source: The file.
      destination: A safetensors file that does not exist.
      dtype: Dtype that floating tensors are cast to; None keeps theirs.

    Raises:
      MissingError: If the source does not exist.
      UserError: If `read_torch_tensors` refuses the source, or the destination exists or has another suffix.
    """
    destination = Path(destination)
    is_there = destination.resolve().exists()  # otherwise new/../old does not exist until new is made
    if is_there or destination.suffix != ".safetensors":
        rule = "exists" if is_there else "has another suffix"
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
    """Check that an archive's parts are uncompressed and do not overlap, so that they are no larger than the archive.

    Raises:
      UserError: If a part is compressed, or the parts are larger than the file.
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
    """A file that allocates no more than its rest when it reads, whatever length a pickle states."""

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
      UserError: If views repeat values more often.
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
