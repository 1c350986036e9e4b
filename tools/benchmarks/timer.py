"""Seconds of functions: medians, and budgets that measurements end with."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from dit_video.core.errors import UserError

_MIN_SECONDS, _MAX_SECONDS = 0.1, 3.0
"""Seconds that a queue of calls takes at least, and after which a measurement of several such queues ends."""


def time_median(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median seconds of every function, over rounds that call all of them in alternating order.

    In every round each function is called once before the call that counts, so that caches and memory are as in a
    training run, where a step follows another step of the same kind.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            calls[name]()
            start_time = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start_time)
    return {name: statistics.median(values) for name, values in seconds.items()}


class TimeBudget:
    """Seconds that measurements may take from now on.

    Args:
      seconds: The budget.
      clock: Function that returns the time in seconds.
    """

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic):
        self._end, self._clock = clock() + seconds, clock

    @property
    def remaining(self) -> float:
        """Return the seconds that remain, 0 if none do."""
        return max(0.0, self._end - self._clock())

    @property
    def is_spent(self) -> bool:
        return not self.remaining

    def check(self) -> None:
        """Raise an error if it is spent.

        Raises:
          UserError: If the budget is spent.
        """
        if self.is_spent:
            raise UserError("the time was spent")


def time_repeated(call: Callable[[], Any], budget: TimeBudget, *, repeats: int) -> float:
    """Return the median seconds of a function of a device, which is compiled and called once before.

    Short calls are queued on the device, so that the time of starting one does not count. The measurement ends early,
    after at least one value, when it takes long or the budget is spent.
    """
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    queued = max(1, math.ceil(_MIN_SECONDS / (time.perf_counter() - start)))
    seconds: list[float] = []
    while not seconds or (len(seconds) < repeats and queued * sum(seconds) < _MAX_SECONDS and not budget.is_spent):
        start, result = time.perf_counter(), None
        for _ in range(queued):
            result = call()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - start) / queued)
    return statistics.median(seconds)
