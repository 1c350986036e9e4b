"""Seconds of several things, one after the other and again."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of every call, over rounds that run all of them, in an order that alternates.

    In every round each is called once before the call that counts: caches, and memory that went back to the system
    meanwhile, are then as they are in a training run, where a step follows a step like it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            calls[name]()
            began = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}
