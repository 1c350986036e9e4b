"""Packing of clips of many sizes on canvases of a few sizes: a bounded number of programs, with little padding.

An autoencoder's convolutions see zeros beyond the border of a picture. Clips can therefore share a canvas if
activations between them are zeroed before every convolution, and a clip shorter than its canvas is padded with later
frames, which causal layers do not see. Every clip gets the latents that it would get alone.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from dit_video.core.errors import check_at_least
from dit_video.tokens import Grid

MAX_PROGRAMS = 8
"""Maximum number of canvas sizes for one data set; each size is compiled once."""
CANVAS_PIXELS = 1 << 23
"""Pixels of a canvas over all its frames, unless a clip needs more."""
_SAMPLE_CLIPS = 1000
"""Approximate number of clips used to choose the shape of the canvases."""
_MAX_TRIED = 256
"""Number of open shelves or canvases tried for the next clip or shelf."""


class Slot(NamedTuple):
    """The position of one clip on a canvas."""

    clip: int
    row: int
    """Pixel row of the upper left corner."""
    column: int
    """Pixel column of the upper left corner."""


@dataclass(frozen=True, kw_only=True)
class ClipCanvas:
    """Clips that are encoded as one picture."""

    size: Grid
    """Frames, height and width in pixels; all clips start at the first frame."""
    slots: tuple[Slot, ...]


def pack_canvases(
    sizes: Sequence[Grid], *, stride: Grid, pixels: int = CANVAS_PIXELS, max_programs: int = MAX_PROGRAMS
) -> list[ClipCanvas]:
    """Pack clips on canvases of at most `max_programs` sizes, each clip once, one latent position or more apart.

    If there are at most `max_programs` sizes, every clip has a canvas of its own. Otherwise lengths are rounded up to
    at most `max_programs` different ones so that the fewest pixels are added. Clips of one length are put on shelves,
    tallest first (first fit by decreasing height: Coffman et al., SIAM J. Comput. 9(4), 1980), and so are the shelves
    on canvases.

    Args:
      sizes: Sizes of the clips in frames and pixels; heights and widths are multiples of the stride.
      stride: Stride of the autoencoder.
      pixels: Approximate pixels of a canvas over all its frames; more if a clip is larger, fewer for few clips.
      max_programs: Maximum number of canvas sizes.

    Raises:
      UserError: If `max_programs` or `pixels` is below 1.
    """
    check_at_least(1, max_programs=max_programs, pixels=pixels)
    if len(set(sizes)) <= max_programs:
        # Sharing canvases would not save a program.
        order = sorted(range(len(sizes)), key=lambda index: (sizes[index], index))
        return [ClipCanvas(size=sizes[index], slots=(Slot(index, 0, 0),)) for index in order]
    canvases: list[ClipCanvas] = []
    length_of = _round_lengths(sizes, max_programs)
    for length in sorted(set(length_of.values())):
        members = [index for index, size in enumerate(sizes) if length_of[size.t] == length]
        cells = [(sizes[index].h // stride.h, sizes[index].w // stride.w) for index in members]
        # A canvas of `area` latent positions has about `pixels` pixels over its `length` frames.
        height, width, canvas_cells = _pack_cells(cells, max(1, pixels // (length * stride.h * stride.w)))
        size = Grid(length, height * stride.h, width * stride.w)
        for canvas_slots in canvas_cells:
            slots = [Slot(members[clip], row * stride.h, column * stride.w) for clip, row, column in canvas_slots]
            canvases.append(ClipCanvas(size=size, slots=tuple(slots)))
    return canvases


def merge_sizes(sizes: Sequence[Grid], *, max_programs: int = MAX_PROGRAMS) -> list[Grid]:
    """Return at most `max_programs` sizes such that every clip fits into one, for clips encoded one by one.

    Repeatedly merges the two sizes whose common size adds the fewest pixels over all clips. The result is sorted by
    volume: a clip should use the first size that holds it.

    Raises:
      UserError: If `max_programs` is below 1.
    """
    check_at_least(1, max_programs=max_programs)
    unique, counts = np.unique(np.asarray(sizes, np.int64).reshape(-1, 3), axis=0, return_counts=True)
    merged_sizes, counts, alive = unique.astype(np.float64), counts.astype(np.float64), np.ones(len(unique), bool)

    def compute_added(index: int) -> np.ndarray:
        """Return the pixels added by merging this size with each other one; inf for itself and merged sizes."""
        pixels = merged_sizes.prod(axis=1) * counts
        merged = np.maximum(merged_sizes[index], merged_sizes).prod(axis=1) * (counts[index] + counts)
        return np.where(alive & (np.arange(len(alive)) != index), merged - pixels[index] - pixels, np.inf)

    # A merge changes the costs of one row and column only, so the whole matrix is computed only once.
    added = np.stack([compute_added(index) for index in range(len(merged_sizes))])
    for _ in range(len(merged_sizes) - max_programs):
        one, other = sorted(divmod(int(np.argmin(added)), len(added)))
        merged_sizes[one], counts[one] = np.maximum(merged_sizes[one], merged_sizes[other]), counts[one] + counts[other]
        alive[other] = False
        added[other], added[:, other] = np.inf, np.inf
        added[one] = added[:, one] = compute_added(one)
    remaining = merged_sizes[alive].astype(np.int64).tolist()
    return sorted((Grid(*size) for size in remaining), key=lambda size: (size.volume, size))


def compute_segment_ids(canvas: ClipCanvas, sizes: Sequence[Grid], stride: Grid) -> Int32[np.ndarray, "h w"]:
    """Return the clip id of each latent position of a canvas: 1, 2, … in the order of its slots; 0 is padding."""
    result = np.zeros((canvas.size.h // stride.h, canvas.size.w // stride.w), np.int32)
    for number, (clip, row, column) in enumerate(canvas.slots, 1):
        top, left = row // stride.h, column // stride.w
        result[top : top + sizes[clip].h // stride.h, left : left + sizes[clip].w // stride.w] = number
    return result


def compute_padding_share(canvases: Sequence[ClipCanvas], sizes: Sequence[Grid]) -> float:
    """Return the share of the canvases' pixels that belong to no clip."""
    total = sum(canvas.size.volume for canvas in canvases)
    return 1 - sum(size.volume for size in sizes) / total if total else 0.0


