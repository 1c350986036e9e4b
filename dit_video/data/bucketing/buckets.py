"""Buckets: batches of one size each, as the alternative to packed rows.

A few sizes are chosen from those of the data, and every example is shrunk to one of them: the bucket that keeps most of
it, none of whose axes is longer than the example's own. It is resized to cover the bucket and what stands out is
cropped (in time, cut). Each bucket has as many examples a batch as fit into a memory budget, so that no size runs out
of memory and large sizes don't force small batches on small ones.

Each bucket's examples are gone through in a random order, then in another; a batch that the first doesn't fill goes on
with the second. Nothing is dropped, and no data set is too small for a batch.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt32

from dit_video.core import rng
from dit_video.core.errors import UserError
from dit_video.tokens import Grid

VALUES = 16
"""Lengths along each axis that a bucket may have at first: quantiles, where the data have more."""
SWAPS = 3
"""Rounds in which every bucket is tried against all sizes again."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a device needs for a batch: `fixed + batch * (per_token * n + per_pair * n**2)` bytes, n tokens an example.

    Raises:
      UserError: negative bytes, or none for a token.
    """

    fixed: float | int
    """parameters, optimizer state, gradients"""
    per_token: float | int
    """activations"""
    per_pair: float | int = 0
    """of attention that keeps its scores; 0 for one that doesn't"""

    def __post_init__(self):
        if not (self.fixed >= 0 and self.per_token > 0 and self.per_pair >= 0):
            raise UserError(
                f"bytes must not be negative, and per_token positive: fixed={self.fixed}, per_token={self.per_token}, "
                f"per_pair={self.per_pair}"
            )

    def batch(self, tokens: int, budget: float | int) -> int:
        """The most examples of this many tokens that fit."""
        return max(0, math.floor((budget - self.fixed) / self.example(tokens)))

    def example(self, tokens: int) -> float | int:
        """Bytes that one more example takes."""
        return self.per_token * tokens + self.per_pair * tokens**2


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """One size, and what is in it."""

    size: Grid
    batch: int
    """examples of a step, over all devices"""
    examples: int
    share: float
    """of all examples"""
    kept: float
    """of its examples' tokens, those that are left after shrinking"""
    shown: float
    """of its examples' frames, the mean part that is not cropped"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Buckets:
    """Every example has one bucket."""

    buckets: tuple[Bucket, ...]
    of: Int[np.ndarray, " n"]
    """the bucket of every example"""
    kept: float
    """share of all tokens that is left after shrinking"""
    shown: float
    """mean part of a frame that is not cropped"""

    def report(self) -> str:
        """A line a bucket."""
        lines = [f"{'size':>14} {'batch':>6} {'examples':>9} {'share':>7} {'tokens kept':>12} {'frame shown':>12}"]
        for b in self.buckets:
            size = "{}x{}x{}".format(*b.size)
            lines.append(f"{size:>14} {b.batch:6} {b.examples:9} {b.share:7.1%} {b.kept:12.1%} {b.shown:12.1%}")
        lines.append(f"{'all':>14} {'':6} {len(self.of):9} {1:7.1%} {self.kept:12.1%} {self.shown:12.1%}; 0 dropped")
        return "\n".join(lines)


def plan_buckets(
    sizes: Int[np.ndarray, "n 3"],
    memory: Memory,
    *,
    budget: float | int,
    count: int = 8,
    devices: int = 1,
    most: int | None = None,
    tokens: Callable[[Grid], int] = lambda size: size.volume,
) -> Buckets:
    """Choose sizes that keep most of the data, and their batches.

    What is kept of an example is the bucket's tokens times the part of the frame that is shown. The first size is the
    largest that holds every example; others are added greedily by what they gain (which reaches at least 1 - 1/e of the
    best possible gain), then exchanged one by one as long as that helps.

    Args:
      sizes: frames, height and width of every example, all of them valid lengths along their axis.
      memory: what a batch takes on a device.
      budget: bytes of a device.
      count: of buckets, at most: each is a program to be compiled.
      devices: a batch is a multiple of this. No example comes twice in a batch as long as the bucket has as many.
      most: examples of a batch; None for as many as fit.
      tokens: of a size.

    Raises:
      UserError: no examples, no bucket, or a size of which not one example fits into the budget.
    """
    sizes = np.asarray(sizes, np.int64)
    if not len(sizes) or sizes.min() < 1:
        raise UserError(f"buckets need examples with at least one frame and pixel, {len(sizes)} were given")
    if count < 1 or devices < 1 or (most is not None and most < devices):
        raise UserError(f"count={count}, devices={devices} must be at least 1, most={most} at least devices or None")
    distinct, inverse, weights = np.unique(sizes, axis=0, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    chosen = _choose(distinct, weights, tokens, count)
    assigned = _best(chosen, distinct, tokens)
    # As large as its members allow: candidates were a selection.
    chosen = np.stack([distinct[assigned == index].min(axis=0) for index in np.unique(assigned)])
    assigned = _best(chosen, distinct, tokens)
    used = np.unique(assigned)
    chosen, assigned = chosen[used], np.searchsorted(used, assigned)
    kept, whole = _tokens(chosen, tokens)[assigned] * weights, _tokens(distinct, tokens) * weights
    shown = _shown(chosen[assigned], distinct) * weights
    buckets = []
    for index, size in enumerate(Grid(*row) for row in chosen.tolist()):
        members = assigned == index
        examples = int(weights[members].sum())
        buckets.append(
            Bucket(
                size=size,
                batch=_batch(size, tokens(size), memory, budget, examples, devices, most),
                examples=examples,
                share=examples / len(sizes),
                kept=float(kept[members].sum() / whole[members].sum()),
                shown=float(shown[members].sum() / examples),
            )
        )
    return Buckets(
        buckets=tuple(buckets),
        of=assigned[inverse],
        kept=float(kept.sum() / whole.sum()),
        shown=float(shown.sum() / len(sizes)),
    )


class BucketStream:
    """The endless sequence of batches, by step: a function of (buckets, seed, step).

    An epoch has the steps that its examples fill; a bucket's last, incomplete batch is filled up by its next epoch, and
    counts as a step of that one.
    """

    def __init__(self, buckets: Buckets, *, seed: int):
        self.buckets, self._seed = buckets, seed
        self._members = [np.flatnonzero(buckets.of == index) for index in range(len(buckets.buckets))]
        self._batches = [bucket.batch for bucket in buckets.buckets]
        # The last permutation that was used, of the steps (-1) and of each bucket: (its number, itself).
        self._recent: dict[int, tuple[int, np.ndarray]] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_recent": {}}

    @property
    def steps_per_epoch(self) -> float:
        """On average."""
        return sum(len(members) / batch for members, batch in zip(self._members, self._batches, strict=True))

    def batch(
        self, step: int, *, host: int = 0, hosts: int = 1
    ) -> tuple[Grid, Int[np.ndarray, " b"], UInt32[np.ndarray, " b"]]:
        """A host's part of a batch: its size, the examples, and their running numbers over the stream, modulo 2**32.

        Raises:
          UserError: hosts that do not divide the batch.
        """
        bucket, number, before = self._at(step)
        size = self._batches[bucket]
        if not 0 <= host < hosts or size % hosts:
            raise UserError(
                f"host={host} of {hosts}: the bucket of {'{}x{}x{}'.format(*self.buckets.buckets[bucket].size)} has "
                f"{size} examples a batch; plan the buckets with devices={hosts} or a multiple"
            )
        share = size // hosts
        examples = self._stretch(bucket, number * size + host * share, share)
        ranks = np.arange(before + host * share, before + (host + 1) * share, dtype=np.uint64)
        return self.buckets.buckets[bucket].size, examples, (ranks & np.uint64(0xFFFFFFFF)).astype(np.uint32)

    @functools.cached_property
    def hash(self) -> str:
        """Equal for streams that give equal batches."""
        constants = ([(bucket.size, bucket.batch) for bucket in self.buckets.buckets], self._seed)
        return hashlib.sha256(self.buckets.of.astype("<i8").tobytes() + repr(constants).encode()).hexdigest()[:16]

    def _at(self, step: int) -> tuple[int, int, int]:
        """The bucket of a step, the number of its batch among the bucket's, and the examples of all steps before."""
        epoch = int(step / self.steps_per_epoch)
        while sum(self._done(epoch)) > step:
            epoch -= 1
        while sum(self._done(epoch + 1)) <= step:
            epoch += 1
        done = self._done(epoch)
        order = self._order(epoch)[: step - sum(done) + 1]
        counts = np.bincount(order, minlength=len(done)) + np.asarray(done)
        bucket = int(order[-1])
        counts[bucket] -= 1
        return bucket, int(counts[bucket]), int(sum(c * b for c, b in zip(counts.tolist(), self._batches, strict=True)))

    def _done(self, epoch: int) -> list[int]:
        """Batches of each bucket before an epoch: those that are full by then."""
        return [epoch * len(members) // size for members, size in zip(self._members, self._batches, strict=True)]

    def _order(self, epoch: int) -> np.ndarray:
        counts = np.asarray(self._done(epoch + 1)) - np.asarray(self._done(epoch))
        steps = np.repeat(np.arange(len(counts)), counts)
        return self._permuted(-1, epoch, steps)

    def _stretch(self, bucket: int, first: int, count: int) -> np.ndarray:
        members, parts = self._members[bucket], []
        while count:
            number, offset = divmod(first, len(members))
            part = self._permuted(bucket, number, members)[offset : offset + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(parts)

    def _permuted(self, what: int, number: int, values: np.ndarray) -> np.ndarray:
        recent = self._recent.get(what)
        if recent is None or recent[0] != number:
            recent = number, rng.host(self._seed, "buckets", what + 1, number).permutation(values)
            self._recent[what] = recent
        return recent[1]


def _batch(
    size: Grid, tokens: int, memory: Memory, budget: float | int, examples: int, devices: int, most: int | None
) -> int:
    """Over all devices: what fits, but no more than the bucket has."""
    a_device = memory.batch(tokens, budget)
    if a_device < 1:
        needs = memory.fixed + memory.example(tokens)
        raise UserError(
            f"one example of {'x'.join(map(str, size))} ({tokens} tokens) takes {needs:.3g} bytes, the budget is "
            f"{budget:.3g}; use smaller clips, more devices for each example, or a larger budget"
        )
    enough = max(1, examples // devices)
    if most is not None:
        enough = min(enough, most // devices)
    return devices * min(a_device, enough)


def _choose(
    sizes: np.ndarray, weights: np.ndarray, tokens: Callable[[Grid], int], count: int
) -> Int[np.ndarray, "k 3"]:
    """Bucket sizes among all combinations of the data's lengths; together they hold every size."""
    axes = [_lengths(sizes[:, axis], weights) for axis in range(3)]
    candidates = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    value = _kept(candidates, sizes, tokens) * weights
    # The smallest length along each axis: it holds all.
    chosen = [int(np.flatnonzero((candidates == sizes.min(axis=0)).all(axis=1))[0])]
    current = value[chosen[0]]
    while len(chosen) < count:
        gains = np.maximum(value, current).sum(axis=1)
        best = int(np.argmax(gains))
        if gains[best] <= current.sum() * (1 + 1e-12):
            break
        chosen.append(best)
        current = np.maximum(current, value[best])
    for _ in range(SWAPS):
        before = list(chosen)
        for place in range(len(chosen)):
            others = value[[*chosen[:place], *chosen[place + 1 :]]].max(axis=0, initial=-np.inf)
            together = np.maximum(value, others)
            totals = together.sum(axis=1)  # -inf where a size would have no bucket
            best = int(np.argmax(totals))
            if totals[best] > totals[chosen[place]] * (1 + 1e-12):
                chosen[place] = best
        if chosen == before:
            break
    return candidates[chosen]


def _lengths(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    distinct = np.unique(values)
    if len(distinct) <= VALUES:
        return distinct
    order = np.argsort(values, kind="stable")
    shares = (np.cumsum(weights[order]) - weights[order]) / weights.sum()
    return np.unique(values[order][np.searchsorted(shares, np.arange(VALUES) / VALUES, side="right") - 1])


def _kept(buckets: np.ndarray, sizes: np.ndarray, tokens: Callable[[Grid], int]) -> Float[np.ndarray, "k n"]:
    """Tokens kept times the part of the frame shown; -inf for a bucket that is longer along any axis."""
    fits = np.ones((len(buckets), len(sizes)), bool)
    for axis in range(3):
        fits &= buckets[:, None, axis] <= sizes[:, axis]
    value = _tokens(buckets, tokens)[:, None] * _shown(buckets[:, None], sizes)
    return np.where(fits, value, -np.inf)


def _best(buckets: np.ndarray, sizes: np.ndarray, tokens: Callable[[Grid], int]) -> Int[np.ndarray, " n"]:
    return np.argmax(_kept(buckets, sizes, tokens), axis=0)


def _shown(buckets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The part of a frame that is left where it is resized to cover the bucket and cropped to it."""
    tall = buckets[..., 1] * sizes[..., 2] / (sizes[..., 1] * buckets[..., 2])  # ratio of the aspect ratios
    return np.minimum(tall, 1 / tall)


def _tokens(sizes: np.ndarray, tokens: Callable[[Grid], int]) -> np.ndarray:
    return np.asarray([tokens(Grid(*size)) for size in sizes.tolist()], np.float64)
