"""Rows for the denoiser's training: examples are planned into rows, read ahead, encoded where they are not, and packed.

The whole state of the data is (hash of the plan, step). A plan says which examples share a row of a step, and an
example's caption, crop and mask are functions of (seed, epoch, example). Hosts take their share of a step's rows from
one plan, so a run resumes at any step, on any number of hosts and workers, with the same batches. (Grain's own iterator
state has an entry per worker, and does not survive a change of their number.)
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from dit_video.core.errors import UserError, check_at_least
from dit_video.data.buckets import BucketPlanner, Buckets
from dit_video.data.examples import Entry, ExampleTable, PlannedRow
from dit_video.data.packing.balance import Balance, Cost
from dit_video.data.packing.plan import RowPlanner
from dit_video.data.prefetch import Prefetch
from dit_video.tokens import CanvasShape, Field, PackedBatch, PackedExample, PackedShape, pack, stack_rows

AHEAD_BYTES = 1 << 29
ReadT = TypeVar("ReadT")


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """The rows of a step, over all hosts: packed rows or canvases. `Buckets` stand for dense batches.

    Raises:
      UserError: If the batch is below 1.
    """

    layout: PackedShape | CanvasShape
    batch: int
    """Rows per step."""
    cost: Cost | None = None
    """Cost of a row, of which the devices of a step get about the same; None for rows in random order."""

    def __post_init__(self):
        check_at_least(1, batch=self.batch)


@runtime_checkable
class ExampleSource(Protocol[ReadT]):
    """A data set whose examples are read by workers, and encoded where the devices are."""

    @property
    def table(self) -> ExampleTable:
        """Return what the plan needs to know of the examples."""

    @property
    def fields(self) -> tuple[Field, ...]:
        """Return the fields of the rows besides tokens and text."""

    @property
    def width(self) -> int:
        """Return the number of values of a token."""

    @property
    def threads(self) -> int:
        """Return the number of threads, in each process, that reading is worth."""

    @property
    def token_bytes(self) -> float:
        """Return the most bytes of what is read for a token."""

    def read(self, entry: Entry) -> ReadT:
        """Read an example, in a thread or a worker."""

    def encode(self, batch: Sequence[tuple[Entry, ReadT]]) -> list[PackedExample]:
        """Return the examples as rows hold them, in a thread of the process that has the devices."""


class RowStream(Iterator[PackedBatch]):
    """An endless iterator over this host's share of the batches."""

    def __init__(self, batches: Iterator[PackedBatch], planner: RowPlanner | BucketPlanner, *, start: int, host: int):
        self._batches, self._start, self._host = batches, start, host
        self.planner = planner
        self.hash: str = planner.table.extend_hash(planner.hash)
        """Hash of the plan and its examples: with the step, the whole state of the data."""

    def __next__(self) -> PackedBatch:
        return next(self._batches)

    def close(self) -> None:
        """Stop the threads and workers that read ahead; then there are no more batches."""
        if (close := getattr(self._batches, "close", None)) is not None:
            close()
        self._batches = iter(())  # frees Grain's iterator now, as it prints an error if it lives until Python exits

    def get_rows(self, step: int) -> list[PlannedRow]:
        """Return the entries of each row of this host's batch at a step, counted from 0."""
        return self.planner.get_batch(step, host=self._host)

    def summarize(self, *, devices: int) -> dict[str, Any]:
        """Return a summary of an epoch as JSON values: the plan's hash, and what `planner.summarize` returns."""
        return {"plan": self.hash, **self.planner.summarize(devices=devices, step=self._start)}

    def __str__(self) -> str:
        return self.planner.report(step=self._start)


def load_rows(
    source: ExampleSource[Any],
    spec: RowSpec | Buckets,
    *,
    seed: int,
    start: int = 0,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    ahead_bytes: int = AHEAD_BYTES,
) -> RowStream:
    """Return a host's batches of rows from a step on.

    Args:
      source: The examples.
      spec: The rows of a step, or the buckets of dense batches.
      seed: Seed of the run.
      start: Step of the first batch.
      host: Index of this host.
      hosts: Number of hosts, among which each batch is divided.
      workers: Processes that read; 0 for threads of this process. A script that uses workers must guard its entry point
        by `if __name__ == "__main__"`.
      ahead_bytes: Memory for what is read and waits until its batch is encoded, over all threads and workers. Each
        thread reads a row, whatever its size; the batch that is being encoded comes on top.

    Raises:
      UserError: If a number is out of range, a batch does not divide among the hosts, or an example or its caption is
        larger than a row.
    """
    check_at_least(0, start=start, workers=workers)
    if not 0 <= host < hosts:
        raise UserError(f"host={host} is invalid: it must be one of 0 to {hosts - 1}. Use the number of this process.")
    planner = make_planner(source.table, spec, seed=seed, hosts=hosts)
    max_rows = planner.max_rows

    def read(number: int) -> list[tuple[PlannedRow, list[Any]]]:
        step, part = divmod(number, parts)
        rows = planner.get_batch(step, host=host)
        rows = rows[len(rows) * part // parts : len(rows) * (part + 1) // parts]
        return [(row, [source.read(entry) for entry in row.entries]) for row in rows]

    def encode(rows: list[tuple[PlannedRow, list[Any]]]) -> PackedBatch:
        examples = iter(source.encode([pair for row, values in rows for pair in zip(row.entries, values, strict=True)]))
        return stack_rows(
            pack(
                list(itertools.islice(examples, len(row.entries))),
                row.shape,
                width=source.width,
                text_width=source.table.captions.width,
                fields=source.fields,
            )
            for row, _ in rows
        )

    prefetch = Prefetch(threads=source.threads, workers=workers, ahead_bytes=ahead_bytes)
    parts = min(max_rows, prefetch.count_parts(planner.max_tokens * source.token_bytes))
    batches = prefetch.iterate(read, encode, start=start, parts=parts)
    return RowStream(batches, planner, start=start, host=host)


def make_planner(
    table: ExampleTable, spec: RowSpec | Buckets, *, seed: int, hosts: int = 1
) -> RowPlanner | BucketPlanner:
    """Return the plan of the rows of every step.

    Raises:
      UserError: If a batch does not divide among the hosts, or an example or its caption is larger than a row.
    """
    if isinstance(spec, Buckets):
        return BucketPlanner(table, spec, seed=seed, hosts=hosts)
    balance = None if spec.cost is None else Balance(cost=spec.cost, batch=spec.batch)
    return RowPlanner(table, spec.layout, batch=spec.batch, seed=seed, hosts=hosts, balance=balance)
