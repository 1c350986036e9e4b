"""Plan of buckets: batches of clips of one size, cropped and resized to the nearest of a set."""

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dit_video.core import rng
from dit_video.core.errors import UserError, check_at_least
from dit_video.core.grid import find_distinct_grids
from dit_video.core.shared_array import SharesArrays
from dit_video.data.examples import Entry, ExampleTable, PlannedRow
from dit_video.tokens import DenseShape, Grid

MAX_LENGTHS = 16
"""Maximum number of candidate lengths along each axis: quantiles, if the data have more lengths."""
MAX_SWAP_ROUNDS = 3
"""Maximum number of rounds in which every bucket is compared with all candidate sizes again."""


@dataclass(frozen=True, kw_only=True)
class BatchMemory:
    """A model of a device's memory: `fixed + batch * (per_token * n + per_pair * n**2)` bytes for n tokens per example.

    Raises:
      UserError: If a value is negative, or `per_token` is not positive.
    """

    fixed: float | int
    """Bytes of parameters, optimizer state and gradients."""
    per_token: float | int
    """Bytes of activations per token."""
    per_pair: float | int = 0
    """Bytes per pair of tokens, for attention that stores its scores; 0 for attention that does not."""

    def __post_init__(self):
        check_at_least(0, fixed=self.fixed, per_pair=self.per_pair)
        if not self.per_token > 0:
            raise UserError(f"per_token={self.per_token} is invalid: a token takes memory. Use a positive number.")

    def compute_max_batch(self, tokens: int, budget: float | int) -> int:
        """Return the maximum number of examples of `tokens` tokens that fit into `budget` bytes."""
        return max(0, math.floor((budget - self.fixed) / self.compute_example_bytes(tokens)))

    def compute_example_bytes(self, tokens: int) -> float | int:
        """Return the bytes that each further example of `tokens` tokens takes."""
        return self.per_token * tokens + self.per_pair * tokens**2


