"""A parameter on its way from files to where it is kept: host memory holds one piece of it at a time."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

_AT_ONCE = 16_000_000
"""bytes: what is smaller is put together on the host, as a device's program for its pieces would cost more"""


@dataclass(frozen=True)
class Parameter:
    """One that still lies in its files."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterator[np.ndarray]]
    """reads it, in stretches of its first axis: a layer of a stack each, or some rows; or all of it at once"""

    @staticmethod
    def of(array: Any) -> "Parameter":
        """One that is in memory."""
        return Parameter(tuple(array.shape), np.dtype(array.dtype), lambda: iter([np.asarray(array)]))

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def array(self) -> np.ndarray:
        """On the host."""
        return self._joined(self._stretches())

    def on(self, sharding: Sharding | None = None) -> jax.Array:
        """Laid out on devices; None is the default device.

        A large one is made there and its pieces are written into it, each before the next is read.
        """
        stretches = self._stretches()
        first = next(stretches)
        whole = itertools.chain([first], stretches)
        if self.nbytes <= _AT_ONCE or first[1].shape == self.shape:
            array = self._joined(whole)
            if sharding is None:
                return jax.block_until_ready(jnp.asarray(array))
            return jax.block_until_ready(jax.make_array_from_callback(self.shape, sharding, lambda index: array[index]))
        if sharding is None:
            return self._written({None: (slice(None),) * len(self.shape)}, whole)[None]
        shards = self._written(sharding.addressable_devices_indices_map(self.shape), whole)
        return jax.make_array_from_single_device_arrays(self.shape, sharding, list(shards.values()))

    def _written(self, places: Any, stretches: Iterator[tuple[int, np.ndarray]]) -> dict[Any, jax.Array]:
        """Every device's part of the whole, by its device; `places` says where each lies in it."""
        shards: dict[Any, jax.Array] = {}
        rows: dict[Any, tuple[int, int]] = {}
        for device, index in places.items():
            bounds = [axis.indices(size)[:2] for axis, size in zip(index, self.shape, strict=True)]
            shards[device] = jnp.zeros([end - begin for begin, end in bounds], self.dtype, device=device)
            rows[device] = bounds[0]
        for start, piece in stretches:
            for device, (first, last) in rows.items():
                begin, end = max(first, start), min(last, start + len(piece))
                if begin < end:
                    part = piece[(slice(begin - start, end - start), *places[device][1:])]
                    shards[device] = _write(shards[device], jax.device_put(part, device), np.int32(begin - first))
            jax.block_until_ready(list(shards.values()))
        return shards

    def _joined(self, stretches: Iterator[tuple[int, np.ndarray]]) -> np.ndarray:
        whole: np.ndarray | None = None
        for start, piece in stretches:
            if piece.shape == self.shape:
                return np.asarray(piece, order="C")
            if whole is None:
                whole = np.empty(self.shape, self.dtype)
            whole[start : start + len(piece)] = piece
        assert whole is not None
        return whole

    def _stretches(self) -> Iterator[tuple[int, np.ndarray]]:
        """The pieces, in the parameter's dtype, each with where it begins."""
        start = 0
        for piece in self.pieces():
            yield start, piece.astype(self.dtype, copy=False)
            start += len(piece) if piece.ndim else 1


Place = Callable[[str, Parameter], Any]
"""From a path and its parameter to what is kept of it."""


def on_host(path: str, parameter: Parameter) -> np.ndarray:
    """A parameter in the host's memory, as it is kept if nothing else is said."""
    return parameter.array()


def on_device(path: str, parameter: Parameter) -> jax.Array:
    """A parameter on the default device."""
    return parameter.on()


@partial(jax.jit, donate_argnums=0)
def _write(whole: jax.Array, part: jax.Array, start: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)
