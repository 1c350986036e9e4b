"""Values that all processes of a run pass to each other, as JSON and arrays: nothing is pickled."""

import dataclasses
import importlib
import json
import operator
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import numpy as np
import safetensors.numpy
from jax.experimental import multihost_utils

from dit_video.core.errors import UserError
from dit_video.core.registry import get_class_name
from dit_video.distributed.processes import wait_for_all_processes

T = TypeVar("T")
_PART_BYTES = 2**26
"""Number of bytes that all devices receive at once."""
_STRUCTURE = "structure"
"""Name of the array that holds the JSON."""


def broadcast_values(value: T) -> Iterator[T]:
    """Yield the values of all processes, in their order, in each process; all of them call this.

    The values travel one after another, so that a process holds its own and one more. Errors of one process would leave
    the others waiting: pass them as values.

    Args:
      value: What `encode` takes.

    Raises:
      TypeError: If it holds anything else.
    """
    if jax.process_count() == 1:
        yield value
        return
    wait_for_all_processes()
    own = np.frombuffer(encode(value), np.uint8)
    for process in range(jax.process_count()):
        is_source = process == jax.process_index()
        # JAX sends 32 bits of a number.
        whole, rest = _broadcast(np.array(divmod(len(own), _PART_BYTES), np.int32), is_source=is_source).tolist()
        sizes = [_PART_BYTES] * whole + [rest] * (rest > 0)
        data = own if is_source else np.zeros(sum(sizes), np.uint8)
        parts = np.split(data, np.cumsum(sizes, axis=0)[:-1])
        yield decode(b"".join(_broadcast(part, is_source=is_source).tobytes() for part in parts))


def encode(value: Any) -> bytes:
    """Return a value as safetensors: its arrays, and its structure in JSON.

    Args:
      value: An array, a JSON scalar, a `UserError`, or a list, tuple, dict with string keys, NamedTuple or dataclass of
        such values.

    Raises:
      TypeError: If it holds anything else.
    """
    arrays: dict[str, np.ndarray] = {}
    structure = json.dumps(_describe(value, arrays)).encode()
    return safetensors.numpy.save({**arrays, _STRUCTURE: np.frombuffer(structure, np.uint8)})


def decode(content: bytes) -> Any:
    """Return the value that another process of this program has encoded."""
    arrays = safetensors.numpy.load(content)
    return _rebuild(json.loads(arrays[_STRUCTURE].tobytes()), arrays)


def _broadcast(array: np.ndarray, *, is_source: bool) -> np.ndarray:
    return np.asarray(multihost_utils.broadcast_one_to_all(array, is_source=is_source))


def _describe(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Return the JSON of a value, whose containers and arrays are objects of one key; add its arrays to `arrays`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray | np.generic):
        name = str(len(arrays))
        arrays[name] = np.ascontiguousarray(value).reshape(np.shape(value))  # also of no dimensions
        return {"array": name}
    if isinstance(value, list):
        return [_describe(item, arrays) for item in value]
    if isinstance(value, dict):
        return {"dict": {name: _describe(item, arrays) for name, item in value.items()}}
    if type(value) is tuple:
        return {"tuple": [_describe(item, arrays) for item in value]}
    if isinstance(value, tuple | UserError):
        items = value if isinstance(value, tuple) else value.args
        return {get_class_name(type(value)): [_describe(item, arrays) for item in items]}
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {get_class_name(type(value)): {name: _describe(item, arrays) for name, item in fields.items()}}
    raise TypeError(f"processes cannot pass each other a {type(value).__name__}")


def _rebuild(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_rebuild(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "array":
        return arrays[content][()]  # a number for no dimensions
    if isinstance(content, dict):
        fields = {name: _rebuild(item, arrays) for name, item in content.items()}
        return fields if kind == "dict" else _find_class(kind)(**fields)
    items = [_rebuild(item, arrays) for item in content]
    return tuple(items) if kind == "tuple" else _find_class(kind)(*items)


def _find_class(name: str) -> type:
    module, _, qualname = name.partition(":")
    return operator.attrgetter(qualname)(importlib.import_module(module))
