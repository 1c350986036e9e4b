"""Clips of many sizes side by side on canvases of a few sizes: a bounded number of programs, with little padding.

What an autoencoder's convolutions see beyond the border of a picture are zeros. So clips can share a canvas if
activations between them are zero before every convolution, and a clip that is shorter than its canvas ends in frames
that causal layers do not see. Every clip then gets the latents that it gets alone.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from dit_video.core.errors import UserError
from dit_video.tokens import Grid

PROGRAMS = 8
"""Canvas sizes of one data set, at most: each is a program."""
PIXELS = 1 << 23
"""Of a canvas, over all its frames, if no clip needs more."""
_SAMPLE = 1000
"""Clips that decide the canvases' shape."""
_LOOK = 256
"""Open shelves, or canvases, that are tried for the next clip, or shelf."""


class Place(NamedTuple):
    """Where a clip lies."""

    clip: int
    row: int
    """in pixels, of its upper left corner"""
    column: int


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Clips that are encoded in one picture."""

    size: Grid
    """frames and pixels; all clips begin at the first frame"""
    places: tuple[Place, ...]


def arrange(sizes: Sequence[Grid], *, stride: Grid, pixels: int = PIXELS, programs: int = PROGRAMS) -> list[Canvas]:
    """Canvases of at most `programs` sizes that hold every clip once, a latent position or more between neighbours.

    Where there are no more sizes than programs, every clip has a canvas of its own. Else lengths are rounded up to at
    most `programs` ones, so that the fewest pixels are added; the clips of a length stand on shelves, the highest
    first (first fit by decreasing height: Coffman et al., SIAM J. Comput. 9(4), 1980), and so do the shelves in
    canvases.

    Args:
      sizes: of the clips, in frames and pixels; heights and widths are multiples of the stride.
      stride: of the autoencoder.
      pixels: of a canvas over all its frames, about; more if a clip is larger, fewer if there are fewer clips.
      programs: how many sizes of canvases there may be.

    Raises:
      UserError: less than one program or pixel.
    """
    if programs < 1 or pixels < 1:
        raise UserError(f"clips are encoded by programs={programs} on canvases of pixels={pixels}; use at least 1")
    if len(set(sizes)) <= programs:  # nothing is gained by sharing
        order = sorted(range(len(sizes)), key=lambda index: (sizes[index], index))
        return [Canvas(size=sizes[index], places=(Place(index, 0, 0),)) for index in order]
    canvases: list[Canvas] = []
    length_of = _lengths(sizes, programs)
    for length in sorted(set(length_of.values())):
        members = [index for index, size in enumerate(sizes) if length_of[size.t] == length]
        cells = [(sizes[index].h // stride.h, sizes[index].w // stride.w) for index in members]
        height, width, placed = _packed(cells, max(1, pixels // (length * stride.h * stride.w)))
        size = Grid(length, height * stride.h, width * stride.w)
        canvases += [
            Canvas(
                size=size,
                places=tuple(Place(members[clip], row * stride.h, column * stride.w) for clip, row, column in one),
            )
            for one in placed
        ]
    return canvases


def covers(sizes: Sequence[Grid], *, programs: int = PROGRAMS) -> list[Grid]:
    """At most `programs` sizes of which every clip fits into one, for clips that are encoded as they come.

    Of all sizes the two are merged, again and again, whose common size adds the fewest pixels over all clips. They are
    given by increasing volume, so that a clip's is the first that holds it.

    Raises:
      UserError: less than one program.
    """
    if programs < 1:
        raise UserError(f"clips are encoded by programs={programs}; use at least 1")
    unique, counts = np.unique(np.asarray(sizes, np.int64).reshape(-1, 3), axis=0, return_counts=True)
    different, counts, alive = unique.astype(np.float64), counts.astype(np.float64), np.ones(len(unique), bool)

    def added_by(index: int) -> np.ndarray:
        """Pixels that a size's merger with every other one adds; infinite with itself and with what is merged."""
        pixels = different.prod(axis=1) * counts
        merged = np.maximum(different[index], different).prod(axis=1) * (counts[index] + counts)
        return np.where(alive & (np.arange(len(alive)) != index), merged - pixels[index] - pixels, np.inf)

    added = np.stack([added_by(index) for index in range(len(different))])
    for _ in range(len(different) - programs):
        one, other = sorted(divmod(int(np.argmin(added)), len(added)))
        different[one], counts[one] = np.maximum(different[one], different[other]), counts[one] + counts[other]
        alive[other] = False
        added[other], added[:, other] = np.inf, np.inf
        added[one] = added[:, one] = added_by(one)
    left = different[alive].astype(np.int64).tolist()
    return sorted((Grid(*size) for size in left), key=lambda size: (size.volume, size))


