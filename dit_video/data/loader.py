"""Batches of packed rows through Grain: from cached latents, or from video files that are encoded on the way.

The whole state of the data is (hash of the plan, step). Rows are read by number and batches are cut before hosts take
their share, so a run continues at any step, on any number of hosts and workers, with the same batches. (Grain's own
iterator state has an entry for each worker, and doesn't survive a change of their number.)
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
"""Elements that are ready or begun, beyond those that the threads are at."""
_OF_WORKER = 2
"""Elements that each worker process has sent and nobody has taken."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Which batches a process reads, and with what.

    Raises:
      UserError: numbers that disagree.
    """

    batch: int
    """rows of a step over all hosts; each host gets `batch // hosts`"""
    seed: int
    """of the run"""
    start_step: int = 0
    """the first batch is that of this step"""
    host: int = 0
    """this host's number"""
    hosts: int = 1
    threads: int = 1
    """That read and pack, in each process. Of video files, which are decoded side by side, several are worth it."""
    workers: int = 0
    """Processes that read and pack; 0 for a thread of this one. A script that uses workers must have its entry under
    `if __name__ == "__main__"`."""
    cache_bytes: int = CACHE_BYTES
    """memory for patches that were read, over all workers"""
    ahead_bytes: int = AHEAD_BYTES
    """Memory for clips that are decoded and wait for the rest of their batch to be encoded, over all threads and
    workers. Each thread reads a row, or a bucket's clip, whatever its size; the batch that is encoded comes on top."""
    mixture: Mixture | None = None
    """which examples an epoch has; None for each one once"""
    balance: Balance | None = None
    """how rows are put into steps; None for random order"""
    pairs: Callable[[Grid], float] | None = None
    """how many tokens of a clip's grid attend to each other, which is what rows cost; None where all do"""

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
    """Of the plan: with the step, the whole state of the data."""

    def __init__(self, batches: Iterator[Rows], close: Callable[[], None]):
        self._batches, self._close = batches, close

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        return next(self._batches)

    def close(self) -> None:
        """End the threads and workers that read ahead."""
        self._close()

    @abc.abstractmethod
    def summary(self, *, devices: int) -> dict[str, Any]:
        """What an epoch holds, as JSON."""


