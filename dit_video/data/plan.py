"""Which examples share a row, for a whole epoch: a function of their sizes, the seed and the epoch.

Every host makes the same plan, reads its own rows of it, and can start at any row. Every epoch has the same number of
rows, so the row of any step is known without planning the epochs before it.
"""

import bisect
import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt32

from dit_video import rng
from dit_video.errors import UserError
from dit_video.tokens import RowShape

WINDOW = 1000
"""Open rows. When another is opened, the fullest one is closed."""
LOOK = 64
"""Rows that are tried, from the best fit in video tokens on, until one has room in text and segments."""
ATTEMPTS = 4
SLACK = 1000
"""One row in this many is left free, so that nearly every shuffle fits into the same number of rows."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RowPlan:
    """The rows of one epoch."""

    order: Int[np.ndarray, " n"]
    """Examples, row after row."""
    offsets: Int[np.ndarray, " R1"]
    """Row r holds `order[offsets[r]:offsets[r + 1]]`."""
    padding: float
    """Share of video tokens that are padding."""
    cost: Float[np.ndarray, " R"]
    """Of each row, the sum of its clips' squared tokens, in millions: what attention costs, up to a factor."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> Int[np.ndarray, " G"]:
        """The examples of one row."""
        return self.order[self.offsets[index] : self.offsets[index + 1]]

    @property
    def rows(self) -> list[list[int]]:
        """The examples of every row."""
        return [self.row(index).tolist() for index in range(len(self))]

    @functools.cached_property
    def hash(self) -> str:
        """Equal for equal plans."""
        return hashlib.sha256(self.order.astype("<i8").tobytes() + self.offsets.astype("<i8").tobytes()).hexdigest()[
            :16
        ]


def plan_rows(
    tokens: Int[np.ndarray, " n"],
    text: Int[np.ndarray, " n"],
    shape: RowShape,
    *,
    seed: int,
    epoch: int,
    names: Sequence[str] | None = None,
) -> RowPlan:
    """Shuffle the examples by (seed, epoch) and put each into the open row that it fits best.

    Args:
      tokens: video tokens of every example.
      text: text tokens of every example.
      shape: the budgets of a row: none of the three is exceeded.
      seed: of the run.
      epoch: from 0.
      names: of the examples, for errors.

    Raises:
      UserError: no examples, or an example larger than a row.
    """
    _check(tokens, text, shape, names)
    rows, generator = _shuffled(tokens, text, shape, seed, epoch, attempt=0)
    return _plan(rows, tokens, shape, generator)


