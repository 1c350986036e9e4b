"""Python objects of all processes of a run."""

import pickle
from collections.abc import Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dit_video.distributed.processes import wait_for_all_processes

T = TypeVar("T")
_PART_BYTES = 2**26
"""Number of bytes that all devices receive at once."""


def broadcast_objects(value: T) -> Iterator[T]:
    """Yield the values of all processes, in their order, in each process; all of them call this.

    The values travel one after another, so that a process holds its own and one more. Errors of one process would leave
    the others waiting: pass them as values.

    Args:
      value: an object that can be pickled.
    """
    if jax.process_count() == 1:
        yield value
        return
    wait_for_all_processes()
    own = np.frombuffer(pickle.dumps(value), np.uint8)
    for process in range(jax.process_count()):
        is_source = process == jax.process_index()
        # JAX sends 32 bits of a number.
        whole, rest = _broadcast(np.array(divmod(len(own), _PART_BYTES), np.int32), is_source=is_source).tolist()
        sizes = [_PART_BYTES] * whole + [rest] * (rest > 0)
        data = own if is_source else np.zeros(sum(sizes), np.uint8)
        parts = np.split(data, np.cumsum(sizes, axis=0)[:-1])
        yield pickle.loads(b"".join(_broadcast(part, is_source=is_source).tobytes() for part in parts))


def _broadcast(array: np.ndarray, *, is_source: bool) -> np.ndarray:
    return np.asarray(multihost_utils.broadcast_one_to_all(array, is_source=is_source))
