"""Plan of the rows of an epoch and their order, as a function of the examples' sizes, the seed and the epoch.

Every host computes the same plan, reads its own rows, and can start at any row. Every epoch has the same number of
rows, so the rows of any step are known without planning the epochs before it.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import logging
import math
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt32

from dit_video.core import rng
from dit_video.core.errors import UserError, check_at_least
from dit_video.core.files import atomic_path
from dit_video.core.grid import find_distinct_grids
from dit_video.core.shared_array import SharesArrays, get_shared_folder, map_array
from dit_video.data.examples import Entry, ExampleTable, PlannedRow
from dit_video.data.packing import balance as balancing
from dit_video.data.packing import bin_packing
from dit_video.data.packing.balance import Balance, Imbalance
from dit_video.data.packing.bin_packing import CanvasPacking, RowArrays
from dit_video.data.packing.mixture import MixtureSampler
from dit_video.tokens import CanvasShape, LayoutShape

KEPT_PLANS = 3
"""Number of plans that are kept: those of the epoch that is read, of the next one, and of the one before."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RowPlan:
    """The rows of one epoch."""

    order: Int[np.ndarray, " n"]
    """Indices of the examples, row after row."""
    offsets: Int[np.ndarray, " R1"]
    """Start of each row in `order`, then the end: row r holds `order[offsets[r]:offsets[r + 1]]`."""
    padding: float
    """Share of video tokens that are padding."""
    attention_cost: Float[np.ndarray, " R"]
    """Token pairs in the attention of each row, in millions: proportional to the cost of attention."""
    dropped_examples: Int[np.ndarray, " d"]
    """Indices of a mixture's examples that had no room in this epoch."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def get_row(self, index: int) -> Int[np.ndarray, " G"]:
        """Return the examples of one row."""
        return self.order[self.offsets[index] : self.offsets[index + 1]]

    @property
    def rows(self) -> list[list[int]]:
        """Return the examples of every row."""
        return RowArrays(self.order, self.offsets).to_lists()

    @functools.cached_property
    def hash(self) -> str:
        """Return a hash that is equal for equal plans."""
        content = self.order.astype("<i8").tobytes() + self.offsets.astype("<i8").tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write the plan to a new folder, which is complete or absent."""
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            for field in dataclasses.fields(self):
                np.save(temporary / f"{field.name}.npy", getattr(self, field.name))

    @classmethod
    def load(cls, folder: Path) -> "RowPlan":
        """Return the plan of a folder, whose arrays are mapped."""
        values: dict[str, Any] = {
            field.name: map_array(folder / f"{field.name}.npy") for field in dataclasses.fields(cls)
        }
        return cls(**{**values, "padding": float(values["padding"])})


class PlanCache:
    """The most recent plans of a sequence of epochs.

    A plan is made by one thread, while others wait for it. Processes that the cache is pickled to use the plans that
    one of them has made, in a folder that they share.

    Args:
      make: Function from an epoch to its plan.
    """

    def __init__(self, make: Callable[[int], RowPlan]):
        self._make = make
        self._folder: Path | None = None
        """Folder of the plans that processes share; None before the cache is pickled."""
        self._plans: dict[int, RowPlan] = {}
        self._prepared = -1
        self._lock = threading.Lock()

    def get(self, epoch: int) -> RowPlan:
        """Return the plan of an epoch."""
        plan = self._plans.get(epoch)  # without the lock, so that no thread waits for a plan that exists
        if plan is not None:
            return plan
        with self._lock:
            if epoch not in self._plans:
                self.put(epoch, self._make(epoch) if self._folder is None else self._get_shared(epoch))
            return self._plans[epoch]

    def put(self, epoch: int, plan: RowPlan) -> None:
        """Keep a plan, instead of the oldest one."""
        # A new dict: threads that read without the lock see either the old or the new one.
        self._plans = {**dict(list(self._plans.items())[1 - KEPT_PLANS :]), epoch: plan}

    def prepare(self, epoch: int) -> None:
        """Begin to make a plan in a thread, unless it exists or was begun."""
        if epoch not in self._plans and epoch != self._prepared:
            self._prepared = epoch
            threading.Thread(target=self.get, args=(epoch,), name=f"plan of epoch {epoch}", daemon=True).start()

    def __getstate__(self) -> dict[str, Any]:
        self._folder = self._folder or get_shared_folder() / uuid.uuid4().hex
        for epoch, plan in self._plans.items():
            with self._lock_folder(epoch) as folder:
                if not folder.exists():
                    plan.save(folder)
        return {"make": self._make, "folder": self._folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["make"])  # type: ignore[misc]
        self._folder = state["folder"]

    def _get_shared(self, epoch: int) -> RowPlan:
        with self._lock_folder(epoch) as folder:
            if not folder.exists():
                self._make(epoch).save(folder)
                with self._lock_folder(epoch - KEPT_PLANS) as old:
                    shutil.rmtree(old, ignore_errors=True)
            return RowPlan.load(folder)

    @contextlib.contextmanager
    def _lock_folder(self, epoch: int) -> Iterator[Path]:
        """Yield the folder of an epoch's plan, which no other process reads or writes meanwhile."""
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"{epoch}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield self._folder / str(epoch)