def _round_lengths(sizes: Sequence[Grid], max_lengths: int) -> dict[int, int]:
    """Map every length to one of at most `max_lengths`, adding the fewest pixels; by dynamic programming."""
    areas: dict[int, int] = {}
    for size in sizes:
        areas[size.t] = areas.get(size.t, 0) + size.h * size.w
    lengths = sorted(areas)
    below = [0, *itertools.accumulate(areas[length] for length in lengths)]
    # best[n]: the fewest padded pixels of the n shortest lengths, and the rounded lengths that achieve it. Each pass
    # allows one more rounded length, for lengths m + 1 to n.
    best: list[tuple[int | float, tuple[int, ...]]] = [(0, ()), *[(math.inf, ())] * len(lengths)]

    def add_length(m: int, n: int) -> tuple[int | float, tuple[int, ...]]:
        pixels, chosen = best[m]
        return pixels + (below[n] - below[m]) * lengths[n - 1], (*chosen, lengths[n - 1])

    for _ in range(max_lengths):
        best = [best[0], *(min(best[n], *(add_length(m, n) for m in range(n))) for n in range(1, len(best)))]
    chosen = best[-1][1]
    return {length: next(rounded for rounded in chosen if rounded >= length) for length in lengths}


_CellSlot = tuple[int, int, int]
"""Clip, row and column, in latent positions."""


def _pack_cells(cells: Sequence[tuple[int, int]], area: int) -> tuple[int, int, list[list[_CellSlot]]]:
    """Return height and width of canvases of about `area` positions, and the clips on each."""
    highest, widest = max(height for height, _ in cells), max(width for _, width in cells)
    # Candidate shapes are tried on a sample of the clips.
    sample = [cells[index] for index in range(0, len(cells), -(-len(cells) // _SAMPLE_CLIPS))]
    # Every clip takes a gap of one position to the right and one below.
    total = sum((height + 1) * (width + 1) for height, width in sample)
    target_area = min(area, total)
    best: tuple[int, int, int] | None = None
    for width in _list_candidate_sides(math.sqrt(target_area), [width for _, width in sample], widest):
        shelves = _fill_shelves(sample, width)
        stacked = sum(height + 1 for height, _ in shelves) - 1
        for height in _list_candidate_sides(target_area / width, [height for height, _ in sample], highest):
            height = max(highest, min(height, stacked))
            computed = len(_stack_shelves(shelves, height)) * height * width
            best = min(best or (computed, height, width), (computed, height, width))
    assert best is not None
    _, height, width = best
    return height, width, _stack_shelves(_fill_shelves(cells, width), height)


def _list_candidate_sides(target: float, lengths: Sequence[int], minimum: int) -> list[int]:
    """Return lengths to try for a side: some around `target`, and exact multiples of the most common lengths."""
    low, high = 0.6 * target, 1.6 * target
    candidates = {round(low + (high - low) * step / 8) for step in range(9)}
    for member, _ in Counter(lengths).most_common(3):
        pitch = member + 1
        candidates |= {pitch * count - 1 for count in range(math.ceil(low / pitch), int(high / pitch) + 1)}
    return sorted({max(minimum, side) for side in candidates})


def _fill_shelves(cells: Sequence[tuple[int, int]], width: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Place clips on shelves, tallest first; a shelf is (height, [(clip, column)])."""
    shelves: list[tuple[int, list[tuple[int, int]]]] = []
    order = sorted(range(len(cells)), key=lambda clip: (-cells[clip][0], -cells[clip][1], clip))
    for clip, (shelf, column) in zip(order, _first_fit([cells[clip][1] for clip in order], width), strict=True):
        if shelf == len(shelves):
            shelves.append((cells[clip][0], []))
        shelves[shelf][1].append((clip, column))
    return shelves


def _stack_shelves(shelves: list[tuple[int, list[tuple[int, int]]]], height: int) -> list[list[_CellSlot]]:
    """Stack shelves on canvases, the tallest shelves first."""
    canvases: list[list[_CellSlot]] = []
    slots = _first_fit([shelf_height for shelf_height, _ in shelves], height)
    for (canvas, row), (_, members) in zip(slots, shelves, strict=True):
        if canvas == len(canvases):
            canvases.append([])
        canvases[canvas] += [(clip, row, column) for clip, column in members]
    return canvases


def _first_fit(lengths: Sequence[int], capacity: int) -> list[tuple[int, int]]:
    """Return the bin and the start of every length: in the first of the last bins with room for it and a gap of one."""
    used: list[int] = []
    slots = []
    for length in lengths:
        tried = range(max(0, len(used) - _MAX_TRIED), len(used))
        number = next((number for number in tried if used[number] + length <= capacity), len(used))
        if number == len(used):
            used.append(0)
        slots.append((number, used[number]))
        used[number] += length + 1
    return slots
