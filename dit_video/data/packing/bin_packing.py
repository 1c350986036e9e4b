"""Which examples share a row: so that rows are full, and their attention costs as equal as can be.

A row costs the sum of its clips' pairs in attention, which never crosses clips: their squared lengths, or fewer where a
pattern leaves some out. Rows are filled from the longest clip to the shortest; each goes to the row that wants the
longest clips, which is the one with the most cost left per token left. So long clips end among short ones. Where the
shortest clips are too long to fill every gap, a few rows are emptied, and other rows exchange a clip for one of theirs
that is longer by what they lack.
"""

import bisect
import heapq
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from dit_video.tokens import RowShape

CHUNK = 2000
"""Rows that are filled together, from a random part of the examples."""
JITTER = 0.1
"""Longest first, where each length is off by a random tenth, so that epochs differ in who shares a row."""
PADDING = 0.005
"""The share that is aimed at, of each chunk."""
POOLS = (0, 4, 16)
"""Rows that are emptied to fill the gaps of others, for each row that the gaps would make. The first of these that
reaches `PADDING` is used; the more, the fuller the rows, and the less equal in cost."""
LOOK = 64
"""Rows that are tried until one has room in text and segments, before another is opened."""
CONSTANTS = (CHUNK, JITTER, PADDING, POOLS, LOOK)


def fill_rows(
    examples: Int[np.ndarray, " m"],
    tokens: Int[np.ndarray, " n"],
    text: Int[np.ndarray, " n"],
    shape: RowShape,
    generator: np.random.Generator,
    pairs: Float[np.ndarray, " n"],
) -> list[list[int]]:
    """Shuffle the examples and pack each into one row; no row exceeds one of the budgets.

    Args:
      examples: indices into the sizes; one may come several times.
      tokens: video tokens of every example, at most a row's.
      text: text tokens of every example, at most a row's.
      shape: the budgets.
      generator: of the shuffle.
      pairs: in the attention of every example.
    """
    order = generator.permutation(examples)
    sizes = tokens[order].astype(np.float64)
    cost = float(pairs[order].sum() / sizes.sum()) * shape.tokens
    chunks = max(1, round(sizes.sum() / (CHUNK * shape.tokens)))
    cuts = np.searchsorted(np.cumsum(sizes), sizes.sum() * np.arange(1, chunks) / chunks)
    rows: list[list[int]] = []
    method = None
    for chunk in np.split(order, cuts):
        longest_first = np.argsort(-tokens[chunk] * generator.uniform(1 - JITTER, 1 + JITTER, len(chunk)))
        # Chunks are alike: what is best for the first is used for all.
        filled, method = _fill_chunk(chunk[longest_first], tokens, text, shape, (pairs, cost), generator, method)
        rows += filled
    return rows


def _fill_chunk(
    order: np.ndarray,
    tokens: np.ndarray,
    text: np.ndarray,
    shape: RowShape,
    costs: tuple[np.ndarray, float],
    generator: np.random.Generator,
    method: int | None,
) -> tuple[list[list[int]], int]:
    """The most balanced rows with little padding; where none has little, the fewest rows. And by which method."""
    total = int(tokens[order].sum())
    # Longest first is at its worst where text or segments run out before tokens do; a random order has them all mixed.
    orders = [order, generator.permutation(order)]
    balanced, left = _balanced(order, tokens, text, shape, *costs)

    def fill(method: int) -> list[list[int]]:
        if method < len(POOLS):
            return _tightened(balanced, left, tokens, text, shape, pool=POOLS[method])
        return _best_fit(orders[method - len(POOLS)], tokens, text, shape)

    if method is not None:
        return fill(method), method
    best, best_method = fill(0), 0
    for other in range(1, len(POOLS) + len(orders)):
        if (len(best) - 1) * shape.tokens < total or 1 - total / (len(best) * shape.tokens) <= PADDING:
            break
        rows = fill(other)
        if len(rows) < len(best):
            best, best_method = rows, other
    return best, best_method


