"""Loaders of packed rows on top of Grain: from cached latents, or from video files that are encoded online.

The whole state of the data is (hash of the plan, step). Rows are read by number, and batches are formed before hosts
take their share, so a run resumes at any step, on any number of hosts and workers, with the same batches. (Grain's own
iterator state has an entry per worker, and does not survive a change of their number.)
"""

import abc
import itertools
import math
import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import absl.flags
import grain
import numpy as np
from jaxtyping import Float

from dit_video.core.errors import UserError, check_at_least
from dit_video.core.grid import find_distinct_grids, map_grids
from dit_video.core.shared_array import SharedStrings
from dit_video.core.storage import is_remote
from dit_video.data.captions import CaptionSource
from dit_video.data.clips import ClipSource
from dit_video.data.latents.cache import LatentSource
from dit_video.data.packing.balance import Balance, Cost
from dit_video.data.packing.mask_mix import MaskMix
from dit_video.data.packing.mixture import Mixture
from dit_video.data.packing.plan import RowPlan
from dit_video.data.packing.rows import (
    ENDLESS_LENGTH,
    ClipRow,
    ClipRows,
    Encode,
    LatentRows,
    RowEncoder,
    RowEntry,
    RowLayout,
    compute_token_grids,
)
from dit_video.data.sizes import SizeLimits, fit_sizes
from dit_video.tokens import Grid, LayoutShape, PackedBatch, compute_token_grid, stack_rows

CACHE_BYTES = 1 << 30
AHEAD_BYTES = 1 << 29
REMOTE_THREADS = 16
"""Number of batches of latents that are read from a bucket at once, as each request waits for the network."""
_SPARE_ELEMENTS = 3
"""Elements that are buffered in addition to those that the threads work on."""
_WORKER_BUFFER = 2
"""Elements that each worker process has sent and that have not been consumed yet."""
_ENCODED_BUFFER = 2
"""Encoded batches that are kept ready."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Configuration of a loader: the batches that a process reads, and its threads, workers and memory.

    Raises:
      UserError: If a number is out of range, or the batch does not divide among the hosts.
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
    """Threads that read and pack, in each process. Use several for video files, which are decoded in parallel; latents
    in a bucket are read by at least `REMOTE_THREADS`."""
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
    attention_pairs: Callable[[Grid], float] | None = None
    """Function from a grid of tokens to its token pairs in attention, the cost of rows; None for full attention."""
    token_lead: float = 0.0
    """Fraction of `token_dt` by which all tokens but a clip's first begin earlier; see `compute_positions`."""

    def __post_init__(self):
        if self.batch < 1 or self.hosts < 1 or self.batch % self.hosts:
            raise UserError(f"batch={self.batch} must be a positive multiple of hosts={self.hosts}")
        if not 0 <= self.host < self.hosts:
            raise UserError(f"host={self.host} must be one of 0 to {self.hosts - 1}")
        check_at_least(0, start_step=self.start_step, workers=self.workers)
        check_at_least(1, threads=self.threads, ahead_bytes=self.ahead_bytes)

    @property
    def row_options(self) -> dict[str, Any]:
        """Return the options of `RowLayout` that are part of this configuration."""
        return {name: getattr(self, name) for name in ("seed", "mixture", "balance", "attention_pairs", "token_lead")}


class DenoiserBatches(Iterator[PackedBatch]):
    """An endless iterator over this host's share of the batches."""

    hash: str
    """Hash of the plan: with the step, the whole state of the data."""

    def __init__(self, batches: grain.DatasetIterator):
        self._batches: Iterator[PackedBatch] = batches

    def __next__(self) -> PackedBatch:
        return next(self._batches)

    def close(self) -> None:
        """Stop the threads and workers that read ahead; then there are no more batches."""
        if isinstance(self._batches, grain.DatasetIterator):
            self._batches.close()
        self._batches = iter(())  # frees Grain's iterator now, as it prints an error if it lives until Python exits

    @abc.abstractmethod
    def summarize(self, *, devices: int) -> dict[str, Any]:
        """Return a summary of an epoch as JSON values."""


