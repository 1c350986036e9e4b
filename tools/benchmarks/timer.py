"""Median seconds of several functions, called alternately."""

import statistics
import time
from collections.abc import Callable
from typing import Any


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
