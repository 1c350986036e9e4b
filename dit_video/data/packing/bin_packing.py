"""Bin packing of examples into rows that are full and have similar attention costs, and of clips on canvases.

The attention cost of a row is the number of its token pairs that attend to each other, summed over clips, as attention
never crosses clips: the squared clip lengths, or fewer where an attention pattern leaves pairs out.

Clips are placed from the longest to the shortest. Each goes to the row with the largest remaining cost per remaining
token, so that a row that got a long clip is filled up with short ones:

    row 0   |--------- long ---------|short|short|short|          remaining cost is small: takes short clips
    row 1   |---- medium ----|---- medium ----|-- medium --|      remaining cost is average: takes clips alike

Where the shortest clips are too long to fill every gap, a few rows are emptied, and the other rows exchange a clip for
one of the freed clips that is longer by at most the gap.

On canvases, clips of similar sizes are together, and smaller ones in what they leave.
"""

import bisect
import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dit_video.core.errors import UserError
from dit_video.core.grid import find_distinct_grids
from dit_video.core.shared_array import SharesArrays
from dit_video.tokens import CanvasFill, CanvasShape, Grid, LayoutShape, sort_grids

CHUNK_ROWS = 2000
"""Rows that are filled together, from a random part of the examples: it bounds the time of the search."""
LENGTH_JITTER = 0.1
"""Random relative error of each length in the longest-first order, so that examples meet others in every epoch."""
TARGET_PADDING = 0.005
"""Share of padding that is aimed at in each chunk."""
POOL_FACTORS = (0, 4, 16)
"""Numbers of rows that are emptied to fill the gaps of others, per row that all gaps together would make. The first of
them that reaches `TARGET_PADDING` is used: larger ones make rows fuller, but their costs less equal."""
MAX_TRIED = 64
"""Maximum number of rows that are tried until one has room for text and segments, before a new row is opened."""
MAX_TRIED_CANVASES = 32
"""Number of open canvases that are tried for the next clip."""
CONSTANTS = (CHUNK_ROWS, LENGTH_JITTER, TARGET_PADDING, POOL_FACTORS, MAX_TRIED)


class RowArrays(NamedTuple):
    """Examples in rows, as two arrays."""

    examples: Int[np.ndarray, " n"]
    """Indices of the examples, row after row."""
    offsets: Int[np.ndarray, " R1"]
    """Start of each row in `examples`, then the end."""

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]]) -> "RowArrays":
        """Return these rows as arrays."""
        examples = np.concatenate([np.zeros(0, np.int64), *(np.asarray(row, np.int64) for row in rows)])
        return cls(examples, np.cumsum([0, *map(len, rows)]))

    def to_lists(self) -> list[list[int]]:
        """Return the examples of every row."""
        return [part.tolist() for part in np.split(self.examples, self.offsets[1:-1])]

    @property
    def lengths(self) -> Int[np.ndarray, " R"]:
        """Return the number of examples of every row."""
        return np.diff(self.offsets)

    def sum(self, values: Float[np.ndarray, " m"] | Int[np.ndarray, " m"]) -> np.ndarray:
        """Return the sum of the examples' values for every row."""
        return np.add.reduceat(values[self.examples], self.offsets[:-1])

    def take(self, numbers: Int[np.ndarray, " r"]) -> "RowArrays":
        """Return the rows of these numbers, in that order."""
        return take_spans(self.examples, self.offsets[numbers], self.lengths[numbers])


