"""What a row costs, and which rows meet in a step, so that no device waits for another.

A step ends when its costliest device is done. Every row has the same number of tokens, so the matrix products cost the
same for each; attention costs the sum of its clips' pairs of tokens, where all see all the squares of their lengths,
which is eight times as much for one clip that fills a row as for eight. `fill_rows` makes rows of like costs where the
clips allow it; what is left is balanced here, by choosing the rows of a step:

1. Rows are put into blocks of `block` rows, the least that a device holds, costly ones with cheap ones.
2. Blocks of like costs make a step. Among those within half the tolerance, which ones meet is random, and so is the
   order of the steps. Of rows that differ by more, costly ones meet costly ones: the step is balanced for every number
   of devices, at the price that steps differ.
3. Where costs jump (a few rows are much costlier than all others), a step would hold both kinds. Its cheap blocks are
   spread over costly steps, one by one.

A step of n blocks of which the costliest costs c keeps the tolerance e as long as the others cost n·c·e/(1 + e) less in
all: at 5 %, one block in 21 may cost next to nothing. So an epoch whose costly blocks fill only a few steps, or a block
that has no like in the whole epoch, can leave a step above the tolerance; `Imbalance.worst` says so.

As all blocks of a step are alike, any number of devices that holds whole blocks is balanced by the same sequence of
rows: that number is nowhere an input.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dit_video.core.errors import UserError

_CANDIDATES = 1 << 18
"""Blocks that are looked at for an exchange."""
_EXCHANGES = 4096
"""Of an epoch, at most: where costs can't be evened out, a plan does not take minutes."""
METHOD = 2
"""Goes up with every change of the order that rows are put into: part of a plan's hash."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a row costs: `linear * (its tokens, padding too) + attention * (pairs of tokens that attend to each other)`.

    Only the ratio matters. One layer of width D whose matrices hold m·D² weights takes 2·m·D² operations for a token,
    and 4·n·D for its attention to the n tokens that it sees (scores and values, 2·n·D each); a backward pass takes
    twice both. So attention costs as much as the matrices in clips of m·D/2 tokens that all see each other: with m =
    14, 8,064 at D = 1152 and 21,504 at D = 3072.

    This holds for attention that skips the blocks of other clips. One that computes them all costs the same for every
    row, and needs no balance.

    Raises:
      UserError: a cost that is negative, or none at all.
    """

    linear: float | int = 0
    """of a token"""
    attention: float | int = 1
    """of a pair of tokens of which one sees the other"""

    def __post_init__(self):
        if not (self.linear >= 0 and self.attention >= 0 and self.linear + self.attention > 0):
            raise UserError(f"linear={self.linear} and attention={self.attention} must not be negative, nor both zero")

    @classmethod
    def of_width(cls, width: int, *, matrices: float | int = 14) -> "Cost":
        """In operations of one layer, forward.

        Args:
          width: of the denoiser (D).
          matrices: weights of a layer that every token is multiplied by, in D²: 4 for attention, 8 for an MLP of four
            times the width, 2 for the query and output of cross attention.
        """
        return cls(linear=2 * matrices * width**2, attention=4 * width)

    def __str__(self) -> str:
        return f"{self.linear:g} * tokens of the row + {self.attention:g} * pairs in attention"

    def rows(self, pairs: Float[np.ndarray, "*r"], tokens: int) -> Float[np.ndarray, "*r"]:
        """Of rows of `tokens` tokens, in which so many pairs attend to each other."""
        return self.linear * tokens + self.attention * pairs


