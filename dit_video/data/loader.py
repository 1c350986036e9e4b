"""Loaders of packed rows on top of Grain: from cached latents, or from video files that are encoded online.

The whole state of the data is (hash of the plan, step). Rows are read by number, and batches are formed before hosts
take their share, so a run resumes at any step, on any number of hosts and workers, with the same batches. (Grain's own
iterator state has an entry per worker, and does not survive a change of their number.)
"""

import abc
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import absl.flags
import grain
import numpy as np

from dit_video.core.errors import UserError
from dit_video.data.captions import Texts
from dit_video.data.clips import ClipSource
from dit_video.data.latents.cache import LatentSource
from dit_video.data.packing.balance import Balance, Cost
from dit_video.data.packing.mixture import Mixture
from dit_video.data.packing.rows import ClipRow, ClipRows, Encode, LatentRows, Layout, encoded_row, latent_grids
from dit_video.data.prefetch import ENDLESS, prefetch
from dit_video.data.sizes import SizeLimits, fit
from dit_video.tokens import Grid, Rows, RowShape, token_grid

CACHE_BYTES = 1 << 30
AHEAD_BYTES = 1 << 29
_SPARE = 3
"""Elements that are buffered in addition to those that the threads work on."""
_OF_WORKER = 2
"""Elements that each worker process has sent and that have not been consumed yet."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Configuration of a loader: the batches that a process reads, and its threads, workers and memory.

    Raises:
      UserError: a number is out of range, or the batch does not divide among the hosts.
    """

    batch: int
    """Rows per step over all hosts; each host gets `batch // hosts`."""
    seed: int
    """Seed of the run."""
    start_step: int = 0
    """Step of the first batch."""
    host: int = 0
    """Index of this host."""
    hosts: int = 1
    threads: int = 1
    """Threads that read and pack, in each process. Use several for video files, which are decoded in parallel."""
    workers: int = 0
    """Processes that read and pack; 0 for a thread of this process. A script that uses workers must guard its entry
    point by `if __name__ == "__main__"`."""
    cache_bytes: int = CACHE_BYTES
    """Memory for cached patches, over all workers, in bytes."""
    ahead_bytes: int = AHEAD_BYTES
    """Memory for decoded clips that wait until their batch is encoded, over all threads and workers, in bytes. Each
    thread reads a row, or a clip of a bucket, whatever its size; the batch that is being encoded comes on top."""
    mixture: Mixture | None = None
    """Choice of an epoch's examples; None for each example once."""
    balance: Balance | None = None
    """Configuration of the order of rows; None for a random order."""
    pairs: Callable[[Grid], float] | None = None
    """Function from a grid of tokens to its token pairs in attention, the cost of rows; None for full attention."""

    def __post_init__(self):
        if self.batch < 1 or self.hosts < 1 or self.batch % self.hosts:
            raise UserError(f"batch={self.batch} must be a positive multiple of hosts={self.hosts}")
        if not 0 <= self.host < self.hosts:
            raise UserError(f"host={self.host} must be one of 0 to {self.hosts - 1}")
        if self.start_step < 0 or self.workers < 0:
            raise UserError(f"start_step={self.start_step} and workers={self.workers} must not be negative")
        if self.threads < 1 or self.ahead_bytes < 1:
            raise UserError(f"threads={self.threads} and ahead_bytes={self.ahead_bytes} must be at least 1")


class Batches(Iterator[Rows]):
    """An endless iterator over this host's share of the batches."""

    hash: str
    """Hash of the plan: with the step, the whole state of the data."""

    def __init__(self, batches: Iterator[Rows], close: Callable[[], None]):
        self._batches, self._close = batches, close

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        return next(self._batches)

    def close(self) -> None:
        """Stop the threads and workers that read ahead."""
        self._close()

    @abc.abstractmethod
    def summary(self, *, devices: int) -> dict[str, Any]:
        """Return a summary of an epoch as JSON values."""


