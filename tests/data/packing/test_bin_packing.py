"""Plans of canvases: every example once an epoch, on canvases that hold them."""

from dataclasses import replace

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.data.captions import TokenizedCaptions
from dit_video.data.packing.bin_packing import CanvasPacking
from dit_video.data.packing.rows import RowLayout
from dit_video.tokens import CanvasShape, Grid
from support.fakes import tokenize

SHAPE = CanvasShape(size=Grid(5, 28, 28), text=60, segments=9, cell=Grid(1, 2, 2), padding=Grid(1, 2, 2))
SIZES = [Grid(t, h, w) for t in (1, 3, 5) for h, w in ((8, 8), (8, 12), (12, 8))]


def make_layout(count: int, *, shape: CanvasShape = SHAPE, seed: int = 0, grids: list[Grid] | None = None) -> RowLayout:
    generator = np.random.default_rng(1)
    chosen = grids or [SIZES[generator.integers(len(SIZES))] for _ in range(count)]
    captions = TokenizedCaptions([("a" * int(generator.integers(1, 12)),) for _ in chosen], tokenize)
    return RowLayout(
        chosen, captions, shape=shape, seed=seed, names=[f"clip {number}" for number in range(len(chosen))]
    )


def test_every_epoch_has_each_example_once_on_canvases_that_hold_them():
    layout = make_layout(300)
    stream = layout.stream
    plans = [stream.get_epoch(epoch) for epoch in range(3)]
    assert {len(plan) for plan in plans} == {stream.rows_per_epoch}
    assert len({plan.hash for plan in plans}) == 3
    for plan in plans:
        assert sorted(plan.order.tolist()) == list(range(300))
        for row in plan.rows:
            texts = [int(stream.text[example]) for example in row]
            assert SHAPE.fits([layout.get_grid(example) for example in row], texts)
    assert plans[0].padding < 0.5
    again = make_layout(300)
    assert again.hash == layout.hash
    assert again.stream.get_epoch(2).hash == plans[2].hash
    assert make_layout(300, shape=replace(SHAPE, segments=8)).hash != layout.hash


def test_plans_are_those_of_version_1():
    stream = make_layout(300).stream
    hashes = ["38ca2b21649b35b7", "e085449845f1d991", "7a3a7cee15101e72", "a17853740421fac9"]
    assert [stream.hash, *(stream.get_epoch(epoch).hash for epoch in range(3))] == hashes


def test_canvases_are_divided_until_an_epoch_has_enough():
    layout = make_layout(40)
    packing = CanvasPacking(layout.grids, layout.stream.text, SHAPE, layout.names)
    rows = packing.fill(np.arange(40), np.random.default_rng(0))
    divided = packing.split(rows, 30).to_lists()
    assert len(divided) == 30
    assert sorted(example for row in divided for example in row) == list(range(40))
    assert all(SHAPE.find_corners([layout.get_grid(example) for example in row]) for row in divided)


def test_examples_that_no_canvas_holds_are_refused_by_name():
    with pytest.raises(UserError, match=r"clip 1 has .* tokens, but a canvas only .*raise the canvas's size"):
        make_layout(2, grids=[Grid(1, 8, 8), Grid(7, 8, 8)])
    with pytest.raises(UserError, match=r"clip 1: a clip of \(1, 7, 8\) positions is invalid"):
        make_layout(2, grids=[Grid(1, 8, 8), Grid(1, 7, 8)])
