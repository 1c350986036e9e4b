"""Values made ahead by a thread."""

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

ENDLESS = 1 << 40
"""Elements. Grain's data sets have a length."""

Value = TypeVar("Value")


def prefetch(values: Iterator[Value], *, depth: int = 2) -> Generator[Value, None, None]:
    """The same values, made ahead by a thread: `depth` of them wait.

    Args:
      values: their errors are raised here, in their place.
      depth: how many wait.
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
        except Exception as error:  # raised again where the value is asked for
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