def occupied(canvas: Canvas, sizes: Sequence[Grid], stride: Grid) -> Int32[np.ndarray, "h w"]:
    """Which of a canvas's clips each latent position belongs to: 1, 2, … in the order of its places; 0 is none."""
    result = np.zeros((canvas.size.h // stride.h, canvas.size.w // stride.w), np.int32)
    for number, (clip, row, column) in enumerate(canvas.places, 1):
        top, left = row // stride.h, column // stride.w
        result[top : top + sizes[clip].h // stride.h, left : left + sizes[clip].w // stride.w] = number
    return result


def padding(canvases: Sequence[Canvas], sizes: Sequence[Grid]) -> float:
    """Share of the canvases' pixels that belong to no clip."""
    total = sum(canvas.size.volume for canvas in canvases)
    return 1 - sum(size.volume for size in sizes) / total if total else 0.0


def _lengths(sizes: Sequence[Grid], most: int) -> dict[int, int]:
    """Every length, rounded up to one of `most`: the choice that adds the fewest pixels, by dynamic programming."""
    areas: dict[int, int] = {}
    for size in sizes:
        areas[size.t] = areas.get(size.t, 0) + size.h * size.w
    lengths = sorted(areas)
    below = [0, *itertools.accumulate(areas[length] for length in lengths)]
    # best[n]: the least padded pixels of the n shortest lengths, and the rounded lengths that give it.
    best: list[tuple[int, tuple[int, ...]]] = [(0, ())] + [
        (below[n] * lengths[n - 1], (lengths[n - 1],)) for n in range(1, len(lengths) + 1)
    ]
    for _ in range(most - 1):
        best = [best[0]] + [
            min(
                best[n],
                min(
                    (best[m][0] + (below[n] - below[m]) * lengths[n - 1], (*best[m][1], lengths[n - 1]))
                    for m in range(n)
                ),
            )
            for n in range(1, len(lengths) + 1)
        ]
    chosen = best[-1][1]
    return {length: next(one for one in chosen if one >= length) for length in lengths}


_Cell = tuple[int, int, int]
"""clip, row, column"""


def _packed(cells: Sequence[tuple[int, int]], area: int) -> tuple[int, int, list[list[_Cell]]]:
    """Height and width of the canvases of about `area` positions, and what lies on each."""
    highest, widest = max(height for height, _ in cells), max(width for _, width in cells)
    # The shape is chosen by trying it on a part of the clips.
    sample = [cells[index] for index in range(0, len(cells), -(-len(cells) // _SAMPLE))]
    # A gap beside each clip and below it.
    total = sum((height + 1) * (width + 1) for height, width in sample)
    each = min(area, total)
    best: tuple[int, int, int] | None = None
    for width in _sides(math.sqrt(each), [width for _, width in sample], widest):
        shelves = _shelves(sample, width)
        stacked = sum(height + 1 for height, _ in shelves) - 1
        for height in _sides(each / width, [height for height, _ in sample], highest):
            height = max(highest, min(height, stacked))
            computed = len(_stacked(shelves, height)) * height * width
            best = min(best or (computed, height, width), (computed, height, width))
    assert best is not None
    _, height, width = best
    return height, width, _stacked(_shelves(cells, width), height)


def _sides(about: float, members: Sequence[int], least: int) -> list[int]:
    """Lengths to try for a side: some around `about`, and those that the commonest members fill to the end."""
    low, high = 0.6 * about, 1.6 * about
    tried = {round(low + (high - low) * step / 8) for step in range(9)}
    for member, _ in Counter(members).most_common(3):
        tried |= {
            (member + 1) * count - 1 for count in range(math.ceil(low / (member + 1)), int(high / (member + 1)) + 1)
        }
    return sorted({max(least, side) for side in tried})


def _shelves(cells: Sequence[tuple[int, int]], width: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Shelves of (height, [(clip, column)])."""
    shelves: list[tuple[int, list[tuple[int, int]]]] = []
    used: list[int] = []
    for clip in sorted(range(len(cells)), key=lambda clip: (-cells[clip][0], -cells[clip][1], clip)):
        needs = cells[clip][1]
        for place in range(max(0, len(shelves) - _LOOK), len(shelves)):
            if used[place] + needs <= width:
                break
        else:
            place = len(shelves)
            shelves.append((cells[clip][0], []))
            used.append(0)
        shelves[place][1].append((clip, used[place]))
        used[place] += needs + 1
    return shelves


def _stacked(shelves: list[tuple[int, list[tuple[int, int]]]], height: int) -> list[list[_Cell]]:
    """The canvases that hold the shelves, the highest shelves first."""
    canvases: list[list[_Cell]] = []
    used: list[int] = []
    for high, members in shelves:
        for place in range(max(0, len(canvases) - _LOOK), len(canvases)):
            if used[place] + high <= height:
                break
        else:
            place = len(canvases)
            canvases.append([])
            used.append(0)
        canvases[place] += [(clip, used[place], column) for clip, column in members]
        used[place] += high + 1
    return canvases
