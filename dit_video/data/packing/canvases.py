"""Packing of examples on canvases: clips of similar sizes together, smaller ones in what they leave."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from dit_video.core.errors import UserError
from dit_video.core.grid import find_distinct_grids
from dit_video.core.shared_array import SharesArrays
from dit_video.data.packing.bin_packing import RowArrays
from dit_video.tokens import CanvasFill, CanvasShape, Grid, sort_grids

MAX_TRIED = 32
"""Number of open canvases that are tried for the next clip."""


class CanvasPacking(SharesArrays):
    """Packing of examples on canvases of one shape, for `RowStream`.

    Args:
      grids: size of every example, in tokens.
      text: text tokens of every example.
      shape: capacity of a canvas.
      names: names of the examples, for errors.

    Raises:
      UserError: an example is larger than a canvas, or its sides are no multiples of the canvas's `cell`.
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
            for number in range(max(0, len(rows) - MAX_TRIED), len(rows)):
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