class PackedBatches(DenoiserBatches):
    """An endless iterator over batches of packed rows."""

    def __init__(self, batches: grain.DatasetIterator, layout: RowLayout, config: LoaderConfig):
        super().__init__(batches)
        self._layout, self._config = layout, config
        self.hash = layout.hash
        self.rows_per_epoch: int = layout.stream.rows_per_epoch
        self.padding: float = layout.stream.get_epoch(0).padding
        """Share of video tokens that are padding."""
        first = layout.stream.get_epoch(config.start_step * config.batch // self.rows_per_epoch)
        self.num_dropped: int = len(first.dropped_examples)
        """Number of examples without room in the first epoch that is read. (Later epochs log a warning.)"""

    def get_entries(self, step: int) -> list[list[RowEntry]]:
        """Return the examples of each row of this host's batch at a step, counted from 0."""
        config, count = self._config, self._config.batch // self._config.hosts
        first = (step * config.hosts + config.host) * count
        return [self._layout.get_entries(number) for number in range(first, first + count)]

    def get_plan(self, epoch: int) -> RowPlan:
        """Return the rows of an epoch."""
        return self._layout.stream.get_epoch(epoch)

    @property
    def num_examples(self) -> int:
        """Return the number of examples that the rows are made of."""
        return len(self._layout.grids)

    @property
    def has_mixture(self) -> bool:
        """Return True if an epoch may have an example several times, or not at all."""
        return self._layout.stream.sampler is not None

    def __str__(self) -> str:
        return (
            f"{len(self._layout.grids)} examples in {self.rows_per_epoch} rows per epoch: {self.padding:.1%} padding, "
            f"{self.num_dropped} examples dropped"
        )

    def summarize(self, *, devices: int) -> dict[str, Any]:
        """Return a summary of an epoch as JSON values: sizes, padding, and the imbalance of `devices` devices.

        `sizes` counts the examples of each grid of tokens, `imbalance` is None if an epoch has no complete step, and
        `sources` holds the share of each data set of a mixture.
        """
        layout, stream, batch = self._layout, self._layout.stream, self._config.batch
        sources = None
        if stream.sampler is not None:
            shares = stream.sampler.compute_shares(stream.get_epoch(0).order)
            sources = dict(zip(("examples", "tokens"), (share.round(5).tolist() for share in shares), strict=True))
        distinct, _, kinds = find_distinct_grids(layout.grids)
        counts = dict(zip(map(str, distinct), np.bincount(kinds).tolist(), strict=True))
        cost = Cost() if stream.balance is None else stream.balance.cost
        fits = batch % devices == 0 and stream.rows_per_epoch >= batch
        return {
            "plan": self.hash,
            "examples": len(layout.grids),
            "rows_per_epoch": self.rows_per_epoch,
            "padding": round(self.padding, 5),
            "left_out": self.num_dropped,
            "sources": sources,
            "cost": str(cost),
            "devices": devices,
            "imbalance": asdict(stream.measure_imbalance(batch=batch, devices=devices)) if fits else None,
            "sizes": dict(sorted(counts.items(), key=lambda item: -item[1])),
        }


def load_packed_batches(
    source: LatentSource,
    captions: CaptionSource,
    *,
    patch: Grid,
    shape: LayoutShape,
    config: LoaderConfig,
    token_dt: Float[np.ndarray, " n"] | None = None,
    mask_mix: MaskMix | None = None,
) -> PackedBatches:
    """Return batches of rows from cached latents, read ahead.

    Args:
      source: Cached latents.
      captions: Captions of the same examples.
      patch: Patch size of the denoiser, in latents.
      shape: Budgets of a row.
      config: Configuration of the loader.
      token_dt: Spacing of consecutive tokens along time for each example, in the unit of the positions; None counts
        tokens.
      mask_mix: Draws of the masks of known pixels, whose kinds are all cached; None without them.

    Raises:
      UserError: If the patch does not divide the latents, or an example is larger than a row.
    """
    grids = compute_token_grids(source, patch)
    layout = RowLayout(grids, captions, shape=shape, names=source.names, token_dt=token_dt, **config.row_options)
    cache_bytes = config.cache_bytes // max(1, config.workers)
    rows = LatentRows(source, layout, patch, cache_bytes=cache_bytes, mask_mix=mask_mix)
    # Grain forms batches of one host each, and every `hosts`-th of them belongs to this host: so rows are shared among
    # hosts in the same order for any number of hosts.
    host_rows = config.batch // config.hosts
    batches = grain.MapDataset.source(rows).batch(host_rows, drop_remainder=True, batch_fn=stack_rows)
    host_share = batches[config.host :: config.hosts][config.start_step :]
    if is_remote(source.folder):
        config = replace(config, threads=max(config.threads, REMOTE_THREADS))
    return PackedBatches(iter(read_ahead(host_share, config)), layout, config)


def load_encoded_batches(
    source: ClipSource,
    captions: CaptionSource,
    encode: Encode,
    *,
    latent_grid: Callable[[Grid], Grid],
    channels: int,
    limits: SizeLimits,
    patch: Grid,
    shape: LayoutShape,
    config: LoaderConfig,
    token_dt: Float[np.ndarray, " n"] | None = None,
    mask_mix: MaskMix | None = None,
) -> PackedBatches:
    """Return batches of rows from video files: decoded by threads or workers, encoded in a thread of this process.

    Args:
      source: The clips.
      captions: Captions of the same clips.
      encode: Function from clips of any sizes to their latents, e.g. on the device.
      latent_grid: Function from a clip's size to its latents' size.
      channels: Channels of the latents.
      limits: Limits of the training sizes.
      patch: Patch size of the denoiser, in latents.
      shape: Budgets of a row.
      config: Configuration of the loader.
      token_dt: See `load_packed_batches`.
      mask_mix: Draws of the masks of known pixels, with which every clip is encoded once more; None without them.

    Raises:
      UserError: If a clip has no size within the limits, or is larger than a row.
    """
    sizes = fit_sizes(source, limits)
    grids = map_grids(lambda size: compute_token_grid(latent_grid(size), patch), sizes)
    names = SharedStrings(source.column("name"))
    layout = RowLayout(grids, captions, shape=shape, names=names, token_dt=token_dt, **config.row_options)
    row_bytes = shape.tokens * float((3 * sizes.prod(axis=1, dtype=np.int64) / layout.stream.tokens).max())
    decoded = _RowDecoder(ClipRows(source, layout, limits, seed=config.seed), config, row_bytes)

    encode_rows = RowEncoder(encode, layout, patch, channels, mask_mix)
    return PackedBatches(encode_ahead(decoded, lambda rows: stack_rows(encode_rows(rows)), config), layout, config)


def read_ahead(batches: grain.MapDataset, config: LoaderConfig) -> grain.IterDataset:
    """Return the same batches in order, read ahead by threads or worker processes."""
    if not absl.flags.FLAGS.is_parsed():
        absl.flags.FLAGS.mark_as_parsed()  # otherwise Grain's workers raise UnparsedFlagAccessError
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.threads + _SPARE_ELEMENTS)
    ahead = batches.to_iter_dataset(options)
    if config.workers:
        processes = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=_WORKER_BUFFER)
        ahead = ahead.mp_prefetch(processes, worker_init_fn=outlive_stop_signals)
    return ahead


