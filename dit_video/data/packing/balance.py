"""Cost of rows, and an order of rows in which all devices of a step have about the same work.

A step ends when its costliest device is done. Every row has the same number of tokens, so the matrix products cost the
same for each row. Attention costs as much as the pairs of tokens that attend to each other: with full attention the sum
of the squared clip lengths, so one clip that fills a row costs eight times as much as eight short ones. `fill_rows`
makes rows of similar cost where the clips allow it; the remaining differences are balanced here, by choosing which rows
form a step:

1. Rows are grouped into blocks of `block` rows (the fewest that a device holds), costly rows with cheap ones.
2. Blocks of similar cost form a step. Blocks whose costs agree to within half the tolerance are mixed at random, and
   the steps are shuffled. Beyond that, costly blocks are put with costly ones: each step is balanced for every number
   of devices, at the price that steps differ from each other.
3. Where costs jump (a few rows are much costlier than all others), one step would hold both kinds. Its cheap blocks are
   spread over costly steps, one by one.

A step of n blocks whose costliest block costs c keeps the tolerance e as long as the other blocks cost at most
n·c·e/(1 + e) less in total: at 5 %, one block in 21 may cost next to nothing. So a step can exceed the tolerance where
the costly blocks of an epoch fill only a few steps, or where a block has no similar one in the epoch. `Imbalance.worst`
reports that.

The blocks of a step cost about the same, so one sequence of rows is balanced for any number of devices that hold whole
blocks; the number of devices is not an input.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dit_video.core.errors import UserError

_MAX_CANDIDATES = 1 << 18
"""Maximum number of blocks that are considered for an exchange: it bounds the time of one exchange."""
_MAX_EXCHANGES = 4096
"""Maximum number of exchanges per epoch: without it, planning takes minutes where costs cannot be evened out."""
ORDER_VERSION = 2
"""Version of the ordering algorithm. It is part of a plan's hash: increase it with every change of the order."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A cost model of rows: `linear * tokens (with padding) + attention * pairs of tokens that attend to each other`.

    Only the ratio matters. A layer of width D whose matrices hold m·D² weights takes 2·m·D² operations per token, and
    4·n·D for its attention to the n tokens that it attends to (scores and values, 2·n·D each); a backward pass takes
    twice as many of both. So attention costs as much as the matrices in clips of m·D/2 tokens with full attention: for
    m = 14, 8,064 tokens at D = 1152 and 21,504 at D = 3072.

    This holds for attention kernels that skip the blocks of other clips. A kernel that computes all blocks costs the
    same for every row, and needs no balancing.

    Raises:
      UserError: If a cost is negative, or both are zero.
    """

    linear: float | int = 0
    """Cost of one token."""
    attention: float | int = 1
    """Cost of one pair of tokens (query and key) in attention."""

    def __post_init__(self):
        if not (self.linear >= 0 and self.attention >= 0 and self.linear + self.attention > 0):
            raise UserError(
                f"linear={self.linear}, attention={self.attention} is invalid: costs must not be negative, nor both "
                "zero. Use Cost.from_width(width)."
            )

    @classmethod
    def from_width(cls, width: int, *, layer_params: float | int = 14) -> "Cost":
        """Return the cost in forward operations of one layer.

        Args:
          width: Width of the denoiser (D).
          layer_params: Weights of a layer that every token is multiplied by, in units of D²: 4 for attention, 8 for an
            MLP of four times the width, 2 for the query and output of cross-attention.
        """
        return cls(linear=2 * layer_params * width**2, attention=4 * width)

    def __str__(self) -> str:
        return f"{self.linear:g} * tokens of the row + {self.attention:g} * pairs in attention"

    def compute(self, attention_pairs: Float[np.ndarray, "*r"], tokens: int) -> Float[np.ndarray, "*r"]:
        """Return the costs of rows of `tokens` tokens from the attention pairs of each row."""
        return self.linear * tokens + self.attention * attention_pairs


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Configuration of the order of rows.

    Raises:
      UserError: If the batch is not a multiple of the block, or the tolerance is outside (0, 1).
    """

    cost: Cost
    batch: int
    """Rows per step, over all devices."""
    block: int = 1
    """Fewest rows that a device will hold; every division of the batch into whole blocks is balanced. Larger blocks
    make steps differ less from each other. The order of the rows depends on it."""
    tolerance: float = 0.05
    """Relative amount by which the costliest block may exceed the mean of its step, where the rows allow it."""

    def __post_init__(self):
        if self.block < 1 or self.batch < 1 or self.batch % self.block:
            raise UserError(f"batch={self.batch} must be a positive multiple of block={self.block}")
        if not 0 < self.tolerance < 1:
            raise UserError(f"tolerance={self.tolerance} is invalid: it must lie between 0 and 1. Use 0.05.")


