"""A parameter that is loaded in chunks: host memory holds one chunk of it at a time."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from dit_video.core.offload import Offload, get_host_sharding
from dit_video.weights.safetensors import StreamedArray

_MAX_HOST_BYTES = 16_000_000
"""Maximum size in bytes of a parameter that is assembled on the host.

Compiling a device program that joins the chunks would take longer.
"""


@dataclass(frozen=True)
class Parameter(StreamedArray):
    """A parameter that is still in its files; its chunks are layers, some rows, or the whole array."""

    @staticmethod
    def from_array(array: Any) -> "Parameter":
        """Return the parameter of an array in memory."""
        return Parameter(tuple(array.shape), np.dtype(array.dtype), lambda: iter([np.asarray(array)]))

    def to_host(self) -> np.ndarray:
        """Read the parameter to the host."""
        return self._join(self._iterate_chunks())

    def to_device(self, sharding: Sharding | None = None) -> jax.Array:
        """Read the parameter to devices, or to the default device without a sharding.

        A large parameter is allocated there and filled with one chunk after the other, each before the next one is
        read.
        """
        remaining = self._iterate_chunks()
        first = next(remaining)
        chunks = itertools.chain([first], remaining)
        if self.nbytes <= _MAX_HOST_BYTES or first[1].shape == self.shape:
            array = self._join(chunks)
            if sharding is None:
                return jax.block_until_ready(jnp.asarray(array))
            return jax.block_until_ready(jax.make_array_from_callback(self.shape, sharding, lambda index: array[index]))
        if sharding is None:
            return self._write_shards({None: (slice(None),) * len(self.shape)}, chunks)[None]
        shards = self._write_shards(sharding.addressable_devices_indices_map(self.shape), chunks)
        return jax.make_array_from_single_device_arrays(self.shape, sharding, list(shards.values()))

    def to_host_memory(self, sharding: Sharding | None = None) -> jax.Array:
        """Read the parameter to host memory that devices copy from; see `core.offload`.

        Args:
          sharding: Sharding on the devices that it is copied to; the default device if None.
        """
        array, host = self.to_host(), get_host_sharding(sharding)
        return jax.block_until_ready(jax.make_array_from_callback(self.shape, host, lambda index: array[index]))

    def _write_shards(self, shard_indices: Any, chunks: Iterator[tuple[int, np.ndarray]]) -> dict[Any, jax.Array]:
        """Return the shard of every device, given the index of each shard in the parameter."""
        shards: dict[Any, jax.Array] = {}
        rows: dict[Any, tuple[int, int]] = {}
        for device, shard_index in shard_indices.items():
            bounds = [axis.indices(size)[:2] for axis, size in zip(shard_index, self.shape, strict=True)]
            shards[device] = jnp.zeros([end - begin for begin, end in bounds], self.dtype, device=device)
            rows[device] = bounds[0]
        for start, chunk in chunks:
            for device, (first, last) in rows.items():
                # The rows that the chunk and the shard have in common, counted in the parameter.
                begin, end = max(first, start), min(last, start + len(chunk))
                if begin < end:
                    overlap = chunk[(slice(begin - start, end - start), *shard_indices[device][1:])]
                    overlap = jax.device_put(overlap, device)
                    shards[device] = _update_rows(shards[device], overlap, np.int32(begin - first))
            # Otherwise transfers queue up, and the host would hold many chunks.
            jax.block_until_ready(list(shards.values()))
        return shards

    def _join(self, chunks: Iterator[tuple[int, np.ndarray]]) -> np.ndarray:
        joined: np.ndarray | None = None
        for start, chunk in chunks:
            if chunk.shape == self.shape:
                return np.asarray(chunk, order="C")
            if joined is None:
                joined = np.empty(self.shape, self.dtype)
            joined[start : start + len(chunk)] = chunk
        assert joined is not None
        return joined

    def _iterate_chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the chunks in the parameter's dtype, each with the row at which it starts."""
        start = 0
        for chunk in self.read_chunks():
            yield start, chunk.astype(self.dtype, copy=False)
            start += len(chunk) if chunk.ndim else 1


Placement = Callable[[str, Parameter], Any]
"""Function that reads a parameter to its destination, given its path and the parameter."""


def place_on_host(path: str, parameter: Parameter) -> np.ndarray:
    """Read a parameter to host memory; the default placement."""
    return parameter.to_host()


def place_on_device(path: str, parameter: Parameter) -> jax.Array:
    """Read a parameter to the default device."""
    return parameter.to_device()


def place_in_host_memory(path: str, parameter: Parameter) -> jax.Array:
    """Read a parameter to host memory that the default device copies from."""
    return parameter.to_host_memory()


def get_placement(offload: Offload | None) -> Placement:
    """Return the placement of weights for one device: on it, or in host memory with `offload`."""
    return place_on_device if offload is None else place_in_host_memory


@partial(jax.jit, donate_argnums=0)
def _update_rows(array: jax.Array, rows: jax.Array, start: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, rows, start, axis=0)
