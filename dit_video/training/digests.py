"""Digests of arrays: of checkpoints when they are written and read, and of batches in the hash chain."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32


def compute_digests(arrays: Mapping[str, Array]) -> dict[str, int]:
    """Return the digest of each array by its path, in all processes; it is the same on every mesh."""
    # One array at a time: on CPUs, concurrent multi-device programs may deadlock.
    return {path: int(compute_digest(array)) for path, array in arrays.items()}


@jax.jit
def compute_digest(array: Array) -> UInt32[Array, ""]:
    """Return the sum of the bits of all values, mixed with their position, modulo 2^32.

    Without the mixing, equal values whose low bits are zero may have the digest of zeros.
    """
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_:
        words = array.astype(jnp.uint32)
    else:
        unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
        words = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    position = number_values(words.shape)
    return jnp.sum(mix_bits(words ^ mix_bits(position + jnp.uint32(1))), dtype=jnp.uint32)


def number_values(shape: tuple[int, ...], *, start: int = 0) -> UInt32[Array, "..."]:
    """Return the index of each value in row-major order, after `start` times their number, modulo 2^32."""
    position = jnp.full(shape, start, jnp.uint32)
    for axis, size in enumerate(shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return position


def mix_bits(words: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Mix the bits of each word, so that each depends on all others, by the finalizer of MurmurHash3."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