@dataclass(frozen=True, kw_only=True)
class Imbalance:
    """Differences between the devices' costs, measured over the complete steps of an epoch."""

    devices: int
    mean: float
    """Relative time lost by waiting: the costliest device's cost summed over steps, divided by the summed means, minus
    1."""
    worst: float
    """Largest imbalance of one step: the costliest device's cost divided by the mean, minus 1."""
    share_above_5_percent: float
    """Share of steps whose costliest device is more than 5 % above the mean."""
    step_std: float
    """Standard deviation of the cost of a step, divided by its mean."""


def order_rows(
    costs: Float[np.ndarray, " r"], balance: Balance, generator: np.random.Generator, *, first: int = 0
) -> Int[np.ndarray, " r"]:
    """Return the order of an epoch's rows.

    Args:
      costs: Cost of each row.
      balance: The configuration.
      generator: Source of all random choices.
      first: Running number of the epoch's first row. The steps that this epoch shares with the one before and the one
        after get rows of the most common cost.
    """
    batch, rows = balance.batch, len(costs)
    # The first `head` rows complete a step of the epoch before; the last `tail` rows begin a step of the next epoch.
    # The other rows of these two steps are planned elsewhere, so rows close to the median fit best there.
    head = min(rows, -first % batch)
    tail = (rows - head) % batch
    bins = _compute_bins(costs, balance.tolerance)
    order = generator.permutation(rows)
    # The median is in bin 0. The sort is stable, so rows of equal distance to it stay in random order.
    order = order[np.argsort(np.abs(bins[order]), kind="stable")]
    edge, inner = generator.permutation(order[: head + tail]), order[head + tail :]
    blocks = _make_blocks(costs, inner, balance.block)
    # Shuffle, then sort by bin: blocks of one bin are interchangeable, so they end up in a step at random.
    blocks = blocks[generator.permutation(len(blocks))]
    if len(blocks):
        block_bins = _compute_bins(costs[blocks].sum(axis=1), balance.tolerance)
        blocks = blocks[np.argsort(block_bins, kind="stable")]
    # Steps are slices of the sorted blocks, of shape [steps, blocks of a step, rows of a block].
    steps = _shuffle(blocks.reshape(-1, batch // balance.block, balance.block), generator)
    loads = costs[steps].sum(axis=2)
    if loads.shape[1] > 1:
        loads = _even_out(steps, loads, balance.tolerance)
    for step in np.flatnonzero(_exceeds_tolerance(loads, balance.tolerance)):
        # No exchange has brought this step within the tolerance. Alternating costly and cheap blocks at least balances
        # it for fewer devices, which hold several consecutive blocks each.
        steps[step] = steps[step][_make_blocks(loads[step], np.arange(len(loads[step])), len(loads[step]))[0]]
    return np.concatenate([edge[:head], steps.reshape(-1), edge[head:]])


def measure_imbalance(costs: Float[np.ndarray, " r"], *, batch: int, devices: int, first: int = 0) -> Imbalance:
    """Measure rows in their order, from running number `first` on; only complete steps count.

    Raises:
      UserError: If the batch does not divide among the devices, or there are too few rows for one step.
    """
    if devices < 1 or batch % devices:
        raise UserError(f"batch={batch} must be a positive multiple of devices={devices}")
    complete = costs[-first % batch :]
    complete = complete[: len(complete) // batch * batch]
    if not len(complete):
        raise UserError(f"batch={batch} is invalid: the epoch has {len(costs)} rows, no whole step. Use a smaller one.")
    loads = complete.reshape(-1, devices, batch // devices).sum(axis=2)
    costliest, mean = loads.max(axis=1), loads.mean(axis=1)
    return Imbalance(
        devices=devices,
        mean=float(costliest.sum() / mean.sum() - 1),
        worst=float((costliest / mean).max() - 1),
        share_above_5_percent=float((costliest > 1.05 * mean).mean()),
        step_std=float(mean.std() / mean.mean()),
    )


def _compute_bins(costs: np.ndarray, tolerance: float) -> np.ndarray:
    """Return logarithmic bins, so narrow that rows of two neighbouring bins keep the tolerance; 0 holds the median."""
    if not len(costs):
        return np.zeros(0, np.int64)
    # Two neighbouring bins span a ratio of (1 + e/2.1)², which is below 1 + e for tolerances e of up to 20 %.
    return np.rint(np.log(costs / np.median(costs)) / np.log1p(tolerance / 2.1)).astype(np.int64)


def _make_blocks(costs: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    """Group rows into blocks, costly rows with cheap ones: in pairs, then in pairs of pairs, and so on.

    A size with odd factors ends with one round in which the remaining factor of blocks is joined at once.
    """
    blocks = rows[:, None]
    while blocks.shape[1] < size:
        ratio = size // blocks.shape[1]
        parts = 2 if ratio % 2 == 0 else ratio
        ranked = blocks[np.argsort(-costs[blocks].sum(axis=1), kind="stable")]
        dealt = ranked.reshape(parts, -1, blocks.shape[1])
        # Every second part is reversed, so that the costliest block of one part joins the cheapest of the next.
        dealt = np.stack([part[::-1] if index % 2 else part for index, part in enumerate(dealt)], axis=1)
        blocks = dealt.reshape(-1, parts * blocks.shape[1])
    return blocks


def _even_out(steps: np.ndarray, loads: np.ndarray, tolerance: float) -> np.ndarray:
    """Exchange blocks between steps, in place, until steps keep the tolerance; returns the costs of the blocks.

    A cheap block among costly ones does little harm: only its own device waits. A costly block among cheap ones makes
    all other devices wait. So a step that holds both kinds repeatedly gives away its cheapest block, and receives a
    costly block from another step that still keeps the tolerance afterwards.
    """
    loads, remaining = loads.copy(), _MAX_EXCHANGES
    nearby = max(2, _MAX_CANDIDATES // loads.shape[1])
    for step in np.flatnonzero(_exceeds_tolerance(loads, tolerance)).tolist():
        means = loads.mean(axis=1)
        # Only steps of similar cost can help, and the limit bounds the time. This step itself comes first, as index 0.
        distance = np.where(np.arange(len(means)) == step, -1, np.abs(means - means[step]))
        nearest = np.argsort(distance, kind="stable")[:nearby]
        for _ in range(loads.shape[1]):
            if not remaining or not _exceeds_tolerance(loads[[step]], tolerance).any():
                break
            exchanges = _find_exchanges(loads[nearest], tolerance)
            for (one, block), (other, other_block) in exchanges:
                source, target = (nearest[one], block), (nearest[other], other_block)
                steps[source], steps[target] = steps[target].copy(), steps[source].copy()
                loads[source], loads[target] = loads[target], loads[source]
            if not exchanges:
                break
            remaining -= 1
    return loads


_BlockIndex = tuple[int, int]
"""Indices of a step, and of a block in it."""


def _find_exchanges(loads: np.ndarray, tolerance: float) -> list[tuple[_BlockIndex, _BlockIndex]]:
    """Return exchanges that bring step 0 closer to the tolerance and keep it in the other steps; empty if none do.

    Either one exchange, or two that pass a block on: the costly block that another step can spare is too costly for
    step 0, so a third step takes it and gives step 0 a cheaper one.
    """
    cheap, blocks = int(np.argmin(loads[0])), loads.shape[1]
    cost, costliest, mean = loads[0, cheap], loads[0].max(), loads[0].mean()
    # For each block: the ratio of costliest block to mean in step 0, were it to replace the cheap one.
    excess = np.maximum(loads, costliest) / (mean + (loads - cost) / blocks)
    helps = (loads > cost) & (excess < costliest / mean)
    helps[0] = False
    # For each block: can its own step spare it? The largest load of the step's other blocks must keep the tolerance
    # with respect to the step's mean after the cheap block has replaced it.
    two_costliest = np.partition(loads, -2, axis=1)[:, -2:]
    rest_max = np.where(loads == two_costliest[:, 1:], two_costliest[:, :1], two_costliest[:, 1:])
    means = loads.mean(axis=1, keepdims=True) + (cost - loads) / blocks
    spared = (rest_max <= (1 + tolerance) * means) & (loads > cost)
    spared[0] = False
    if (helps & spared).any():
        return [((0, cheap), _argmin_among(excess, helps & spared))]
    if not spared.any():
        return []
    # Every block that can be spared is too costly for step 0. Let the cheapest of these replace a block in a step that
    # already holds one at least as costly, so that it raises no maximum; step 0 takes the block that it replaces.
    spare_block = _argmin_among(loads, spared)
    helps[spare_block[0]] = False
    helps &= two_costliest[:, 1:] >= loads[spare_block]
    return [((0, cheap), spare_block), ((0, cheap), _argmin_among(excess, helps))] if helps.any() else []


def _exceeds_tolerance(loads: np.ndarray, tolerance: float) -> np.ndarray:
    """Return which steps exceed the tolerance."""
    return loads.max(axis=-1) > (1 + tolerance) * loads.mean(axis=-1)


def _argmin_among(values: np.ndarray, mask: np.ndarray) -> _BlockIndex:
    step, block = np.unravel_index(np.argmin(np.where(mask, values, np.inf)), values.shape)
    return int(step), int(block)


def _shuffle(steps: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Shuffle the steps, and the blocks within each step."""
    steps = steps[generator.permutation(len(steps))]
    order = np.argsort(generator.random(steps.shape[:2]), axis=1)
    return np.take_along_axis(steps, order[:, :, None], axis=1)
