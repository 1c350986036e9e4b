"""Arrays of the devices on the host: small ones whole, large ones part by part and in the first process only.

A part is replicated for a moment, since JAX has no collective that gathers to one process: a device holds one part
more, and of the processes only the first one copies it to its host. Weights are written so while they are gathered.
Only an array that is sharded along its first axis, which stacks of layers are not, is replicated whole for each part.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from dit_video.weights.safetensors import StreamedArray

MAX_PART_BYTES = 64_000_000
"""Largest size of a part in bytes, unless a single row of the array is larger."""


def to_host(tree: Any) -> Any:
    """Return all values of small arrays in every process, as NumPy arrays; all processes of a run call this."""
    return jax.tree.map(lambda leaf: np.asarray(_replicate(leaf) if _is_sharded(leaf) else leaf), tree)


def is_first_process() -> bool:
    """Return True in the process that gathers and writes."""
    return jax.process_index() == 0


@dataclass(frozen=True)
class GatheredArray(StreamedArray):
    """An array on devices, whose parts are gathered while they are read, in the same order by all processes.

    In processes other than the first one the parts have no values: they are zero, and take no memory.
    """

    array: Any = None
    """The array, on devices of all processes or of this one, or on the host."""

    @staticmethod
    def from_array(array: Any, *, max_bytes: int = MAX_PART_BYTES) -> "GatheredArray":
        """Return the parts of an array of up to `max_bytes` each."""
        read_chunks = functools.partial(_gather_chunks, array, max_bytes)
        return GatheredArray(tuple(array.shape), np.dtype(array.dtype), read_chunks, array)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return a part along the first axis, such as the parameters of a layer."""
        return _gather_rows(self.array, index, 1)[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return the whole array."""
        whole = _read_part(_replicate(self.array) if _is_sharded(self.array) else self.array)
        return whole if dtype is None else whole.astype(dtype)


def gather_parts(tree: Any) -> Any:
    """Return a tree of arrays that are gathered to the first process while they are read, part by part."""
    return jax.tree.map(GatheredArray.from_array, tree)


def _gather_chunks(array: Any, max_bytes: int) -> Iterator[np.ndarray]:
    row_bytes = math.prod(array.shape[1:]) * array.dtype.itemsize
    count = array.shape[0] if array.ndim else 1
    rows = max(1, max_bytes // max(1, row_bytes))
    if not isinstance(array, jax.Array) or rows >= count:
        yield np.asarray(GatheredArray.from_array(array))
        return
    for start in range(0, count, rows):
        # A part at the end overlaps the one before it, so that one program serves all parts.
        first = min(start, count - rows)
        yield _gather_rows(array, first, rows)[start - first :]


def _gather_rows(array: Any, first: int, rows: int) -> np.ndarray:
    if not isinstance(array, jax.Array):
        return array[first : first + rows]
    return _read_part(_slice_rows(array, np.int32(first), rows, array.sharding, _get_replicated(array)))


def _read_part(part: Any) -> np.ndarray:
    """Return the values of a part in the first process, and zeros without memory in the others."""
    if is_first_process() or not isinstance(part, jax.Array):
        return np.asarray(part)
    jax.block_until_ready(part)  # Otherwise this process would run ahead, and its devices hold many parts.
    return np.broadcast_to(np.zeros((), part.dtype), part.shape)


def _is_sharded(array: Any) -> bool:
    return isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated


def _get_replicated(array: Array) -> Any:
    sharding = array.sharding
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


def _replicate(array: Array) -> Array:
    return jax.jit(lambda values: values, out_shardings=_get_replicated(array))(array)


@functools.partial(jax.jit, static_argnames=("rows", "sharding", "replicated"))
def _slice_rows(array: Array, first: Any, rows: int, sharding: Any, replicated: Any) -> Array:
    part = jax.lax.dynamic_slice_in_dim(array, first, rows)
    if isinstance(sharding, NamedSharding) and not (sharding.spec and sharding.spec[0]):
        # Otherwise XLA would replicate the array, and slice it then.
        part = jax.lax.with_sharding_constraint(part, sharding)
    return jax.lax.with_sharding_constraint(part, replicated)
