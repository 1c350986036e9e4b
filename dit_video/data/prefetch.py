"""Reading ahead on top of Grain: threads or worker processes read parts of batches, and a thread puts them together."""

import itertools
import math
import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import absl.flags
import grain

from dit_video.core.errors import check_at_least

BatchT = TypeVar("BatchT")
ENDLESS_LENGTH = 1 << 40
"""Length of endless data sets, as Grain requires a length."""
DECODE_THREADS = min(8, os.cpu_count() or 1)
"""Number of threads that decode video: they run in parallel, as PyAV releases Python's lock."""
_SPARE_ELEMENTS = 3
"""Elements that are buffered in addition to those that the threads work on."""
_WORKER_BUFFER = 2
"""Elements that each worker process has sent and that have not been consumed yet."""
_READY_BATCHES = 2
"""Batches that are kept ready."""


@dataclass(frozen=True, kw_only=True)
class Prefetch:
    """The threads, workers and memory that read ahead.

    Raises:
      UserError: If a number is out of range.
    """

    threads: int = 1
    """Threads that read, in each process."""
    workers: int = 0
    """Processes that read; 0 for threads of this process."""
    ahead_bytes: int = 1 << 29
    """Memory for what is read and waits, over all threads and workers, in bytes."""

    def __post_init__(self):
        check_at_least(0, workers=self.workers)
        check_at_least(1, threads=self.threads, ahead_bytes=self.ahead_bytes)

    def count_parts(self, batch_bytes: float) -> int:
        """Return the number of parts in which batches of this size are read, so that waiting parts fit into the memory.

        Grain buffers elements by number, not by size. With one element per part, the memory of all buffers is bounded.
        """
        waiting = max(1, self.workers) * (self.threads + _SPARE_ELEMENTS) + self.workers * _WORKER_BUFFER
        return max(1, math.ceil(batch_bytes * waiting / self.ahead_bytes))

    def iterate(
        self, read: Callable[[int], list[Any]], combine: Callable[[list[Any]], BatchT], *, start: int, parts: int
    ) -> "grain.DatasetIterator[BatchT]":
        """Return an endless iterator over batches: threads or workers read their parts, a thread here combines them.

        The thread raises its errors in the iterator, in the order of the batches; `close` stops all threads and
        workers.

        Args:
          read: Function from a part's running number to its pieces; part `i` of batch `b` has number `b * parts + i`.
          combine: Function from all pieces of a batch to the batch.
          start: Number of the first batch.
          parts: Number of parts of a batch.
        """
        pieces = self.read_ahead(grain.MapDataset.range(start * parts, ENDLESS_LENGTH).map(read))
        batches = pieces.batch(parts, batch_fn=lambda values: combine(list(itertools.chain.from_iterable(values))))
        return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_READY_BATCHES))

    def read_ahead(self, elements: grain.MapDataset) -> grain.IterDataset:
        """Return the same elements in order, read ahead by threads or worker processes."""
        if not absl.flags.FLAGS.is_parsed():
            absl.flags.FLAGS.mark_as_parsed()  # otherwise Grain's workers raise UnparsedFlagAccessError
        buffer = self.threads + _SPARE_ELEMENTS
        ahead = elements.to_iter_dataset(grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=buffer))
        if self.workers:
            processes = grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=_WORKER_BUFFER)
            ahead = ahead.mp_prefetch(processes, worker_init_fn=_outlive_stop_signals)
        return ahead


def _outlive_stop_signals(_index: int, _count: int) -> None:
    """Let this worker go on after SIGINT and SIGTERM, until the training closes it or has ended.

    Clusters and terminals send these signals to all processes of a job. The training then takes the steps that its
    processes agree on, for which it needs batches. Grain calls this in each worker at its start.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if (training := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_after, args=(training,), name="end with the training", daemon=True).start()


def _end_after(training: multiprocessing.process.BaseProcess) -> None:
    """End this worker once the training has ended, however it did: Grain's workers would wait for it forever."""
    training.join()
    os._exit(0)
