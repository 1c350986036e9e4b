"""Shapes of layouts: clips on a canvas lie apart, inside it and at multiples of its cell."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_video.core.errors import UserError
from dit_video.tokens import CanvasShape, DenseShape, Grid, PackedExample, PackedShape, compute_positions, pack

CELL = Grid(1, 2, 2)
grids = st.lists(
    st.builds(lambda t, h, w: Grid(t, 2 * h, 2 * w), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(grids=grids, padding=st.builds(Grid, st.integers(0, 2), st.integers(0, 3), st.integers(0, 3)))
def test_clips_on_a_canvas_have_padding_between_them(grids, padding):
    shape = CanvasShape(size=Grid(7, 18, 20), text=1, segments=12, cell=CELL, padding=padding)
    corners = shape.find_corners(grids)
    if corners is None:
        assert len(grids) > 1  # each fits alone
        return
    for corner, grid in zip(corners, grids, strict=True):
        assert all(start + side <= room for start, side, room in zip(corner, grid, shape.size, strict=True))
        assert all(start % unit == 0 for start, unit in zip(corner, CELL, strict=True))
    for (corner, grid), (other, other_grid) in itertools.combinations(zip(corners, grids, strict=True), 2):
        gaps = [
            max(other[axis] - corner[axis] - grid[axis], corner[axis] - other[axis] - other_grid[axis])
            for axis in range(3)
        ]
        assert any(gap >= reach for gap, reach in zip(gaps, padding, strict=True))


def test_short_clips_follow_one_another_in_time():
    shape = CanvasShape(size=Grid(5, 4, 4), text=1, segments=9, cell=CELL, padding=CELL)
    assert shape.find_corners([Grid(1, 4, 4), Grid(3, 4, 4)]) == [Grid(4, 0, 0), Grid(0, 0, 0)]
    assert shape.fits([Grid(1, 4, 4)] * 3, [0, 0, 0])
    assert not shape.fits([Grid(1, 4, 4)] * 4, [0] * 4)
    assert not shape.fits([Grid(1, 4, 4)], [2])


def test_invalid_canvases_and_clips_are_refused():
    with pytest.raises(UserError, match=r"size=\(5, 5, 4\), padding=\(1, 2, 2\) is invalid: .* cell=\(1, 2, 2\)"):
        CanvasShape(size=Grid(5, 5, 4), text=1, segments=1, cell=CELL, padding=CELL)
    shape = CanvasShape(size=Grid(5, 4, 4), text=4, segments=4, cell=CELL, padding=CELL)
    with pytest.raises(UserError, match=r"a clip of \(1, 3, 4\) positions is invalid"):
        shape.find_corners([Grid(1, 3, 4)])
    clips = [
        PackedExample(np.zeros((32, 1), np.float32), compute_positions(Grid(2, 4, 4)), np.zeros(1, np.int32), 0)
        for _ in range(2)
    ]
    assert pack(clips, shape, width=1).segments.max() == 2
    with pytest.raises(UserError, match=r"do not fit a canvas of 3x6x8 .* use a larger canvas or fewer clips"):
        pack(clips, CanvasShape(size=Grid(3, 6, 8), text=4, segments=4, cell=CELL, padding=CELL), width=1)
    with pytest.raises(UserError, match="does not fill an array"):
        pack(clips[:1], DenseShape(size=Grid(3, 4, 4), text=4), width=1)


def test_a_larger_clip_gets_a_shape_of_its_own():
    grid = Grid(3, 8, 8)
    assert PackedShape(tokens=4, text=5, segments=2).enlarge(grid) == PackedShape(tokens=192, text=5, segments=2)
    for shape in (
        CanvasShape(size=Grid(1, 4, 4), text=5, segments=2, cell=CELL, padding=CELL),
        DenseShape(size=CELL, text=5),
    ):
        assert shape.enlarge(grid) == DenseShape(size=grid, text=5)
        assert shape.enlarge(grid).fits([grid], [5])
        assert not shape.enlarge(grid).fits([CELL], [5])
