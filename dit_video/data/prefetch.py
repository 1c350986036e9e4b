"""Prefetching of an iterator's values in a background thread."""

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

ENDLESS_LENGTH = 1 << 40
"""Length of endless data sets, as Grain requires a length."""

Value = TypeVar("Value")


def prefetch(values: Iterator[Value], *, depth: int = 2) -> Generator[Value, None, None]:
    """Yield the same values, computed ahead by a thread.

    Args:
      values: the iterator; its errors are raised here, in the order of the values.
      depth: number of values that are kept ready.
    """
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def offer(kind: str, value: Any) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((kind, value), timeout=0.1)
                return

    def work() -> None:
        try:
            for value in values:
                offer("value", value)
                if stop.is_set():
                    return
            offer("end", None)
        except Exception as error:  # raised again by the consumer
            offer("error", error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stop.set()
        thread.join(timeout=5)