@dataclass(frozen=True, kw_only=True)
class Balance:
    """How rows are put into steps.

    Raises:
      UserError: a batch that is not a multiple of the block, or a tolerance outside (0, 1).
    """

    cost: Cost
    batch: int
    """rows of a step, over all devices"""
    block: int = 1
    """Rows, the least that a device will hold; any division of the batch into whole blocks is balanced. The more, the
    less do steps differ from each other. The sequence of rows depends on it."""
    tolerance: float = 0.05
    """How much the costliest block of a step may exceed the step's mean, where the rows allow it."""

    def __post_init__(self):
        if self.block < 1 or self.batch < 1 or self.batch % self.block:
            raise UserError(f"batch={self.batch} must be a positive multiple of block={self.block}")
        if not 0 < self.tolerance < 1:
            raise UserError(f"tolerance={self.tolerance} must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Imbalance:
    """How unequal the devices' costs are, over the whole steps of an epoch."""

    devices: int
    mean: float
    """time lost by waiting: the sum over steps of the costliest device's cost, by the sum of the means, less 1"""
    worst: float
    """of one step: its costliest device's cost by the mean, less 1"""
    above: float
    """share of steps of which the costliest device is more than 5 % above the mean"""
    steps: float
    """standard deviation of a step's cost, by the mean"""


def arrange(
    costs: Float[np.ndarray, " r"], balance: Balance, generator: np.random.Generator, *, first: int = 0
) -> Int[np.ndarray, " r"]:
    """The order of an epoch's rows.

    Args:
      costs: of the rows.
      balance: see there.
      generator: of what is left to chance.
      first: number of the epoch's first row. A step that begins in the epoch before, and one that ends in the next, get
        rows of the commonest cost.
    """
    batch, rows = balance.batch, len(costs)
    head = min(rows, -first % batch)
    tail = (rows - head) % batch
    bins = _bins(costs, balance.tolerance)
    order = generator.permutation(rows)
    # The bin of the median is 0.
    order = order[np.argsort(np.abs(bins[order]), kind="stable")]
    edge, inner = generator.permutation(order[: head + tail]), order[head + tail :]
    blocks = _blocks(costs, inner, balance.block)
    blocks = blocks[generator.permutation(len(blocks))]
    if len(blocks):
        like = _bins(costs[blocks].sum(axis=1), balance.tolerance)
        blocks = blocks[np.argsort(like, kind="stable")]
    steps = _shuffled(blocks.reshape(-1, batch // balance.block, balance.block), generator)
    loads = costs[steps].sum(axis=2)
    if loads.shape[1] > 1:
        loads = _evened(steps, loads, balance.tolerance)
    for step in np.flatnonzero(_exceed(loads, balance.tolerance)):
        # Fewer devices, with several blocks each, are balanced all the same.
        steps[step] = steps[step][_blocks(loads[step], np.arange(len(loads[step])), len(loads[step]))[0]]
    return np.concatenate([edge[:head], steps.reshape(-1), edge[head:]])


def imbalance(costs: Float[np.ndarray, " r"], *, batch: int, devices: int, first: int = 0) -> Imbalance:
    """Measure rows in their order; `first` is the number of the first one, and only whole steps count.

    Raises:
      UserError: devices that do not divide the batch, or too few rows for one step.
    """
    if devices < 1 or batch % devices:
        raise UserError(f"batch={batch} must be a positive multiple of devices={devices}")
    whole = costs[-first % batch :]
    whole = whole[: len(whole) // batch * batch]
    if not len(whole):
        raise UserError(f"the epoch has no whole step: {len(costs)} rows in batches of {batch}; use a smaller batch")
    loads = whole.reshape(-1, devices, batch // devices).sum(axis=2)
    most, mean = loads.max(axis=1), loads.mean(axis=1)
    return Imbalance(
        devices=devices,
        mean=float(most.sum() / mean.sum() - 1),
        worst=float((most / mean).max() - 1),
        above=float((most > 1.05 * mean).mean()),
        steps=float(mean.std() / mean.mean()),
    )


def _bins(costs: np.ndarray, tolerance: float) -> np.ndarray:
    """Costs in classes so narrow that the rows of two neighbouring ones keep the tolerance; 0 holds the median."""
    if not len(costs):
        return np.zeros(0, np.int64)
    return np.rint(np.log(costs / np.median(costs)) / np.log1p(tolerance / 2.1)).astype(np.int64)


def _blocks(costs: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    """Rows in blocks of a size, costly ones with cheap ones: in pairs, then in pairs of pairs, and so on."""
    blocks = rows[:, None]
    while blocks.shape[1] < size:
        ratio = size // blocks.shape[1]
        parts = 2 if ratio % 2 == 0 else ratio
        ranked = blocks[np.argsort(-costs[blocks].sum(axis=1), kind="stable")]
        dealt = ranked.reshape(parts, -1, blocks.shape[1])
        # Every other part backwards: the costliest meets the cheapest.
        dealt = np.stack([part[::-1] if index % 2 else part for index, part in enumerate(dealt)], axis=1)
        blocks = dealt.reshape(-1, parts * blocks.shape[1])
    return blocks


def _evened(steps: np.ndarray, loads: np.ndarray, tolerance: float) -> np.ndarray:
    """Exchange blocks between steps, in place, for those that exceed the tolerance; returns the blocks' costs.

    A cheap block among costly ones costs little: its own device waits for a part of the step. One costly block among
    cheap ones makes all others wait. So a step of both kinds gives its cheapest block, again and again, for the
    costliest that another step can do without: that step keeps the tolerance.
    """
    loads, left = loads.copy(), _EXCHANGES
    nearby = max(2, _CANDIDATES // loads.shape[1])
    for step in np.flatnonzero(_exceed(loads, tolerance)).tolist():
        means = loads.mean(axis=1)
        # The steps of the nearest costs, this one first.
        distance = np.where(np.arange(len(means)) == step, -1, np.abs(means - means[step]))
        among = np.argsort(distance, kind="stable")[:nearby]
        for _ in range(loads.shape[1]):
            exchanges = _exchanges(loads[among], tolerance) if left and _exceed(loads[[step]], tolerance).any() else []
            for (one, block), (other, place) in exchanges:
                here, there = (among[one], block), (among[other], place)
                steps[here], steps[there] = steps[there].copy(), steps[here].copy()
                loads[here], loads[there] = loads[there], loads[here]
            if not exchanges:
                break
            left -= 1
    return loads


_Place = tuple[int, int]
"""step, block"""


def _exchanges(loads: np.ndarray, tolerance: float) -> list[tuple[_Place, _Place]]:
    """What brings step 0 nearer to the tolerance, and keeps it in the others; nothing if nothing does."""
    cheap, blocks = int(np.argmin(loads[0])), loads.shape[1]
    cost, most, mean = loads[0, cheap], loads[0].max(), loads[0].mean()
    # Of each block: how far the costliest block would exceed the mean here, with it instead of the cheap one.
    excess = np.maximum(loads, most) / (mean + (loads - cost) / blocks)
    helps = (loads > cost) & (excess < most / mean)
    helps[0] = False
    # Its step's costliest without it, and the step's mean with the cheap one in its place.
    two = np.partition(loads, -2, axis=1)[:, -2:]
    others = np.where(loads == two[:, 1:], two[:, :1], two[:, 1:])
    means = loads.mean(axis=1, keepdims=True) + (cost - loads) / blocks
    spared = (others <= (1 + tolerance) * means) & (loads > cost)
    spared[0] = False
    if (helps & spared).any():
        return [((0, cheap), _least(excess, helps & spared))]
    if not spared.any():
        return []
    # All that others can do without is too costly here. It may take the place of a cheaper one among its like.
    costly = _least(loads, spared)
    helps[costly[0]] = False
    helps &= two[:, 1:] >= loads[costly]
    return [((0, cheap), costly), ((0, cheap), _least(excess, helps))] if helps.any() else []


def _exceed(loads: np.ndarray, tolerance: float) -> np.ndarray:
    """Which steps do."""
    return loads.max(axis=-1) > (1 + tolerance) * loads.mean(axis=-1)


def _least(values: np.ndarray, among: np.ndarray) -> _Place:
    step, block = np.unravel_index(np.argmin(np.where(among, values, np.inf)), values.shape)
    return int(step), int(block)


def _shuffled(steps: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The steps in random order, the blocks of each too."""
    steps = steps[generator.permutation(len(steps))]
    order = np.argsort(generator.random(steps.shape[:2]), axis=1)
    return np.take_along_axis(steps, order[:, :, None], axis=1)
