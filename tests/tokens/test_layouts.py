"""Layouts: an example has the same values, noise and averages in every one of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.rng import key
from dit_video.core.trees import flatten
from dit_video.tokens import (
    Canvas,
    CanvasShape,
    DenseBatch,
    DenseShape,
    Grid,
    LayoutShape,
    PackedBatch,
    PackedExample,
    PackedShape,
    compute_positions,
    pack,
    stack_rows,
    unpack,
)

GRIDS = (Grid(3, 4, 4), Grid(1, 4, 6), Grid(1, 2, 4))
CANVAS = CanvasShape(size=Grid(3, 6, 12), text=8, segments=4, cell=Grid(1, 2, 2), padding=Grid(1, 2, 2))
ROW = PackedShape(tokens=100, text=8, segments=4)


def place(shape: LayoutShape, grids: tuple[Grid, ...] = GRIDS) -> PackedBatch:
    """Return a batch of one row or canvas, whose token n of clip i has the value 100 i + n."""
    examples = [
        PackedExample(
            100 * index + np.arange(grid.volume, dtype=np.float32)[:, None],
            compute_positions(grid),
            np.zeros(1, np.int32),
            index,
        )
        for index, grid in enumerate(grids)
    ]
    return stack_rows([pack(examples, shape, width=1)])


@pytest.fixture(params=[ROW, CANVAS], ids=["rows", "canvas"])
def batch(request) -> PackedBatch:
    return place(request.param)


def test_tokens_of_an_example_follow_one_another(batch):
    for index, (grid, tokens) in enumerate(zip(GRIDS, unpack(batch.tokens[0], batch.segments[0]), strict=True)):
        np.testing.assert_array_equal(tokens[:, 0], 100 * index + np.arange(grid.volume))
        np.testing.assert_array_equal(batch.positions[0][batch.segments[0] == index + 1], compute_positions(grid))
        offsets = np.asarray(batch.layout.compute_offsets())[0][batch.segments[0] == index + 1]
        np.testing.assert_array_equal(offsets, np.arange(grid.volume))


def test_values_are_averaged_and_expanded_per_example(batch):
    layout = jax.device_put(batch.layout)
    means = np.asarray(layout.mean(jnp.asarray(batch.tokens)))[0, :, 0]
    np.testing.assert_allclose(means, [*(100 * i + (g.volume - 1) / 2 for i, g in enumerate(GRIDS)), 0], rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(layout.max(jnp.asarray(batch.tokens[..., 0])))[0], [47, 123, 207, 0])
    expanded = np.asarray(layout.expand(jnp.asarray(means[None])))[0]
    for index in range(len(GRIDS)):
        assert (expanded[batch.segments[0] == index + 1] == means[index]).all()


@pytest.mark.parametrize("quantile", [0.0, 0.37, 0.995, 1.0])
def test_a_quantile_is_that_of_an_examples_values_alone(batch, quantile):
    values = np.random.default_rng(3).normal(size=(*batch.segments.shape, 3)).astype(np.float32)
    layout = jax.device_put(batch.layout)
    result = np.asarray(layout.quantile(jnp.asarray(values), quantile))[0]
    expected = [np.quantile(values[0, batch.segments[0] == index + 1], quantile) for index in range(len(GRIDS))]
    np.testing.assert_allclose(result, [*expected, 0], rtol=1e-5, atol=1e-6)


def test_an_example_has_the_same_noise_in_every_layout():
    keys = jax.random.split(key(0, "noise"), (1, 4))
    row, canvas = (
        np.asarray(each.layout.sample_noise(keys, 2))[0] for each in (place_on_device(ROW), place_on_device(CANVAS))
    )
    dense = place_on_device(DenseShape(size=GRIDS[0], text=8), GRIDS[:1])
    segments = [np.asarray(each.segments)[0] for each in (place(ROW), place(CANVAS))]
    for index in range(1, len(GRIDS) + 1):
        np.testing.assert_array_equal(row[segments[0] == index], canvas[segments[1] == index])
    np.testing.assert_array_equal(np.asarray(dense.layout.sample_noise(keys, 2))[0], row[segments[0] == 1])


def place_on_device(shape: LayoutShape, grids: tuple[Grid, ...] = GRIDS) -> PackedBatch:
    return jax.device_put(place(shape, grids))


def test_a_canvas_is_a_dense_array_of_its_clips():
    batch = place_on_device(CANVAS)
    layout = batch.layout
    assert isinstance(layout, Canvas)
    array = layout.to_array(batch.tokens)
    assert array.shape == (1, 3, 6, 12, 1)
    np.testing.assert_array_equal(layout.from_array(array), batch.tokens)
    clip = np.asarray(array)[0][:, :4, :6, 0]  # the widest of the tallest clips comes first
    np.testing.assert_array_equal(clip[0], 100 + np.arange(24).reshape(4, 6))
    masked = np.asarray(layout.mask_padding(array + 1))[0, ..., 0]
    assert ((masked == 0) == (np.asarray(layout.to_array(layout.segments))[0] == 0)).all()


def test_a_coarser_canvas_has_the_same_clips_in_fewer_positions():
    layout = place_on_device(CANVAS).layout.coarsen(Grid(1, 2, 2))
    assert layout.size == Grid(3, 3, 6)
    counts = np.bincount(np.asarray(layout.segments)[0], minlength=4)
    np.testing.assert_array_equal(counts[1:], [grid.volume // 4 for grid in GRIDS])
    fine, coarse = place_on_device(CANVAS).layout, layout
    np.testing.assert_array_equal(fine.to_array(fine.positions)[:, :, ::2, ::2], coarse.to_array(coarse.positions))


def test_a_canvas_as_a_row_lists_one_clip_after_the_other():
    layout = place_on_device(CANVAS).layout
    rows = layout.to_rows()
    values = jnp.arange(layout.size.volume, dtype=jnp.float32)[None, :, None]
    np.testing.assert_array_equal(rows.unpack(rows.pack(values)), values)
    expected = place(PackedShape(tokens=layout.size.volume, text=8, segments=4))
    np.testing.assert_array_equal(rows.layout.segments, expected.segments)
    used = expected.segments[0] > 0
    np.testing.assert_array_equal(np.asarray(rows.layout.positions)[0][used], expected.positions[0][used])


def test_a_dense_batch_is_its_own_row():
    layout = place_on_device(DenseShape(size=GRIDS[0], text=8), GRIDS[:1]).layout
    assert isinstance(layout, DenseBatch)
    values = jnp.arange(48.0)[None, :, None]
    assert layout.to_rows().pack(values) is values
    array = layout.to_array(values)
    assert layout.mask_padding(array) is array


def test_layouts_are_pytrees_with_their_class_and_size():
    for shape in (ROW, CANVAS):
        layout = place(shape).layout
        leaves, structure = jax.tree.flatten(layout)
        assert len(leaves) == 2
        assert list(flatten(layout)) == ["segments", "positions"]
        again = jax.tree.unflatten(structure, leaves)
        assert type(again) is type(layout)
        assert vars(again).keys() == vars(layout).keys()