class PackedBatches(Batches):
    """Batches of packed rows."""

    def __init__(self, batches: Iterator[Rows], close: Callable[[], None], layout: Layout, reading: Reading):
        super().__init__(batches, close)
        self._layout, self._reading = layout, reading
        self.hash = layout.hash
        self.rows_per_epoch: int = layout.stream.rows_per_epoch
        self.padding: float = layout.stream.epoch(0).padding
        """Share of video tokens that are padding."""
        first = layout.stream.epoch(reading.start_step * reading.batch // self.rows_per_epoch)
        self.left_out: int = len(first.left_out)
        """Examples without room in the epoch that is begun with. (Of each later one the log says so.)"""

    def __str__(self) -> str:
        return (
            f"{len(self._layout.grids)} examples in {self.rows_per_epoch} rows an epoch: {self.padding:.1%} padding, "
            f"{self.left_out} left out"
        )

    def summary(self, *, devices: int) -> dict[str, Any]:
        """What an epoch holds, as JSON: sizes, padding, and how unequal the costs of `devices` devices are.

        `sizes` is how many examples have each grid of tokens, `imbalance` None where an epoch has no whole step,
        `sources` what part of it each data set of a mixture is.
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
    """Batches of rows from cached latents, read ahead.

    Args:
      source: the latents.
      texts: their captions.
      patch: of the denoiser, in latents.
      shape: the budgets of a row.
      reading: which batches.
      intervals: of two tokens along time, for each example, in the unit of the coordinates; None counts tokens.

    Raises:
      UserError: a patch that does not divide the latents, or an example larger than a row.
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
    """Batches of rows from video files: decoded ahead by threads or workers, encoded in a thread of this process.

    Args:
      source: the clips.
      texts: their captions.
      encode: clips of any sizes to latents, e.g. on the device.
      latent_grid: the size of a clip's latents.
      channels: of the latents.
      limits: which sizes clips are brought to.
      patch: of the denoiser, in latents.
      shape: the budgets of a row.
      reading: which batches.
      intervals: as for `packed_batches`.

    Raises:
      UserError: a clip that has no size within the limits, or one larger than a row.
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
    """This host's batches of rows."""
    batches = grain.MapDataset.source(rows).batch(
        reading.batch // reading.hosts, drop_remainder=True, batch_fn=batch_of
    )
    return batches[reading.host :: reading.hosts][reading.start_step :]


def read_ahead(batches: grain.MapDataset, reading: Reading) -> grain.DatasetIterator:
    """In order, by a thread or by the workers; the iterator has a `close`."""
    if not absl.flags.FLAGS.is_parsed():
        absl.flags.FLAGS.mark_as_parsed()  # else Grain's workers raise UnparsedFlagAccessError
    options = grain.ReadOptions(num_threads=reading.threads, prefetch_buffer_size=reading.threads + _SPARE)
    ahead = batches.to_iter_dataset(options)
    if reading.workers:
        processes = grain.MultiprocessingOptions(num_workers=reading.workers, per_worker_buffer_size=_OF_WORKER)
        ahead = ahead.mp_prefetch(processes)
    return iter(ahead)


class Pieces(abc.ABC):
    """Batches of video that are decoded piece by piece: rows, or the clips of a bucket."""

    most: int
    """pieces of a batch, at most"""
    most_bytes: float
    """of a decoded batch"""

    @abc.abstractmethod
    def decoded(self, step: int, part: int, parts: int) -> list[Any]:
        """This host's pieces of a batch, `part` of `parts`: those that `of_part` numbers."""


def of_part(count: int, part: int, parts: int) -> range:
    """Which of `count` pieces one of `parts` nearly equal parts holds."""
    return range(count * part // parts, count * (part + 1) // parts)


class _HostRows(Pieces):
    """The rows of this host's batches."""

    def __init__(self, rows: ClipRows, reading: Reading, row_bytes: float):
        self._rows, self._host, self._hosts = rows, reading.host, reading.hosts
        self.most = reading.batch // reading.hosts
        self.most_bytes = self.most * row_bytes

    def decoded(self, step: int, part: int, parts: int) -> list[ClipRow]:
        first = (step * self._hosts + self._host) * self.most
        return [self._rows[first + index] for index in of_part(self.most, part, parts)]


class _Parts:
    """The parts of all batches, one after the other, by number."""

    def __init__(self, pieces: Pieces, parts: int):
        self._pieces, self._parts = pieces, parts

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, number: int) -> list[Any]:
        step, part = divmod(number, self._parts)
        return self._pieces.decoded(step, part, self._parts)


def parts_of(pieces: Pieces, reading: Reading) -> int:
    """How many parts a batch is decoded in, so that all that wait at a time fit into `ahead_bytes`, if they can."""
    waiting = max(1, reading.workers) * (reading.threads + _SPARE) + reading.workers * _OF_WORKER
    return min(pieces.most, max(1, math.ceil(pieces.most_bytes * waiting / reading.ahead_bytes)))


def encoded_ahead(
    pieces: Pieces, batch: Callable[[list[Any]], Rows], reading: Reading
) -> tuple[Iterator[Rows], Callable[[], None]]:
    """Batches of video, decoded by threads or workers, of whose pieces a thread of this process makes rows.

    Returns:
      the batches, and what ends the thread and those that decode.
    """
    parts = parts_of(pieces, reading)
    decoded = read_ahead(grain.MapDataset.source(_Parts(pieces, parts))[reading.start_step * parts :], reading)

    def whole() -> Iterator[list[Any]]:
        while True:
            yield list(itertools.chain.from_iterable(itertools.islice(decoded, parts)))

    batches = prefetch(map(batch, whole()))

    def close() -> None:
        batches.close()
        decoded.close()

    return batches, close


def _rounded(shares: Iterable[np.ndarray]) -> list[list[float]]:
    return [share.round(5).tolist() for share in shares]


def _stacked(rows: list[Rows]) -> Rows:
    return Rows(*map(np.stack, zip(*rows, strict=True)))
