"""Arrays of a checkpoint: their description, their digests, and the comparison with those of a state."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, UInt32

from dit_video.core.errors import UserError


def compute_digests(arrays: Mapping[str, Array], *, is_mixed: bool = True) -> dict[str, int]:
    """Return the digest of each array, in all processes; it is the same on every mesh.

    Args:
      arrays: Arrays by their paths.
      is_mixed: Whether bits are mixed, as in checkpoints of format 2. Without that, equal values whose low bits are
        zero may have the digest of zeros.
    """
    # One array at a time: on CPUs, concurrent multi-device programs may deadlock.
    return {path: int(compute_digest(array, is_mixed=is_mixed)) for path, array in arrays.items()}


@functools.partial(jax.jit, static_argnames="is_mixed")
def compute_digest(array: Array, *, is_mixed: bool = True) -> UInt32[Array, ""]:
    """Return the sum of the bits of all values, mixed or weighted with their position, modulo 2^32."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_:
        words = array.astype(jnp.uint32)
    else:
        unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
        words = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    position = number_values(words.shape)
    words = mix_bits(words ^ mix_bits(position + jnp.uint32(1))) if is_mixed else words * (2 * position + 1)
    return jnp.sum(words, dtype=jnp.uint32)


def number_values(shape: tuple[int, ...], *, start: int = 0) -> UInt32[Array, "..."]:
    """Return the index of each value in row-major order, after `start` times their number, modulo 2^32."""
    position = jnp.full(shape, start, jnp.uint32)
    for axis, size in enumerate(shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return position


def mix_bits(words: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Return words each bit of which depends on all bits of one word, by the finalizer of MurmurHash3."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def describe_array(leaf: Any) -> dict[str, Any]:
    """Return the shape and dtype of an array as JSON."""
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def make_target(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return the shape, dtype and sharding of an array to be read; without a sharding, on the first device."""
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def check_arrays(
    folder: Path | epath.Path, stored: Mapping[str, Any], expected: Mapping[str, Any], config_difference: str
) -> None:
    """Raise a user error with the first difference between the arrays of a checkpoint and those of the state.

    `config_difference` names the fields of the config that differ, or is empty.
    """
    differences = [f"it lacks {path}" for path in expected if path not in stored]
    differences += [f"it has {path}, which this run does not" for path in stored if path not in expected]
    for path, leaf in expected.items():
        here = describe_array(leaf)
        there = {name: stored[path][name] for name in here} if path in stored else here
        if there != here:
            before, now = ("{dtype}{shape}".format_map(each) for each in (there, here))
            differences.append(f"{path} is {before} there and {now} here")
    if differences:
        count_note = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
        config_note = f"; config: {config_difference}" if config_difference else ""
        details = f"{differences[0]}{count_note}{config_note}. Use the config of its run, or another folder."
        raise UserError(f"checkpoint {folder} has another config: {details}")
