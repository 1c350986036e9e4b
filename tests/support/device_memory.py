"""Memory of devices, as the arrays that are on them."""

import math

import jax


def count_bytes() -> dict[jax.Device, int]:
    """Return the bytes of all arrays on each device."""
    counts = dict.fromkeys(jax.devices(), 0)
    for array in jax.live_arrays():
        # `shard.data` would be a further array that is alive.
        shard_bytes = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for device in array.sharding.device_set:
            counts[device] += shard_bytes
    return counts
