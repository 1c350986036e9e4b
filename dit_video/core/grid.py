"""Sizes along time, height and width."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32


class Grid(NamedTuple):
    """A size along (time, height, width): a clip's in pixels, latents or tokens, a stride's or a patch's."""

    t: int
    h: int
    w: int

    def __str__(self) -> str:
        return f"{self.t}x{self.h}x{self.w}"

    @property
    def volume(self) -> int:
        return self.t * self.h * self.w


def find_distinct_grids(
    grids: Int[np.ndarray, "n 3"],
) -> tuple[list[Grid], Int[np.ndarray, " k"], Int[np.ndarray, " n"]]:
    """Return the distinct sizes in ascending order, the first index of each, and each row's index among them."""
    bits = [int(length).bit_length() for length in grids.max(axis=0, initial=0)]
    t, h, w = grids.astype(np.int64).T  # one number a row, which is sorted many times faster than rows are
    _, first, inverse = np.unique((t << bits[1] | h) << bits[2] | w, return_index=True, return_inverse=True)
    return [Grid(*row) for row in grids[first].tolist()], first, inverse


def map_grids(function: Callable[[Grid], Grid], grids: Int[np.ndarray, "n 3"]) -> Int32[np.ndarray, "n 3"]:
    """Return the function's value for each row; it is called once per distinct row."""
    distinct, _, inverse = find_distinct_grids(grids)
    return np.asarray([function(grid) for grid in distinct], np.int32).reshape(-1, 3)[inverse]
