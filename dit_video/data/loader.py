"""Batches of packed rows from cached latents, through Grain.

The whole state of the data is (hash of the plan, step). Rows are read by number and batches are cut before hosts take
their share, so a run continues at any step, on any number of hosts and workers, with the same batches. (Grain's own
iterator state has an entry for each worker, and doesn't survive a change of their number.)
"""

import contextlib
import functools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import absl.flags
import grain
import numpy as np
from jaxtyping import Float32, Int32

from dit_video.data.latents import LatentSource
from dit_video.data.plan import RowStream
from dit_video.errors import UserError
from dit_video.tokens import Grid, Item, Rows, RowShape, coordinates, pack, patchify, token_grid

CACHE_BYTES = 1 << 30
ENDLESS = 1 << 40
"""Rows. Grain's data sets have a length."""

Value = TypeVar("Value")
Tokenize = Callable[[str], Int32[np.ndarray, " s"]]


class PackedBatches(Iterator[Rows]):
    """An endless iterator over this host's share of the batches."""

    def __init__(self, batches: grain.DatasetIterator, stream: RowStream):
        self._batches = batches
        self.hash: str = stream.hash
        """Of the plan: with the step, the whole state of the data."""
        self.rows_per_epoch: int = stream.rows_per_epoch
        self.padding: float = stream.epoch(0).padding
        """Share of video tokens that are padding."""

    def __iter__(self) -> "PackedBatches":
        return self

    def __next__(self) -> Rows:
        return next(self._batches)

    def close(self) -> None:
        """End the threads and workers that read ahead."""
        self._batches.close()


def packed_batches(
    source: LatentSource,
    tokenize: Tokenize,
    *,
    patch: Grid,
    shape: RowShape,
    batch: int,
    seed: int,
    start_step: int = 0,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    cache_bytes: int = CACHE_BYTES,
) -> PackedBatches:
    """Batches of rows from step `start_step` on, read ahead by one thread (or by `workers` processes).

    Args:
      source: the latents.
      tokenize: caption to text tokens. It is called here, once for each caption: it need not be picklable.
      patch: of the denoiser, in latents.
      shape: the budgets of a row.
      batch: rows of a step over all hosts; each host gets `batch // hosts`.
      seed: of the run.
      start_step: the first batch is that of this step.
      host: this host's number.
      hosts: how many there are.
      workers: processes that read and pack; 0 for a thread of this one. A script that uses workers must have its entry
        under `if __name__ == "__main__"`.
      cache_bytes: memory for patches that were read, over all workers.

    Raises:
      UserError: numbers that disagree, a patch that does not divide the latents, or an example larger than a row.
    """
    if batch < 1 or hosts < 1 or batch % hosts:
        raise UserError(f"batch={batch} must be a positive multiple of hosts={hosts}")
    if not 0 <= host < hosts:
        raise UserError(f"host={host} must be one of 0 to {hosts - 1}")
    if start_step < 0 or workers < 0:
        raise UserError(f"start_step={start_step} and workers={workers} must not be negative")
    rows = _PackedRows(source, tokenize, patch, shape, seed, cache_bytes // max(1, workers))
    if not absl.flags.FLAGS.is_parsed():
        absl.flags.FLAGS.mark_as_parsed()  # else Grain's workers raise UnparsedFlagAccessError
    batches = grain.MapDataset.source(rows).batch(batch // hosts, drop_remainder=True)[host::hosts][start_step:]
    ahead = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    if workers:
        ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    return PackedBatches(iter(ahead), rows.stream)


class _PackedRows:
    """Rows by number, as Grain reads them. Pickled to workers with the tokenised captions, without the tokeniser."""

    def __init__(
        self, source: LatentSource, tokenize: Tokenize, patch: Grid, shape: RowShape, seed: int, cache_bytes: int
    ):
        self._source, self._patch, self._shape, self._room = source, patch, shape, cache_bytes
        self._grids = [_token_grid(source, index, patch) for index in range(len(source))]
        tokenized = {caption: _tokenized(tokenize, caption) for caption in dict.fromkeys(source.captions)}
        self._text = [tokenized[caption] for caption in source.captions]
        self._width = patch.volume * source.channels
        self._patches: dict[int, Float32[np.ndarray, "n p"]] = {}
        self.stream = RowStream(
            np.asarray([grid.volume for grid in self._grids], np.int64),
            np.asarray([len(text) for text in self._text], np.int64),
            shape,
            seed=seed,
            names=source.names,
        )

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, number: int) -> Rows:
        examples, ranks = self.stream.row(number)
        items = [
            Item(self._tokens(example), _coordinates(self._grids[example]), self._text[example], rank)
            for example, rank in zip(examples.tolist(), ranks.tolist(), strict=True)
        ]
        return pack(items, self._shape, width=self._width)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_patches": {}}

    def _tokens(self, example: int) -> Float32[np.ndarray, "n p"]:
        """An example's patches. What was read stays until the memory for it is full."""
        tokens = self._patches.get(example)
        if tokens is None:
            tokens = np.ascontiguousarray(patchify(self._source[example], self._patch))
            if tokens.nbytes <= self._room:
                self._room -= tokens.nbytes
                self._patches[example] = tokens
        return tokens


@functools.lru_cache(maxsize=1024)
def _coordinates(grid: Grid) -> Float32[np.ndarray, "n 3"]:
    return coordinates(grid)


def _token_grid(source: LatentSource, index: int, patch: Grid) -> Grid:
    try:
        return token_grid(source.sizes[index], patch)
    except UserError as error:
        raise UserError(f"{source.names[index]}: {error}") from error


def _tokenized(tokenize: Tokenize, caption: str) -> Int32[np.ndarray, " s"]:
    return np.asarray(tokenize(caption), np.int32).reshape(-1)


def prefetch(
    values: Iterator[Value], *, depth: int = 2, transfer: Callable[[Value], Value] | None = None
) -> Iterator[Value]:
    """The same values, made ahead by a thread: `depth` of them wait.

    Args:
      values: their errors are raised here, in their place.
      depth: how many wait.
      transfer: applied to each value in the thread, e.g. `jax.device_put`.
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
                offer("value", value if transfer is None else transfer(value))
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