ATTEMPTS = 4
"""Maximum number of shuffles that are tried until the rows of an epoch fit."""
SLACK = 1000
"""Number of rows per spare row: one spare row in 1,000 lets nearly every shuffle fit into the same number of rows."""
COUNTED_EPOCHS = 8
"""Epochs of a mixture whose tokens are counted before the number of rows is fixed."""
_NO_EXAMPLES = np.zeros(0, np.int64)


class RowPlanner(SharesArrays):
    """The rows or canvases of every step, epoch after epoch.

    Every epoch has as many rows as epoch 0, and `1 / SLACK` more. A plan with fewer rows is brought to that number by
    halving rows. A plan with more rows is shuffled again; after `ATTEMPTS` shuffles the rows of epoch 0 are used, in
    which examples of equal sizes swap: that always fits.

    The epochs of a mixture differ in their examples, so their number of rows follows from the one with the most tokens
    among the first `COUNTED_EPOCHS`, plus one standard deviation. If a later epoch does not fit after all, its emptiest
    rows are dropped: `RowPlan.dropped_examples` holds their examples, and a warning reports how many there are.

    The plan reserves room for the longest caption of an example, so that every caption fits. An example that cannot be
    read keeps its segment of the row.

    Args:
      table: The examples.
      shape: Budgets of a row.
      seed: Seed of the run.
      batch: Rows of a step, over all hosts.
      hosts: Number of hosts, among which a step's rows are divided.
      balance: Configuration of the order of rows; None for a random order.

    Raises:
      UserError: If there are no examples, one is larger than a row, the mixture is invalid (see `MixtureSampler`), or
        the batch does not divide among the hosts.
    """

    def __init__(
        self,
        table: ExampleTable,
        shape: LayoutShape,
        *,
        seed: int,
        batch: int = 1,
        hosts: int = 1,
        balance: Balance | None = None,
    ):
        if batch % hosts:
            raise UserError(f"batch={batch} is invalid: it must be a multiple of hosts={hosts}. Use such a number.")
        self.table, self.shape, self.balance = table, shape, balance
        self.tokens: Int[np.ndarray, " n"] = table.grids.prod(axis=1, dtype=np.int64)
        """Video tokens of every example."""
        self.text: Int[np.ndarray, " n"] = table.captions.lengths.longest.astype(np.int64)
        """Text tokens that are reserved for every example."""
        self._canvases: CanvasPacking | None = None
        if isinstance(shape, CanvasShape):
            self._canvases = CanvasPacking(table.grids, self.text, shape, table.names)
        _check_sizes(self.tokens, self.text, shape, table.names)
        all_pairs = self.tokens.astype(np.float64) ** 2
        self.attention_pairs = all_pairs if table.attention_pairs is None else table.attention_pairs
        self._sparse = not np.array_equal(self.attention_pairs, all_pairs)
        self._seed, self._batch, self._hosts = seed, batch, hosts
        self.sampler: MixtureSampler | None = None
        if table.mixture is not None:
            self.sampler = MixtureSampler(table.mixture, self.tokens, seed=seed)
        first_rows, generator = self._fill_rows(0, 0)
        self._first_examples, self._first_offsets = first_rows
        self.rows_per_epoch = self._count_rows()
        self._plans = PlanCache(self._plan_epoch)
        if len(self._first_offsets) - 1 <= self.rows_per_epoch:  # else another shuffle is the plan
            self._plans.put(0, self._make_plan(0, first_rows, generator))

    @property
    def max_rows(self) -> int:
        """Return the number of rows of a host's batch."""
        return self._batch // self._hosts

    @property
    def max_tokens(self) -> int:
        """Return the number of tokens of a host's batch."""
        return self.max_rows * self.shape.tokens

    def get_batch(self, step: int, *, host: int = 0) -> list[PlannedRow]:
        """Return a host's rows of a step."""
        first = step * self._batch + host * self.max_rows
        return [PlannedRow(self.shape, self.get_entries(number)) for number in range(first, first + self.max_rows)]

    def get_entries(self, number: int) -> list[Entry]:
        """Return the examples of row `number`; an epoch draws one caption of each."""
        epoch, entries = number // self.rows_per_epoch, []
        for example, rank in zip(*(values.tolist() for values in self.get_row(number)), strict=True):
            draw = epoch, example
            caption = self.table.draw_caption(example, self._seed, draw)
            entries.append(Entry(example, rank, self._seed, draw, caption, self.table.get_grid(example)))
        return entries

    def get_epoch(self, number: int) -> RowPlan:
        """Return the plan of one epoch; the most recent plans are cached."""
        return self._plans.get(number)

    def get_row(self, number: int) -> tuple[Int[np.ndarray, " G"], UInt32[np.ndarray, " G"]]:
        """Return the examples of row `number`, and the running number of each over all rows, modulo 2**32."""
        epoch, index = divmod(number, self.rows_per_epoch)
        plan = self.get_epoch(epoch)
        if 2 * index >= self.rows_per_epoch:  # no step waits for the plan of the next epoch
            self._plans.prepare(epoch + 1)
        examples = plan.get_row(index)
        start = epoch * len(self.tokens) if self.sampler is None else self.sampler.count_before(epoch)
        first = start + int(plan.offsets[index])
        ranks = (np.arange(first, first + len(examples), dtype=np.uint64) & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        return examples, ranks

    def measure_imbalance(self, *, batch: int, devices: int, epoch: int = 0) -> Imbalance:
        """Return the differences between the devices' costs over the complete steps of an epoch.

        Raises:
          UserError: If the batch does not divide among the devices, or the epoch has no complete step.
        """
        cost = balancing.Cost() if self.balance is None else self.balance.cost
        costs = cost.compute(self.get_epoch(epoch).attention_cost * 1e6, self.shape.tokens)
        return balancing.measure_imbalance(costs, batch=batch, devices=devices, first=epoch * self.rows_per_epoch)

    def summarize(self, *, devices: int, step: int = 0) -> dict[str, Any]:
        """Return a summary of an epoch as JSON values: sizes, padding, and the imbalance of `devices` devices.

        `sizes` counts the examples of each grid of tokens, `imbalance` is None if an epoch has no complete step,
        `sources` holds the share of each data set of a mixture, and `left_out` counts the examples without room in the
        epoch of a step.
        """
        sources = None
        if self.sampler is not None:
            shares = self.sampler.compute_shares(self.get_epoch(0).order)
            sources = dict(zip(("examples", "tokens"), (share.round(5).tolist() for share in shares), strict=True))
        distinct, _, kinds = find_distinct_grids(self.table.grids)
        counts = dict(zip(map(str, distinct), np.bincount(kinds).tolist(), strict=True))
        fits = self._batch % devices == 0 and self.rows_per_epoch >= self._batch
        imbalance = self.measure_imbalance(batch=self._batch, devices=devices) if fits else None
        return {
            "examples": len(self.table),
            "rows_per_epoch": self.rows_per_epoch,
            "padding": round(self.get_epoch(0).padding, 5),
            "left_out": self._count_dropped(step),
            "sources": sources,
            "cost": str(balancing.Cost() if self.balance is None else self.balance.cost),
            "devices": devices,
            "imbalance": None if imbalance is None else dataclasses.asdict(imbalance),
            "sizes": dict(sorted(counts.items(), key=lambda item: -item[1])),
        }

    def report(self, *, step: int = 0) -> str:
        """Return a sentence with the number of examples and rows, the padding, and what the epoch of a step drops."""
        return (
            f"{len(self.table)} examples in {self.rows_per_epoch} rows per epoch: "
            f"{self.get_epoch(0).padding:.1%} padding, {self._count_dropped(step)} examples dropped"
        )

    @functools.cached_property
    def hash(self) -> str:
        """Return a hash that is equal for planners of equal rows."""
        sizes = np.stack([self.tokens, self.text]).astype("<i8").tobytes()
        constants = (bin_packing.CONSTANTS, ATTEMPTS, SLACK, COUNTED_EPOCHS)
        options = (self.balance, balancing.ORDER_VERSION, None if self.sampler is None else self.sampler.hash)
        content = sizes + repr(((self.shape, self._seed, self.rows_per_epoch, *constants), options)).encode()
        if self._sparse:
            content += self.attention_pairs.astype("<f8").tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def _count_dropped(self, step: int) -> int:
        return len(self.get_epoch(step * self._batch // self.rows_per_epoch).dropped_examples)

    def _get_examples(self, epoch: int) -> Int[np.ndarray, " m"]:
        return np.arange(len(self.tokens)) if self.sampler is None else self.sampler.draw_epoch(epoch)

    def _count_rows(self) -> int:
        first = len(self._first_offsets) - 1
        if self.sampler is None:
            return min(len(self.tokens), first + first // SLACK)
        totals = [int(self.tokens[self._get_examples(epoch)].sum()) for epoch in range(COUNTED_EPOCHS)]
        # Rows are full, so their number grows with the tokens; one standard deviation covers most later epochs.
        estimate = math.ceil(first * (max(totals) + float(np.std(totals))) / totals[0])
        # More rows than examples would leave some empty.
        return min(self.sampler.min_examples, estimate + estimate // SLACK)

    def _fill_rows(self, epoch: int, attempt: int) -> tuple[RowArrays, np.random.Generator]:
        generator = rng.make_generator(self._seed, "row plan", epoch, attempt)
        if self._canvases is not None:
            return self._canvases.fill(self._get_examples(epoch), generator), generator
        sizes = self.tokens, self.text, self.shape
        return bin_packing.fill_rows(self._get_examples(epoch), *sizes, generator, self.attention_pairs), generator

    def _plan_epoch(self, epoch: int) -> RowPlan:
        dropped = _NO_EXAMPLES
        for attempt in range(ATTEMPTS):
            rows, generator = self._fill_rows(epoch, attempt)
            if len(rows.lengths) <= self.rows_per_epoch:
                break
        else:
            if self.sampler is None:
                kinds = self.tokens if self._canvases is None else self._canvases.kinds
                first_rows = RowArrays(self._first_examples, self._first_offsets)
                rows = bin_packing.swap_equal_sizes(first_rows, kinds, self.text, generator)
            else:
                rows, dropped = bin_packing.keep_fullest(rows, self.rows_per_epoch, self.tokens)
                logging.getLogger(__name__).warning(
                    "epoch %d drops %d of its %d examples, for which its %d rows have no room",
                    *(epoch, len(dropped), len(rows.examples) + len(dropped), self.rows_per_epoch),
                )
        return self._make_plan(epoch, rows, generator, dropped)

    def _make_plan(
        self, epoch: int, rows: RowArrays, generator: np.random.Generator, dropped: Int[np.ndarray, " d"] = _NO_EXAMPLES
    ) -> RowPlan:
        """Return the plan of an epoch with these rows, at most `rows_per_epoch`, in an order that is drawn."""
        # Every epoch must have the same number of rows: the row of a step is found by division.
        split = bin_packing.split_rows if self._canvases is None else self._canvases.split
        rows = split(rows, self.rows_per_epoch)
        if self.balance is None:
            order = generator.permutation(self.rows_per_epoch)
        else:
            costs = self.balance.cost.compute(rows.sum(self.attention_pairs), self.shape.tokens)
            order = balancing.order_rows(costs, self.balance, generator, first=epoch * self.rows_per_epoch)
        rows = rows.take(order)
        return RowPlan(
            order=rows.examples,
            offsets=rows.offsets,
            padding=1 - int(self.tokens[rows.examples].sum()) / (self.rows_per_epoch * self.shape.tokens),
            attention_cost=rows.sum(self.attention_pairs) / 1e6,
            dropped_examples=dropped,
        )


def _check_sizes(tokens: np.ndarray, text: np.ndarray, shape: LayoutShape, names: Sequence[str]) -> None:
    if not len(tokens) or len(tokens) != len(text):
        raise UserError(
            f"{len(tokens)} video and {len(text)} text sizes are invalid: a plan needs examples with both. Use as many "
            "of one as of the other, and at least one."
        )
    check_at_least(1, segments=shape.segments)
    for sizes, room, kind, budget, fix in (
        (tokens, shape.tokens, "video", "tokens", "use a smaller clip size"),
        (text, shape.text, "text", "text", "shorten its caption"),
    ):
        largest = int(np.argmax(sizes))
        if sizes[largest] > room:
            raise UserError(
                f"{names[largest]} has {sizes[largest]} {kind} tokens, but a row has room for {room} "
                f"({int((sizes > room).sum())} examples are too large); raise the row's {budget} or {fix}"
            )
    if int(tokens.min()) < 1:
        raise UserError(f"{names[int(np.argmin(tokens))]} has no tokens; leave it out")