class RowStream:
    """The endless sequence of rows, epoch after epoch, by row number.

    Every epoch has the rows of epoch 0 and `1 / SLACK` more. A plan with fewer is brought to that number by halving
    rows. One with more is shuffled again, and after `ATTEMPTS` the rows of epoch 0 are used, with examples of equal
    sizes changing places: that always fits.

    Args:
      tokens: video tokens of every example.
      text: text tokens of every example.
      shape: the budgets of a row.
      seed: of the run.
      names: of the examples, for errors.

    Raises:
      UserError: see `plan_rows`.
    """

    def __init__(
        self,
        tokens: Int[np.ndarray, " n"],
        text: Int[np.ndarray, " n"],
        shape: RowShape,
        *,
        seed: int,
        names: Sequence[str] | None = None,
    ):
        _check(tokens, text, shape, names)
        self._tokens, self._text, self._shape, self._seed = tokens, text, shape, seed
        self._first = _shuffled(tokens, text, shape, seed, 0, attempt=0)[0]
        self.rows_per_epoch = min(len(tokens), len(self._first) + len(self._first) // SLACK)
        self._plans = _Recent(self._plan_epoch)

    def epoch(self, number: int) -> RowPlan:
        """The plan of one epoch; the last few are kept."""
        return self._plans(number)

    def row(self, number: int) -> tuple[Int[np.ndarray, " G"], UInt32[np.ndarray, " G"]]:
        """The examples of a row, and their ranks: the running number of each over the whole stream, modulo 2**32."""
        epoch, index = divmod(number, self.rows_per_epoch)
        plan = self.epoch(epoch)
        examples = plan.row(index)
        first = epoch * len(self._tokens) + int(plan.offsets[index])
        ranks = (np.arange(first, first + len(examples), dtype=np.uint64) & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        return examples, ranks

    @functools.cached_property
    def hash(self) -> str:
        """Equal for streams that give equal rows. Together with the step it is the whole state of the data."""
        sizes = np.stack([self._tokens, self._text]).astype("<i8").tobytes()
        constants = (self._shape, self._seed, self.rows_per_epoch, WINDOW, LOOK, ATTEMPTS)
        return hashlib.sha256(sizes + repr(constants).encode()).hexdigest()[:16]

    def _plan_epoch(self, epoch: int) -> RowPlan:
        for attempt in range(ATTEMPTS):
            rows, generator = _shuffled(self._tokens, self._text, self._shape, self._seed, epoch, attempt=attempt)
            if len(rows) <= self.rows_per_epoch:
                break
        else:
            rows = _exchanged(self._first, self._tokens, self._text, generator)
        return _plan(_split(rows, self.rows_per_epoch), self._tokens, self._shape, generator)


class _Recent:
    """The last few values of a function of one number. (`functools.lru_cache` can't be pickled to workers.)"""

    def __init__(self, function: Callable[[int], RowPlan], *, keep: int = 3):
        self._function, self._keep = function, keep
        self._values: dict[int, RowPlan] = {}

    def __call__(self, number: int) -> RowPlan:
        value = self._values.get(number)
        if value is None:
            value = self._function(number)
            # A new dict, so that a thread that reads the old one is not disturbed.
            kept = list(self._values.items())[-(self._keep - 1) :]
            self._values = {**dict(kept), number: value}
        return value

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_values": {}}


def _check(tokens: np.ndarray, text: np.ndarray, shape: RowShape, names: Sequence[str] | None) -> None:
    if not len(tokens) or len(tokens) != len(text):
        raise UserError(f"a plan needs examples with both sizes, {len(tokens)} tokens and {len(text)} text were given")
    if shape.segments < 1:
        raise UserError(f"a row needs room for at least one segment, segments={shape.segments}")
    for sizes, room, kind, what, fix in (
        (tokens, shape.tokens, "video", "tokens", "use a smaller clip size"),
        (text, shape.text, "text", "text", "shorten its caption"),
    ):
        largest = int(np.argmax(sizes))
        if sizes[largest] > room:
            name = names[largest] if names is not None else f"example {largest}"
            raise UserError(
                f"{name} has {sizes[largest]} {kind} tokens, a row has room for {room} "
                f"({int((sizes > room).sum())} examples are too large); raise the row's {what} or {fix}"
            )
    if int(tokens.min()) < 1:
        smallest = int(np.argmin(tokens))
        name = names[smallest] if names is not None else f"example {smallest}"
        raise UserError(f"{name} has no tokens; leave it out")


def _plan(rows: list[list[int]], tokens: np.ndarray, shape: RowShape, generator: np.random.Generator) -> RowPlan:
    """The rows in random order, whatever the order in which best fit closed them."""
    rows = [rows[index] for index in generator.permutation(len(rows))]
    order, offsets = _flat(rows)
    return RowPlan(
        order=order,
        offsets=offsets,
        padding=1 - int(tokens.sum()) / (len(rows) * shape.tokens),
        cost=np.add.reduceat(tokens[order].astype(np.float64) ** 2 / 1e6, offsets[:-1]),
    )


def _flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    order = np.concatenate([np.asarray(row, np.int64) for row in rows])
    return order, np.cumsum([0, *map(len, rows)])


def _shuffled(
    tokens: np.ndarray, text: np.ndarray, shape: RowShape, seed: int, epoch: int, *, attempt: int
) -> tuple[list[list[int]], np.random.Generator]:
    generator = rng.host(seed, "row plan", epoch, attempt)
    return _best_fit(generator.permutation(len(tokens)), tokens, text, shape), generator


def _exchanged(
    rows: list[list[int]], tokens: np.ndarray, text: np.ndarray, generator: np.random.Generator
) -> list[list[int]]:
    """The same rows by size; examples of equal sizes change places at random."""
    order, offsets = _flat(rows)
    places = np.lexsort((text[order], tokens[order]))
    examples = np.lexsort((generator.random(len(tokens)), text, tokens))
    order[places] = examples
    return [order[start:stop].tolist() for start, stop in itertools.pairwise(offsets)]


def _best_fit(order: np.ndarray, tokens: np.ndarray, text: np.ndarray, shape: RowShape) -> list[list[int]]:
    """Put each example, in order, into the open row with the least room for it that suffices, or open another."""
    least_tokens, least_text = int(tokens.min()), int(text.min())
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
            if len(is_open) >= WINDOW:
                del is_open[0]
            bisect.insort(is_open, (room, row))
    return rows


def _split(plan: list[list[int]], rows: int) -> list[list[int]]:
    """Halve the rows with the most examples until there are `rows` of them."""
    plan = sorted(plan, key=len, reverse=True)
    while len(plan) < rows:
        missing = rows - len(plan)
        halves = []
        for row in plan[:missing]:
            halves += [row[: len(row) // 2], row[len(row) // 2 :]] if len(row) > 1 else [row]
        plan = sorted(halves + plan[missing:], key=len, reverse=True)
    return plan