@dataclass(frozen=True, kw_only=True)
class BucketConfig:
    """Configuration of dense batches: the choice of sizes and batches, see `plan_buckets`.

    Raises:
      UserError: If there is no bucket, or the budget does not exceed the fixed part of the memory.
    """

    memory: BatchMemory
    budget: float | int
    """Memory of a device, in bytes."""
    count: int = 8
    """Maximum number of buckets: a program is compiled for each."""
    max_batch: int | None = None
    """Maximum number of examples per batch; None for as many as fit."""

    def __post_init__(self):
        check_at_least(1, count=self.count)
        if self.budget <= (fixed := self.memory.fixed):
            raise UserError(f"budget={self.budget:g} is invalid: the state alone takes {fixed:g} bytes. Raise it.")


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A size, and the examples that are assigned to it."""

    size: Grid
    """Frames, height and width in pixels."""
    grid: Grid
    """Size in tokens."""
    batch: int
    """Examples per step, over all devices."""
    examples: int
    share: float
    """Share of the bucket's examples in all examples."""
    token_retention: float
    """Share of the tokens of the bucket's examples that remains after resizing and cropping."""
    frame_coverage: float
    """Mean share of the frame area of the bucket's examples that is not cropped."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Buckets(SharesArrays):
    """The layout of dense batches: a set of buckets, to one of which every example is assigned."""

    buckets: tuple[Bucket, ...]
    text: int
    """Maximum number of text tokens of an example."""
    assignment: Int[np.ndarray, " n"]
    """Index of the bucket of every example."""
    token_retention: float
    """Share of all tokens that remains after resizing and cropping."""
    frame_coverage: float
    """Mean share of the frame area that is not cropped."""

    def report(self) -> str:
        """Return a table with one line per bucket."""
        lines = [f"{'size':>14} {'batch':>6} {'examples':>9} {'share':>7} {'tokens kept':>12} {'frame shown':>12}"]
        for b in self.buckets:
            shares = f"{b.share:7.1%} {b.token_retention:12.1%} {b.frame_coverage:12.1%}"
            lines.append(f"{b.size!s:>14} {b.batch:6} {b.examples:9} {shares}")
        shares = f"{1:7.1%} {self.token_retention:12.1%} {self.frame_coverage:12.1%}"
        return "\n".join([*lines, f"{'all':>14} {'':6} {len(self.assignment):9} {shares}; 0 dropped"])


def plan_buckets(
    sizes: Int[np.ndarray, "n 3"],
    memory: BatchMemory,
    *,
    budget: float | int,
    text: int,
    count: int = 8,
    devices: int = 1,
    max_batch: int | None = None,
    to_tokens: Callable[[Grid], Grid] = lambda size: size,
) -> Buckets:
    """Choose sizes that keep most of the data, and their batch sizes.

    The value of a bucket for an example is the bucket's tokens times the share of the frame that is not cropped. The
    first size is the largest that every example covers; others are added greedily by their gain (which reaches at least
    1 - 1/e of the best possible gain), then replaced one by one as long as that helps.

    Args:
      sizes: Frames, height and width of every example, all of them valid lengths along their axis.
      memory: Memory model of a batch on a device.
      budget: Memory of a device, in bytes.
      text: Maximum number of text tokens of an example.
      count: Maximum number of buckets: a program is compiled for each.
      devices: Number of devices; batch sizes are multiples of it. No example occurs twice in a batch as long as the
        bucket has enough examples.
      max_batch: Maximum number of examples per batch; None for as many as fit.
      to_tokens: Function from a size in pixels to that in tokens.

    Raises:
      UserError: If there are no examples or buckets, or a single example of some size does not fit into the budget.
    """
    sizes = np.asarray(sizes, np.int64)
    if not len(sizes) or sizes.min() < 1:
        raise UserError(
            f"{len(sizes)} sizes are invalid: buckets need at least one example, each of at least one frame and pixel"
        )
    check_at_least(1, count=count, devices=devices)
    check_at_least(devices, max_batch=max_batch)

    def count_tokens(size: Grid) -> int:
        return to_tokens(size).volume

    grids, _, inverse = find_distinct_grids(sizes)
    distinct, weights = np.asarray(grids), np.bincount(inverse)
    chosen = _choose_sizes(distinct, weights, count_tokens, count)
    assigned = _assign(chosen, distinct, count_tokens)
    # Candidates were a selection of lengths, so a bucket can grow to the smallest lengths of its members. Then some
    # examples may prefer another bucket, so all are assigned again, and unused buckets are removed.
    chosen = np.stack([distinct[assigned == index].min(axis=0) for index in np.unique(assigned)])
    assigned = _assign(chosen, distinct, count_tokens)
    used = np.unique(assigned)
    chosen, assigned = chosen[used], np.searchsorted(used, assigned)
    kept = _count_tokens(chosen, count_tokens)[assigned] * weights
    total = _count_tokens(distinct, count_tokens) * weights
    coverage = _compute_frame_coverage(chosen[assigned], distinct) * weights
    buckets = []
    for index, size in enumerate(Grid(*row) for row in chosen.tolist()):
        members = assigned == index
        examples = int(weights[members].sum())
        # As many examples as fit, but no more than the bucket has.
        limit = max(1, examples // devices)
        if max_batch is not None:
            limit = min(limit, max_batch // devices)
        buckets.append(
            Bucket(
                size=size,
                grid=to_tokens(size),
                batch=devices * min(limit, _compute_device_batch(size, count_tokens(size), memory, budget)),
                examples=examples,
                share=examples / len(sizes),
                token_retention=float(kept[members].sum() / total[members].sum()),
                frame_coverage=float(coverage[members].sum() / examples),
            )
        )
    return Buckets(
        buckets=tuple(buckets),
        text=text,
        assignment=assigned[inverse],
        token_retention=float(kept.sum() / total.sum()),
        frame_coverage=float(coverage.sum() / len(sizes)),
    )


class BucketPlanner(SharesArrays):
    """The dense batch of every step: a function of (buckets, seed, step).

    An epoch has the steps that its examples fill. The last, incomplete batch of a bucket is filled up with examples of
    the next epoch, and belongs to that epoch.

    Args:
      table: The examples.
      buckets: The sizes, with the examples and the batch of each.
      seed: Seed of the run.
      hosts: Number of hosts, among which each batch is divided.

    Raises:
      UserError: If a batch does not divide among the hosts, or a caption is longer than the buckets allow.
    """

    def __init__(self, table: ExampleTable, buckets: Buckets, *, seed: int, hosts: int = 1):
        for bucket in buckets.buckets:
            if bucket.batch % hosts:
                raise UserError(
                    f"hosts={hosts} is invalid: the bucket of {bucket.size} has {bucket.batch} examples per batch. "
                    f"Plan the buckets with devices={hosts} or a multiple."
                )
        longest = table.captions.lengths.longest
        if longest.max() > buckets.text:
            raise UserError(
                f"{table.names[int(np.argmax(longest))]} has {longest.max()} text tokens, but a row has room for "
                f"{buckets.text}; raise the row's text or shorten its caption"
            )
        self.table, self.buckets, self._seed, self._hosts = table, buckets, seed, hosts
        self._examples = np.argsort(buckets.assignment, kind="stable")
        """Examples of the first bucket, then those of the second, and so on."""
        self._counts = [bucket.examples for bucket in buckets.buckets]
        self._batches = [bucket.batch for bucket in buckets.buckets]
        # The most recent permutation of the steps (key -1) and of each bucket, with its number.
        self._recent: dict[int, tuple[int, np.ndarray]] = {}

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_recent": {}}

    @property
    def steps_per_epoch(self) -> float:
        """Return the average number of steps per epoch."""
        return sum(count / batch for count, batch in zip(self._counts, self._batches, strict=True))

    @property
    def max_rows(self) -> int:
        """Return the largest number of rows of a host's batch."""
        return max(self._batches) // self._hosts

    @property
    def max_tokens(self) -> int:
        """Return the largest number of tokens of a host's batch."""
        return max(bucket.batch * bucket.grid.volume for bucket in self.buckets.buckets) // self._hosts

    def get_batch(self, step: int, *, host: int = 0) -> list[PlannedRow]:
        """Return a host's rows of a step, each of one example, of which every use draws a caption."""
        index, number, before = self._locate(step)
        bucket = self.buckets.buckets[index]
        share = bucket.batch // self._hosts
        shape = DenseShape(size=bucket.grid, text=self.buckets.text)
        examples = self._get_examples(index, number * bucket.batch + host * share, share).tolist()
        rows = []
        for rank, example in enumerate(examples, before + host * share):
            rank &= 0xFFFFFFFF
            draw = (rank,)
            caption = self.table.draw_caption(example, self._seed, draw)
            entry = Entry(example, rank, self._seed, draw, caption, bucket.grid, crop=bucket.size)
            rows.append(PlannedRow(shape, [entry]))
        return rows

    def summarize(self, *, devices: int, step: int = 0) -> dict[str, Any]:
        """Return the buckets as JSON values: their sizes, numbers of examples, and what resizing and cropping keeps."""
        buckets = self.buckets
        return {
            "examples": len(buckets.assignment),
            "devices": devices,
            "kept": round(buckets.token_retention, 5),
            "shown": round(buckets.frame_coverage, 5),
            "dropped": 0,
            "buckets": [{**vars(each), "size": str(each.size), "grid": str(each.grid)} for each in buckets.buckets],
        }

    def report(self, *, step: int = 0) -> str:
        """Return a table with one line per bucket; no step drops an example."""
        return self.buckets.report()

    @functools.cached_property
    def hash(self) -> str:
        """Return a hash that is equal for planners of equal batches."""
        constants = ([(bucket.size, bucket.batch) for bucket in self.buckets.buckets], self._seed)
        content = self.buckets.assignment.astype("<i8").tobytes() + repr(constants).encode()
        return hashlib.sha256(content).hexdigest()[:16]

    def _locate(self, step: int) -> tuple[int, int, int]:
        """Return the bucket of a step, the number of its batch in the bucket, and the examples of all earlier steps."""
        # Epochs differ by a few steps from the mean: begin with an estimate, and correct it.
        epoch = int(step / self.steps_per_epoch)
        while sum(self._count_batches_before(epoch)) > step:
            epoch -= 1
        while sum(self._count_batches_before(epoch + 1)) <= step:
            epoch += 1
        done = self._count_batches_before(epoch)
        own = np.asarray(self._count_batches_before(epoch + 1)) - np.asarray(done)
        order = self._permute(-1, epoch, np.repeat(np.arange(len(own)), own))[: step - sum(done) + 1]
        counts = np.bincount(order, minlength=len(done)) + np.asarray(done)
        bucket = int(order[-1])
        counts[bucket] -= 1
        return bucket, int(counts[bucket]), int(sum(c * b for c, b in zip(counts.tolist(), self._batches, strict=True)))

    def _count_batches_before(self, epoch: int) -> list[int]:
        """Return the number of batches of each bucket before an epoch: those that the examples up to then fill."""
        return [epoch * count // size for count, size in zip(self._counts, self._batches, strict=True)]

    def _get_examples(self, bucket: int, first: int, count: int) -> np.ndarray:
        start, parts = sum(self._counts[:bucket]), []
        members = self._examples[start : start + self._counts[bucket]]
        while count:
            number, offset = divmod(first, len(members))
            part = self._permute(bucket, number, members)[offset : offset + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(parts)

    def _permute(self, key: int, number: int, values: np.ndarray) -> np.ndarray:
        recent = self._recent.get(key)
        if recent is None or recent[0] != number:
            recent = number, rng.make_generator(self._seed, "buckets", key + 1, number).permutation(values)
            self._recent[key] = recent
        return recent[1]


def _compute_device_batch(size: Grid, tokens: int, memory: BatchMemory, budget: float | int) -> int:
    """Return the number of examples that fit into the budget of a device, at least one."""
    per_device = memory.compute_max_batch(tokens, budget)
    if per_device < 1:
        needs = memory.fixed + memory.compute_example_bytes(tokens)
        raise UserError(
            f"one example of {size} ({tokens} tokens) takes {needs:.3g} bytes, but the budget is "
            f"{budget:.3g}. Use smaller clips, more devices per example, or a larger budget."
        )
    return per_device


def _choose_sizes(
    sizes: np.ndarray, weights: np.ndarray, count_tokens: Callable[[Grid], int], count: int
) -> Int[np.ndarray, "k 3"]:
    """Choose bucket sizes among all combinations of the data's lengths, so that every example covers one of them."""
    axes = [_choose_lengths(sizes[:, axis], weights) for axis in range(3)]
    candidates = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    value = _compute_values(candidates, sizes, count_tokens) * weights
    # Begin with the smallest length along each axis, the only size that every example is sure to cover.
    chosen = [int(np.flatnonzero((candidates == sizes.min(axis=0)).all(axis=1))[0])]
    current = value[chosen[0]]
    while len(chosen) < count:
        gains = np.maximum(value, current).sum(axis=1)
        best = int(np.argmax(gains))
        if gains[best] <= current.sum() * (1 + 1e-12):
            break
        chosen.append(best)
        current = np.maximum(current, value[best])
    for _ in range(MAX_SWAP_ROUNDS):
        before = list(chosen)
        for slot in range(len(chosen)):
            others = value[[*chosen[:slot], *chosen[slot + 1 :]]].max(axis=0, initial=-np.inf)
            combined = np.maximum(value, others)
            totals = combined.sum(axis=1)  # -inf where some example would have no bucket
            best = int(np.argmax(totals))
            if totals[best] > totals[chosen[slot]] * (1 + 1e-12):
                chosen[slot] = best
        if chosen == before:
            break
    return candidates[chosen]


def _choose_lengths(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    distinct = np.unique(values)
    if len(distinct) <= MAX_LENGTHS:
        return distinct
    order = np.argsort(values, kind="stable")
    shares = (np.cumsum(weights[order]) - weights[order]) / weights.sum()
    return np.unique(values[order][np.searchsorted(shares, np.arange(MAX_LENGTHS) / MAX_LENGTHS, side="right") - 1])


def _compute_values(
    buckets: np.ndarray, sizes: np.ndarray, count_tokens: Callable[[Grid], int]
) -> Float[np.ndarray, "k n"]:
    """Return the tokens of each bucket times the uncropped share of each example's frame; -inf if it is not covered."""
    fits = (buckets[:, None] <= sizes).all(axis=-1)
    value = _count_tokens(buckets, count_tokens)[:, None] * _compute_frame_coverage(buckets[:, None], sizes)
    return np.where(fits, value, -np.inf)


def _assign(buckets: np.ndarray, sizes: np.ndarray, count_tokens: Callable[[Grid], int]) -> Int[np.ndarray, " n"]:
    return np.argmax(_compute_values(buckets, sizes, count_tokens), axis=0)


def _compute_frame_coverage(buckets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the share of a frame that remains after it is resized to cover the bucket and cropped to it."""
    ratio = buckets[..., 1] * sizes[..., 2] / (sizes[..., 1] * buckets[..., 2])  # quotient of the aspect ratios
    return np.minimum(ratio, 1 / ratio)


def _count_tokens(sizes: np.ndarray, count_tokens: Callable[[Grid], int]) -> np.ndarray:
    return np.asarray([count_tokens(Grid(*size)) for size in sizes.tolist()], np.float64)