class PackedBatches(Batches):
    """An endless iterator over batches of packed rows."""

    def __init__(self, batches: Iterator[Rows], close: Callable[[], None], layout: Layout, reading: Reading):
        super().__init__(batches, close)
        self._layout, self._reading = layout, reading
        self.hash = layout.hash
        self.rows_per_epoch: int = layout.stream.rows_per_epoch
        self.padding: float = layout.stream.epoch(0).padding
        """Share of video tokens that are padding."""
        first = layout.stream.epoch(reading.start_step * reading.batch // self.rows_per_epoch)
        self.left_out: int = len(first.left_out)
        """Number of examples without room in the first epoch that is read. (Later epochs log a warning.)"""

    def __str__(self) -> str:
        return (
            f"{len(self._layout.grids)} examples in {self.rows_per_epoch} rows per epoch: {self.padding:.1%} padding, "
            f"{self.left_out} examples dropped"
        )

    def summary(self, *, devices: int) -> dict[str, Any]:
        """Return a summary of an epoch as JSON values: sizes, padding, and the imbalance of `devices` devices.

        `sizes` counts the examples of each grid of tokens, `imbalance` is None if an epoch has no complete step, and
        `sources` holds the share of each data set of a mixture.
        """
        layout, stream, batch = self._layout, self._layout.stream, self._reading.batch
        shares = None if stream.draws is None else stream.draws.shares(stream.epoch(0).order)
        grids = Counter("x".join(map(str, grid)) for grid in layout.grids)
        cost = Cost() if stream.balance is None else stream.balance.cost
        fits = batch % devices == 0 and stream.rows_per_epoch >= batch
        return {
            "plan": self.hash,
            "examples": len(layout.grids),
            "rows_per_epoch": self.rows_per_epoch,
            "padding": round(self.padding, 5),
            "left_out": self.left_out,
            "sources": None if shares is None else dict(zip(("examples", "tokens"), _rounded(shares), strict=True)),
            "cost": str(cost),
            "devices": devices,
            "imbalance": asdict(stream.imbalance(batch=batch, devices=devices)) if fits else None,
            "sizes": dict(grids.most_common()),
        }


def packed_batches(
    source: LatentSource,
    texts: Texts,
    *,
    patch: Grid,
    shape: RowShape,
    reading: Reading,
    intervals: Sequence[float] | None = None,
) -> PackedBatches:
    """Return batches of rows from cached latents, read ahead.

    Args:
      source: cached latents.
      captions: captions of the same examples.
      patch: patch size of the denoiser, in latents.
      shape: budgets of a row.
      config: configuration of the loader.
      token_dt: spacing of consecutive tokens along time for each example, in the unit of the positions; None counts
        tokens.

    Raises:
      UserError: the patch does not divide the latents, or an example is larger than a row.
    """
    layout = Layout(
        latent_grids(source, patch),
        texts,
        shape=shape,
        seed=reading.seed,
        names=source.names,
        mixture=reading.mixture,
        balance=reading.balance,
        intervals=intervals,
        pairs=reading.pairs,
    )
    rows = LatentRows(source, layout, patch, cache_bytes=reading.cache_bytes // max(1, reading.workers))
    ahead = read_ahead(_shared(rows, reading, _stacked), reading)
    return PackedBatches(ahead, ahead.close, layout, reading)


def encoded_batches(
    source: ClipSource,
    texts: Texts,
    encode: Encode,
    *,
    latent_grid: Callable[[Grid], Grid],
    channels: int,
    limits: SizeLimits,
    patch: Grid,
    shape: RowShape,
    reading: Reading,
    intervals: Sequence[float] | None = None,
) -> PackedBatches:
    """Return batches of rows from video files: decoded by threads or workers, encoded in a thread of this process.

    Args:
      source: the clips.
      captions: captions of the same clips.
      encode: function from clips of any sizes to their latents, e.g. on the device.
      latent_grid: function from the size of a clip to that of its latents.
      channels: channels of the latents.
      limits: limits of the training sizes.
      patch: patch size of the denoiser, in latents.
      shape: budgets of a row.
      config: configuration of the loader.
      token_dt: see `load_packed_batches`.

    Raises:
      UserError: a clip has no size within the limits, or is larger than a row.
    """
    sizes = [fit(info, limits) for info in source.infos]
    grids = [token_grid(latent_grid(size), patch) for size in sizes]
    layout = Layout(
        grids,
        texts,
        shape=shape,
        seed=reading.seed,
        names=[info.name for info in source.infos],
        mixture=reading.mixture,
        balance=reading.balance,
        intervals=intervals,
        pairs=reading.pairs,
    )
    row_bytes = shape.tokens * max(3 * size.volume / grid.volume for size, grid in zip(sizes, grids, strict=True))
    decoded = _HostRows(ClipRows(source, layout, limits, seed=reading.seed), reading, row_bytes)

    def batch(rows: list[ClipRow]) -> Rows:
        latents = iter(encode([clip for row in rows for clip in row.clips if clip is not None]))
        return _stacked([encoded_row(row, latents, layout, patch, channels=channels) for row in rows])

    return PackedBatches(*encoded_ahead(decoded, batch, reading), layout, reading)


def _shared(rows: Any, reading: Reading, batch_of: Callable[[list], Any]) -> grain.MapDataset:
    """Return this host's share of the batches, from the first step on.

    Grain forms batches of one host each, of which every `hosts`-th belongs to this host: so rows are shared among hosts
    in the same order for any number of hosts.
    """
    batches = grain.MapDataset.source(rows).batch(
        reading.batch // reading.hosts, drop_remainder=True, batch_fn=batch_of
    )
    return batches[reading.host :: reading.hosts][reading.start_step :]


def read_ahead(batches: grain.MapDataset, reading: Reading) -> grain.DatasetIterator:
    """Read batches ahead in order, by threads or worker processes; the returned iterator has a `close` method."""
    if not absl.flags.FLAGS.is_parsed():
        absl.flags.FLAGS.mark_as_parsed()  # otherwise Grain's workers raise UnparsedFlagAccessError
    options = grain.ReadOptions(num_threads=reading.threads, prefetch_buffer_size=reading.threads + _SPARE)
    ahead = batches.to_iter_dataset(options)
    if reading.workers:
        processes = grain.MultiprocessingOptions(num_workers=reading.workers, per_worker_buffer_size=_OF_WORKER)
        ahead = ahead.mp_prefetch(processes)
    return iter(ahead)


class Pieces(abc.ABC):
    """A decoder of batches of video, piece by piece: a piece is a row, or a clip of a bucket."""

    most: int
    """Maximum number of pieces of a batch."""
    most_bytes: float
    """Maximum size of a decoded batch, in bytes."""

    @abc.abstractmethod
    def decoded(self, step: int, part: int, parts: int) -> list[Any]:
        """Decode this host's pieces of part `part` of a batch in `num_parts` parts, see `get_part_range`."""


def of_part(count: int, part: int, parts: int) -> range:
    """Return the indices of the pieces in part `part`, where `count` pieces form `num_parts` nearly equal parts."""
    return range(count * part // parts, count * (part + 1) // parts)


class _HostRows(Pieces):
    """A decoder of the rows of this host's batches."""

    def __init__(self, rows: ClipRows, reading: Reading, row_bytes: float):
        self._rows, self._host, self._hosts = rows, reading.host, reading.hosts
        self.most = reading.batch // reading.hosts
        self.most_bytes = self.most * row_bytes

    def decoded(self, step: int, part: int, parts: int) -> list[ClipRow]:
        first = (step * self._hosts + self._host) * self.most
        return [self._rows[first + index] for index in of_part(self.most, part, parts)]


class _Parts:
    """A random-access data source of the decoded parts of all batches, one after the other."""

    def __init__(self, pieces: Pieces, parts: int):
        self._pieces, self._parts = pieces, parts

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, number: int) -> list[Any]:
        step, part = divmod(number, self._parts)
        return self._pieces.decoded(step, part, self._parts)


def parts_of(pieces: Pieces, reading: Reading) -> int:
    """Return the number of parts in which a batch is decoded, so that waiting parts fit into `ahead_bytes` if possible.

    Grain buffers elements by number, not by size. With one element per part, the memory of all buffers is bounded.
    """
    waiting = max(1, reading.workers) * (reading.threads + _SPARE) + reading.workers * _OF_WORKER
    return min(pieces.most, max(1, math.ceil(pieces.most_bytes * waiting / reading.ahead_bytes)))


def encoded_ahead(
    pieces: Pieces, batch: Callable[[list[Any]], Rows], reading: Reading
) -> tuple[Iterator[Rows], Callable[[], None]]:
    """Decode batches of video by threads or workers, and encode their pieces by a thread of this process.

    Returns:
      the batches, and a function that stops all threads and workers.
    """
    parts = parts_of(pieces, reading)
    decoded = read_ahead(grain.MapDataset.source(_Parts(pieces, parts))[reading.start_step * parts :], reading)

    def whole_batches() -> Iterator[list[Any]]:
        while True:
            yield list(itertools.chain.from_iterable(itertools.islice(decoded, parts)))

    batches = prefetch(map(batch, whole_batches()))

    def close() -> None:
        batches.close()
        decoded.close()

    return batches, close


def _rounded(shares: Iterable[np.ndarray]) -> list[list[float]]:
    return [share.round(5).tolist() for share in shares]


def _stacked(rows: list[Rows]) -> Rows:
    return Rows(*map(np.stack, zip(*rows, strict=True)))
