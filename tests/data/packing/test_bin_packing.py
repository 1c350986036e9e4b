"""Plans of canvases: every example once an epoch, on canvases that hold them."""

from dataclasses import replace

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.data.packing.bin_packing import CanvasPacking
from dit_video.data.packing.plan import RowPlanner
from dit_video.tokens import CanvasShape, Grid
from support.example_tables import make_table
from support.fakes import tokenize

SHAPE = CanvasShape(size=Grid(5, 28, 28), text=60, segments=9, cell=Grid(1, 2, 2), padding=Grid(1, 2, 2))
SIZES = [Grid(t, h, w) for t in (1, 3, 5) for h, w in ((8, 8), (8, 12), (12, 8))]


def plan_canvases(
    count: int, *, shape: CanvasShape = SHAPE, seed: int = 0, grids: list[Grid] | None = None
) -> RowPlanner:
    generator = np.random.default_rng(1)
    chosen = grids or [SIZES[generator.integers(len(SIZES))] for _ in range(count)]
    text = [len(tokenize("a" * int(generator.integers(1, 12)))) for _ in chosen]
    names = [f"clip {number}" for number in range(len(chosen))]
    return RowPlanner(make_table(chosen, text, names=names), shape, seed=seed)


def test_every_epoch_has_each_example_once_on_canvases_that_hold_them():
    planner = plan_canvases(300)
    plans = [planner.get_epoch(epoch) for epoch in range(3)]
    assert {len(plan) for plan in plans} == {planner.rows_per_epoch}
    assert len({plan.hash for plan in plans}) == 3
    for plan in plans:
        assert sorted(plan.order.tolist()) == list(range(300))
        for row in plan.rows:
            lengths = [int(planner.text[example]) for example in row]
            assert SHAPE.fits([planner.table.get_grid(example) for example in row], lengths)
    assert plans[0].padding < 0.5
    again = plan_canvases(300)
    assert again.hash == planner.hash
    assert again.get_epoch(2).hash == plans[2].hash
    assert plan_canvases(300, shape=replace(SHAPE, segments=8)).hash != planner.hash


def test_plans_are_those_of_version_1():
    planner = plan_canvases(300)
    hashes = ["38ca2b21649b35b7", "e085449845f1d991", "7a3a7cee15101e72", "a17853740421fac9"]
    assert [planner.hash, *(planner.get_epoch(epoch).hash for epoch in range(3))] == hashes


def test_canvases_are_divided_until_an_epoch_has_enough():
    planner = plan_canvases(40)
    packing = CanvasPacking(planner.table.grids, planner.text, SHAPE, planner.table.names)
    rows = packing.fill(np.arange(40), np.random.default_rng(0))
    divided = packing.split(rows, 30).to_lists()
    assert len(divided) == 30
    assert sorted(example for row in divided for example in row) == list(range(40))
    assert all(SHAPE.find_corners([planner.table.get_grid(example) for example in row]) for row in divided)


def test_examples_that_no_canvas_holds_are_refused_by_name():
    with pytest.raises(UserError, match=r"clip 1 has .* tokens, but a canvas only .*raise the canvas's size"):
        plan_canvases(2, grids=[Grid(1, 8, 8), Grid(7, 8, 8)])
    with pytest.raises(UserError, match=r"clip 1: a clip of \(1, 7, 8\) positions is invalid"):
        plan_canvases(2, grids=[Grid(1, 8, 8), Grid(1, 7, 8)])