def _balanced(
    order: np.ndarray, tokens: np.ndarray, text: np.ndarray, shape: RowShape, pairs: np.ndarray, cost: float
) -> tuple[list[list[int]], list[int]]:
    """Rows of equal cost, as far as that goes, from examples in descending order; and the examples that had no room."""
    least_text = int(text[order].min())
    count = -(-int(tokens[order].sum()) // shape.tokens)
    rows: list[list[int]] = [[] for _ in range(count)]
    room, words_room, cost_room = [shape.tokens] * count, [shape.text] * count, [cost] * count
    # A heap by the length wanted, negative: the cost that a row has left, for each token that it has left.
    wanting = [(-cost / shape.tokens, row) for row in range(count)]
    narrow: list[tuple[int, int]] = []  # rows without room for the last example: a heap by room, negative
    left: list[int] = []
    columns = (each.tolist() for each in (order, tokens[order], text[order], pairs[order]))
    for example, size, words, attended in zip(*columns, strict=True):
        while narrow and -narrow[0][0] >= size:
            row = heapq.heappop(narrow)[1]
            heapq.heappush(wanting, (-cost_room[row] / room[row], row))
        wordy: list[tuple[float, int]] = []  # rows with room for its tokens, not for its text
        row = -1
        while wanting and len(wordy) < LOOK:
            candidate = heapq.heappop(wanting)
            if room[candidate[1]] < size:
                heapq.heappush(narrow, (-room[candidate[1]], candidate[1]))
            elif words_room[candidate[1]] < words:
                wordy.append(candidate)
            else:
                row = candidate[1]
                break
        for candidate in wordy:
            heapq.heappush(wanting, candidate)
        if row < 0:
            left.append(example)
            continue
        rows[row].append(example)
        room[row] -= size
        words_room[row] -= words
        cost_room[row] -= attended
        if room[row] and words_room[row] >= least_text and len(rows[row]) < shape.segments:
            heapq.heappush(wanting, (-cost_room[row] / room[row], row))
    return [row for row in rows if row], left


def _tightened(
    rows: list[list[int]], left: list[int], tokens: np.ndarray, text: np.ndarray, shape: RowShape, *, pool: int
) -> list[list[int]]:
    """The same examples in fewer rows: the gaps of most rows filled from the rows with the largest ones."""
    gaps = shape.tokens - np.asarray([int(tokens[row].sum()) for row in rows])
    widest_first = np.argsort(-gaps, kind="stable").tolist()
    emptied = min(len(rows), pool * -(-int(gaps.sum()) // shape.tokens))
    loose = left + [example for index in widest_first[:emptied] for example in rows[index]]
    # Examples without a row, by length.
    free = sorted(zip(tokens[loose].tolist(), loose, strict=True))
    kept = [list(rows[index]) for index in widest_first[emptied:]]
    if pool:
        for row in kept:
            _fill_gap(row, free, tokens, text, shape)
    if free:
        kept += _best_fit(np.asarray([example for _, example in reversed(free)]), tokens, text, shape)
    return kept


def _fill_gap(
    row: list[int], free: list[tuple[int, int]], tokens: np.ndarray, text: np.ndarray, shape: RowShape
) -> None:
    """Add a free example to the row or exchange one for a longer one, as long as that makes the row fuller."""
    sizes, words = tokens[row].tolist(), text[row].tolist()
    gap, words_room = shape.tokens - sum(sizes), shape.text - sum(words)
    while free and gap > PADDING / 4 * shape.tokens:
        best, best_free, best_place = 0, -1, -1
        places = [*range(len(row)), len(row)] if len(row) < shape.segments else range(len(row))
        for place in places:
            size, freed = (sizes[place], words[place]) if place < len(row) else (0, 0)
            index = bisect.bisect_right(free, (size + gap, len(tokens))) - 1
            if index >= 0 and free[index][0] - size > best and int(text[free[index][1]]) <= words_room + freed:
                best, best_free, best_place = free[index][0] - size, index, place
        if not best:
            return
        size, example = free.pop(best_free)
        if best_place < len(row):
            words_room += words[best_place]
            bisect.insort(free, (sizes[best_place], row[best_place]))
            row[best_place], sizes[best_place], words[best_place] = example, size, int(text[example])
        else:
            row.append(example)
            sizes.append(size)
            words.append(int(text[example]))
        words_room -= int(text[example])
        gap -= best


def _best_fit(order: np.ndarray, tokens: np.ndarray, text: np.ndarray, shape: RowShape) -> list[list[int]]:
    """Put each example, in order, into the open row with the least room for it that suffices, or open another."""
    least_tokens, least_text = int(tokens[order].min()), int(text[order].min())
    rows: list[list[int]] = []
    text_room: list[int] = []
    is_open: list[tuple[int, int]] = []  # (room for video tokens, row), sorted
    for example, size, words in zip(order.tolist(), tokens[order].tolist(), text[order].tolist(), strict=True):
        start = bisect.bisect_left(is_open, (size, -1))
        for place in range(start, min(start + LOOK, len(is_open))):
            if text_room[is_open[place][1]] >= words:
                room, row = is_open.pop(place)
                break
        else:
            room, row = shape.tokens, len(rows)
            rows.append([])
            text_room.append(shape.text)
        rows[row].append(example)
        room -= size
        text_room[row] -= words
        if room >= least_tokens and text_room[row] >= least_text and len(rows[row]) < shape.segments:
            bisect.insort(is_open, (room, row))
    return rows


def exchanged(
    rows: Sequence[Sequence[int]], tokens: np.ndarray, text: np.ndarray, generator: np.random.Generator
) -> list[list[int]]:
    """The same rows by size, of the same examples; those of equal sizes change places at random."""
    order, offsets = flat(rows)
    places = np.lexsort((text[order], tokens[order]))
    examples = order[np.lexsort((generator.random(len(order)), text[order], tokens[order]))]
    order[places] = examples
    return [order[start:stop].tolist() for start, stop in itertools.pairwise(offsets)]


def split(plan: list[list[int]], rows: int) -> list[list[int]]:
    """Halve the rows with the most examples until there are `rows` of them."""
    plan = sorted(plan, key=len, reverse=True)
    while len(plan) < rows:
        missing = rows - len(plan)
        halves = []
        for row in plan[:missing]:
            halves += [row[: len(row) // 2], row[len(row) // 2 :]] if len(row) > 1 else [row]
        plan = sorted(halves + plan[missing:], key=len, reverse=True)
    return plan


def fullest(rows: Sequence[Sequence[int]], count: int, tokens: np.ndarray) -> tuple[list[list[int]], list[int]]:
    """The `count` rows with the most tokens, and the examples of the others."""
    ranked = sorted(rows, key=lambda row: -int(tokens[list(row)].sum()))
    return [list(row) for row in ranked[:count]], [example for row in ranked[count:] for example in row]


def flat(rows: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " R1"]]:
    """The examples row after row, and where each row starts (and the last one ends)."""
    order = np.concatenate([np.asarray(row, np.int64) for row in rows])
    return order, np.cumsum([0, *map(len, rows)])