class PieceDecoder(abc.ABC):
    """A decoder of batches of video, piece by piece: a piece is a row, or a clip of a bucket."""

    max_pieces: int
    """Maximum number of pieces of a batch."""
    max_bytes: float
    """Maximum size of a decoded batch, in bytes."""

    @abc.abstractmethod
    def decode(self, step: int, part: int, num_parts: int) -> list[Any]:
        """Decode this host's pieces of part `part` of a batch in `num_parts` parts, see `get_part_range`."""


def get_part_range(count: int, part: int, num_parts: int) -> range:
    """Return the indices of the pieces in part `part`, where `count` pieces form `num_parts` nearly equal parts."""
    return range(count * part // num_parts, count * (part + 1) // num_parts)


class _RowDecoder(PieceDecoder):
    """A decoder of the rows of this host's batches."""

    def __init__(self, rows: ClipRows, config: LoaderConfig, row_bytes: float):
        self._rows, self._host, self._hosts = rows, config.host, config.hosts
        self.max_pieces = config.batch // config.hosts
        self.max_bytes = self.max_pieces * row_bytes

    def decode(self, step: int, part: int, num_parts: int) -> list[ClipRow]:
        first = (step * self._hosts + self._host) * self.max_pieces
        return [self._rows[first + index] for index in get_part_range(self.max_pieces, part, num_parts)]


def count_parts(pieces: PieceDecoder, config: LoaderConfig) -> int:
    """Return the number of parts in which a batch is decoded, so that waiting parts fit into `ahead_bytes` if possible.

    Grain buffers elements by number, not by size. With one element per part, the memory of all buffers is bounded.
    """
    waiting = max(1, config.workers) * (config.threads + _SPARE_ELEMENTS) + config.workers * _WORKER_BUFFER
    return min(pieces.max_pieces, max(1, math.ceil(pieces.max_bytes * waiting / config.ahead_bytes)))


def encode_ahead(
    pieces: PieceDecoder, batch: Callable[[list[Any]], PackedBatch], config: LoaderConfig
) -> grain.DatasetIterator:
    """Decode batches of video by threads or workers, and encode their pieces by a thread of this process.

    The thread raises its errors in the iterator, in the order of the batches; `close` stops all threads and workers.
    """
    parts = count_parts(pieces, config)
    numbers = grain.MapDataset.range(config.start_step * parts, ENDLESS_LENGTH)
    decoded = read_ahead(numbers.map(lambda number: pieces.decode(number // parts, number % parts, parts)), config)
    batches = decoded.batch(parts, batch_fn=lambda values: batch(list(itertools.chain.from_iterable(values))))
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_ENCODED_BUFFER))


def outlive_stop_signals(_index: int, _count: int) -> None:
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