def take_spans(
    examples: Int[np.ndarray, " n"], starts: Int[np.ndarray, " r"], lengths: Int[np.ndarray, " r"]
) -> RowArrays:
    """Return rows that are parts of `examples`, of these lengths from these starts on."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return RowArrays(examples[np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])], offsets)


def fill_rows(
    examples: Int[np.ndarray, " m"],
    tokens: Int[np.ndarray, " n"],
    text: Int[np.ndarray, " n"],
    shape: LayoutShape,
    generator: np.random.Generator,
    attention_pairs: Float[np.ndarray, " n"],
) -> RowArrays:
    """Shuffle the examples and pack each into one row; no row exceeds one of the budgets.

    Args:
      examples: Indices into the sizes; an example may occur several times.
      tokens: Video tokens of every example, at most those of a row.
      text: Text tokens of every example, at most those of a row.
      shape: Budgets of a row.
      generator: Source of the random order.
      attention_pairs: Token pairs in the attention of every example.
    """
    budget = _Budget(tokens, text, shape)
    order = generator.permutation(examples)
    sizes = tokens[order].astype(np.float64)
    # The cost of every row, were all rows full and the cost spread evenly: the target of each row.
    cost = float(attention_pairs[order].sum() / sizes.sum()) * shape.tokens
    chunks = max(1, round(sizes.sum() / (CHUNK_ROWS * shape.tokens)))
    cuts = np.searchsorted(np.cumsum(sizes), sizes.sum() * np.arange(1, chunks) / chunks)
    parts: list[RowArrays] = []
    method = None
    for chunk in np.split(order, cuts):
        longest_first = np.argsort(-tokens[chunk] * generator.uniform(1 - LENGTH_JITTER, 1 + LENGTH_JITTER, len(chunk)))
        # Chunks are alike: what is best for the first is used for all.
        filled, method = _fill_chunk(chunk[longest_first], budget, (attention_pairs, cost), generator, method)
        parts.append(RowArrays.from_lists(filled))
    lengths = np.concatenate([part.lengths for part in parts])
    return RowArrays(np.concatenate([part.examples for part in parts]), np.concatenate([[0], np.cumsum(lengths)]))


class _Budget(NamedTuple):
    """Sizes of every example, and budgets of a row."""

    tokens: np.ndarray
    text: np.ndarray
    shape: LayoutShape


def _fill_chunk(
    order: np.ndarray,
    budget: _Budget,
    costs: tuple[np.ndarray, float],
    generator: np.random.Generator,
    method: int | None,
) -> tuple[list[list[int]], int]:
    """Return the most balanced rows with little padding (or else the fewest rows), and the method that made them.

    Methods are numbered in the order in which they are tried, from the most balanced to the fullest rows: first the
    balanced rows with each of `POOL_FACTORS` (0 changes nothing but to place the remaining examples), then best fit
    without balancing, in descending and in random order.
    """
    total, room = int(budget.tokens[order].sum()), budget.shape.tokens
    # Longest first is worst where text or segments run out before tokens do: its last rows hold many short clips. A
    # random order mixes long and short ones.
    orders = [order, generator.permutation(order)]
    balanced, unplaced = _fill_balanced(order, budget, *costs)

    def fill(method: int) -> list[list[int]]:
        if method < len(POOL_FACTORS):
            return _tighten(balanced, unplaced, budget, pool_factor=POOL_FACTORS[method])
        return _fill_best_fit(orders[method - len(POOL_FACTORS)], budget)

    if method is not None:
        return fill(method), method
    best, best_method = fill(0), 0
    for other in range(1, len(POOL_FACTORS) + len(orders)):
        # Stop if no packing has fewer rows, or if the padding is small enough.
        if (len(best) - 1) * room < total or 1 - total / (len(best) * room) <= TARGET_PADDING:
            break
        rows = fill(other)
        if len(rows) < len(best):
            best, best_method = rows, other
    return best, best_method


def _fill_balanced(
    order: np.ndarray, budget: _Budget, attention_pairs: np.ndarray, cost: float
) -> tuple[list[list[int]], list[int]]:
    """Return rows of similar cost from examples in descending order of length, and the examples that had no room.

    The number of rows is the smallest possible one, `ceil(tokens / row tokens)`, and all rows are open from the start.
    """
    tokens, text, shape = budget
    min_text = int(text[order].min())
    count = -(-int(tokens[order].sum()) // shape.tokens)
    rows: list[list[int]] = [[] for _ in range(count)]
    room, text_room, cost_room = [shape.tokens] * count, [shape.text] * count, [cost] * count
    # Heap of open rows by remaining cost per remaining token, negated: with full attention a clip of n tokens costs n
    # per token, so this quotient is the length of clip that would spend the row's cost and tokens at the same time.
    open_rows = [(-cost / shape.tokens, row) for row in range(count)]
    # Heap of rows by remaining tokens, negated: those that were too full for an example. Lengths descend (up to the
    # jitter), so these rows are looked at again only once an example is short enough.
    full_rows: list[tuple[int, int]] = []
    unplaced: list[int] = []
    columns = (values.tolist() for values in (order, tokens[order], text[order], attention_pairs[order]))
    for example, size, text_size, example_pairs in zip(*columns, strict=True):
        while full_rows and -full_rows[0][0] >= size:
            row = heapq.heappop(full_rows)[1]
            heapq.heappush(open_rows, (-cost_room[row] / room[row], row))
        rejected: list[tuple[float, int]] = []  # rows with room for the example's tokens, but not for its text
        row = -1
        while open_rows and len(rejected) < MAX_TRIED:
            candidate = heapq.heappop(open_rows)
            if room[candidate[1]] < size:
                heapq.heappush(full_rows, (-room[candidate[1]], candidate[1]))
            elif text_room[candidate[1]] < text_size:
                rejected.append(candidate)
            else:
                row = candidate[1]
                break
        for candidate in rejected:
            heapq.heappush(open_rows, candidate)
        if row < 0:
            unplaced.append(example)
            continue
        rows[row].append(example)
        room[row] -= size
        text_room[row] -= text_size
        cost_room[row] -= example_pairs
        # A row that has no room for any further example leaves both heaps for good.
        if room[row] and text_room[row] >= min_text and len(rows[row]) < shape.segments:
            heapq.heappush(open_rows, (-cost_room[row] / room[row], row))
    return [row for row in rows if row], unplaced


def _tighten(rows: list[list[int]], unplaced: list[int], budget: _Budget, *, pool_factor: int) -> list[list[int]]:
    """Pack the same examples into fewer rows: empty the rows with the largest gaps to fill the gaps of the others.

    `pool` rows are emptied per row that all gaps together would make. So there are more freed examples to choose from
    than gaps to fill; those that remain are packed by best fit.
    """
    gaps = budget.shape.tokens - np.asarray([int(budget.tokens[row].sum()) for row in rows])
    widest_first = np.argsort(-gaps, kind="stable").tolist()
    emptied = min(len(rows), pool_factor * -(-int(gaps.sum()) // budget.shape.tokens))
    freed = unplaced + [example for index in widest_first[:emptied] for example in rows[index]]
    # Sorted by length, so that the longest one that fits a gap is found by bisection.
    free = sorted(zip(budget.tokens[freed].tolist(), freed, strict=True))
    kept = [list(rows[index]) for index in widest_first[emptied:]]
    if pool_factor:
        for row in kept:
            _fill_gap(row, free, budget)
    if free:
        kept += _fill_best_fit(np.asarray([example for _, example in reversed(free)]), budget)
    return kept


def _fill_gap(row: list[int], free: list[tuple[int, int]], budget: _Budget) -> None:
    """Fill the gap of a row, in place, by adding free examples or exchanging examples for longer free ones.

    Each round makes the one change that gains the most tokens within the budgets. Slot `len(row)` stands for adding an
    example: there nothing is given back.
    """
    tokens, text, shape = budget
    sizes, text_sizes = tokens[row].tolist(), text[row].tolist()
    gap, text_room = shape.tokens - sum(sizes), shape.text - sum(text_sizes)
    # Rows may differ by their last tokens: gaps well below the target padding are not worth the search.
    while free and gap > TARGET_PADDING / 4 * shape.tokens:
        best, best_free, best_slot = 0, -1, -1
        slots = [*range(len(row)), len(row)] if len(row) < shape.segments else range(len(row))
        for slot in slots:
            size, freed_text = (sizes[slot], text_sizes[slot]) if slot < len(row) else (0, 0)
            # The longest free example of at most `size + gap` tokens: no example's index reaches len(tokens).
            index = bisect.bisect_right(free, (size + gap, len(tokens))) - 1
            if index >= 0 and free[index][0] - size > best and int(text[free[index][1]]) <= text_room + freed_text:
                best, best_free, best_slot = free[index][0] - size, index, slot
        if not best:
            return
        size, example = free.pop(best_free)
        if best_slot < len(row):
            text_room += text_sizes[best_slot]
            bisect.insort(free, (sizes[best_slot], row[best_slot]))
            row[best_slot], sizes[best_slot], text_sizes[best_slot] = example, size, int(text[example])
        else:
            row.append(example)
            sizes.append(size)
            text_sizes.append(int(text[example]))
        text_room -= int(text[example])
        gap -= best


def _fill_best_fit(order: np.ndarray, budget: _Budget) -> list[list[int]]:
    """Put each example, in order, into the fullest open row that has room for it, or open a new row."""
    tokens, text, shape = budget
    min_tokens, min_text = int(tokens[order].min()), int(text[order].min())
    rows: list[list[int]] = []
    text_room: list[int] = []
    open_rows: list[tuple[int, int]] = []  # (room for video tokens, row), sorted
    for example, size, text_size in zip(order.tolist(), tokens[order].tolist(), text[order].tolist(), strict=True):
        start = bisect.bisect_left(open_rows, (size, -1))
        for index in range(start, min(start + MAX_TRIED, len(open_rows))):
            if text_room[open_rows[index][1]] >= text_size:
                room, row = open_rows.pop(index)
                break
        else:
            room, row = shape.tokens, len(rows)
            rows.append([])
            text_room.append(shape.text)
        rows[row].append(example)
        room -= size
        text_room[row] -= text_size
        if room >= min_tokens and text_room[row] >= min_text and len(rows[row]) < shape.segments:
            bisect.insort(open_rows, (room, row))
    return rows


def swap_equal_sizes(
    rows: RowArrays, kinds: Int[np.ndarray, " n"], text: Int[np.ndarray, " n"], generator: np.random.Generator
) -> RowArrays:
    """Return rows of the same sizes in which examples of one kind (of size) and text size have swapped at random."""
    order, examples = rows.examples, np.empty_like(rows.examples)
    slots = np.lexsort((text[order], kinds[order]))
    examples[slots] = order[np.lexsort((generator.random(len(order)), text[order], kinds[order]))]
    return RowArrays(examples, rows.offsets)


def split_rows(rows: RowArrays, count: int) -> RowArrays:
    """Halve the rows with the most examples until there are `count` rows; the longest come first."""
    starts, lengths = rows.offsets[:-1], rows.lengths
    while True:
        longest_first = np.argsort(-lengths, kind="stable")
        starts, lengths = starts[longest_first], lengths[longest_first]
        if (missing := count - len(lengths)) <= 0:
            return take_spans(rows.examples, starts, lengths)
        # Each of the first rows becomes two halves; that of a row of one example is empty, and is left out.
        first = lengths[:missing] // 2
        halves = np.stack([first, lengths[:missing] - first], axis=-1).reshape(-1)
        half_starts = np.stack([starts[:missing], starts[:missing] + first], axis=-1).reshape(-1)
        starts = np.concatenate([half_starts[halves > 0], starts[missing:]])
        lengths = np.concatenate([halves[halves > 0], lengths[missing:]])


def keep_fullest(rows: RowArrays, count: int, tokens: Int[np.ndarray, " n"]) -> tuple[RowArrays, Int[np.ndarray, " d"]]:
    """Return the `count` rows with the most tokens, and the examples of all other rows."""
    ranked = rows.take(np.argsort(-rows.sum(tokens), kind="stable"))
    end = ranked.offsets[count]
    return RowArrays(ranked.examples[:end], ranked.offsets[: count + 1]), ranked.examples[end:]


class CanvasPacking(SharesArrays):
    """Packing of examples on canvases of one shape, for `RowPlanner`.

    Args:
      grids: Size of every example, in tokens.
      text: Text tokens of every example.
      shape: Capacity of a canvas.
      names: Names of the examples, for errors.

    Raises:
      UserError: If an example is larger than a canvas, or its sides are no multiples of the canvas's `cell`.
    """

    def __init__(
        self,
        grids: Sequence[Grid] | Int[np.ndarray, "n 3"],
        text: Int[np.ndarray, " n"],
        shape: CanvasShape,
        names: Sequence[str],
    ):
        self._text, self._shape = text, shape
        self._distinct, first, self.kinds = find_distinct_grids(np.asarray(grids))
        """`kinds` numbers the examples, equally those that can take each other's place."""
        for grid, index in zip(self._distinct, first.tolist(), strict=True):
            name = names[index]
            try:
                has_room = shape.find_corners([grid]) is not None
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
            if not has_room:
                raise UserError(
                    f"{name} has {grid} tokens, but a canvas only {shape.size}; raise the canvas's size or use a "
                    "smaller clip size"
                )

    def fill(self, examples: Int[np.ndarray, " m"], generator: np.random.Generator) -> RowArrays:
        """Shuffle the examples, and put each on the first open canvas with room for it, the tallest first."""
        shuffled = generator.permutation(examples).tolist()
        rows: list[list[int]] = []
        fills: list[CanvasFill] = []
        texts: list[int] = []
        for position in sort_grids(self._get_grids(shuffled)):
            example = shuffled[position]
            grid = self._distinct[self.kinds[example]]
            for number in range(max(0, len(rows) - MAX_TRIED_CANVASES), len(rows)):
                has_text_room = texts[number] + self._text[example] <= self._shape.text
                has_room = has_text_room and len(rows[number]) < self._shape.segments
                if has_room and fills[number].add(grid) is not None:
                    break
            else:
                number = len(rows)
                rows.append([])
                texts.append(0)
                fills.append(CanvasFill(self._shape))
                fills[number].add(grid)
            rows[number].append(example)
            texts[number] += int(self._text[example])
        return RowArrays.from_lists(rows)

    def split(self, rows: RowArrays, count: int) -> RowArrays:
        """Divide the canvases with the most examples until there are `count`."""
        canvases = sorted(rows.to_lists(), key=len, reverse=True)
        while len(canvases) < count:
            row = canvases.pop(0)
            parts = [row[::2], row[1::2]]
            if not all(self._shape.find_corners(self._get_grids(part)) for part in parts):
                # Without the example that was placed last, the others stay where they are.
                last = sort_grids(self._get_grids(row))[-1]
                parts = [row[:last] + row[last + 1 :], [row[last]]]
            canvases = sorted([*canvases, *parts], key=len, reverse=True)
        return RowArrays.from_lists(canvases)

    def _get_grids(self, examples: Sequence[int]) -> list[Grid]:
        return [self._distinct[kind] for kind in self.kinds[list(examples)].tolist()]
