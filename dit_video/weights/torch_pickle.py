"""A parser of the pickles in PyTorch's files, which runs nothing of them.

A pickle is a program for a stack machine. Python's own machine imports what a pickle names and calls it. This one knows
the instructions that build plain containers, and treats the few functions that PyTorch's files name as data: what
rebuilds a tensor becomes a `StoredTensor`. Any other name is an error.
"""

import pickletools
import struct
from collections.abc import Callable
from io import BufferedIOBase
from typing import IO, Any, NamedTuple, cast

from dit_video.core.errors import UserError

_MODULE_PREFIX = "__torch__"
"""Beginning of the names of the classes that TorchScript compiles."""
_CONTAINER_FUNCTIONS = (
    "torch.jit._pickle.build_boollist",
    "torch.jit._pickle.build_doublelist",
    "torch.jit._pickle.build_intlist",
    "torch.jit._pickle.build_tensorlist",
    "torch.jit._pickle.restore_type_tag",
    "torch.Size",
    "torch._utils._rebuild_parameter",
)
"""Functions whose result is their first argument, but for its type."""
_TENSOR_FUNCTIONS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_IGNORED_PREFIXES = ("torch.float", "torch.bfloat", "torch.int", "torch.uint", "torch.bool", "torch.device")
"""Beginnings of the names of constants and classes that say nothing about the tensors' values."""


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
    """Distance of neighbours along each axis, in values."""


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
"""Types of keys of dictionaries; the hash of nested tuples could take any time."""
_MAX_WHOLE_NUMBER = 1 << 63
_DAMAGES = (
    *(ValueError, IndexError, KeyError, TypeError, AttributeError, EOFError),
    *(OverflowError, MemoryError, RecursionError, struct.error),
)
"""Errors of instructions that do not follow the format."""


def parse_pickle(file: BufferedIOBase, *, name: str) -> Any:
    """Return the containers of the pickle at the file's position, with `StoredTensor` for tensors.

    The position is then behind the pickle.

    Args:
      file: the file.
      name: name of the file in errors.

    Raises:
      UserError: the pickle is damaged, or names anything but tensors and plain containers.
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
          UserError: the instruction could run code.
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
    """Return the dictionary of keys and values in turn."""
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
