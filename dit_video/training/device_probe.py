"""Speed of this process's devices, each by itself: a small program that is timed on one after the other.

All devices of a training end a step at the same time, because each waits for the slowest. So a device that is slow,
such as one that is throttled because it is hot, is only seen by work that it does alone.
"""

import functools
import time

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_SIDES = {"cpu": 192}
"""Sides of the matrices by platform."""
_DEFAULT_SIDE = 2048
_TARGET_SECONDS = 0.002
"""Time of the program on the first device, far above the time in which a program is started."""
_REPEATS = 3
_MAX_PRODUCTS = 10_000


@jax.jit
def _multiply(matrix: Float[Array, "n n"], count: Int[Array, ""] | int) -> Float[Array, "n n"]:
    # The mean keeps the values in range; the number of products is traced, so that there is one program.
    return jax.lax.fori_loop(0, count, lambda _, value: value @ matrix / matrix.shape[0], matrix)


class DeviceProbe:
    """A timed program for each device of this process."""

    def __init__(self) -> None:
        self._count = 0

    @functools.cached_property
    def _matrices(self) -> list[Float[Array, "n n"]]:
        devices = jax.local_devices()
        side = _SIDES.get(devices[0].platform, _DEFAULT_SIDE)
        dtype = jnp.float32 if devices[0].platform == "cpu" else jnp.bfloat16
        return [jax.device_put(jnp.ones((side, side), dtype), device) for device in devices]

    def prepare(self) -> None:
        """Compile the program, and choose its length by the first device."""
        if self._count:
            return
        for matrix in self._matrices:
            _multiply(matrix, 1).block_until_ready()
        trial = 4
        self._count = max(1, min(_MAX_PRODUCTS, round(trial * _TARGET_SECONDS / self._time(self._matrices[0], trial))))

    def measure(self) -> list[float]:
        """Return the microseconds of one product on each device, which should be idle: the least of a few runs."""
        self.prepare()
        seconds = [min(self._time(matrix, self._count) for _ in range(_REPEATS)) for matrix in self._matrices]
        return [1e6 * each / self._count for each in seconds]

    @staticmethod
    def _time(matrix: Float[Array, "n n"], count: int) -> float:
        start_time = time.perf_counter()
        _multiply(matrix, count).block_until_ready()
        return time.perf_counter() - start_time
