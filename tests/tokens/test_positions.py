import numpy as np

from dit_video.tokens import Grid, compute_positions, patchify


def test_coordinates_are_in_the_order_of_patchify():
    grid = Grid(2, 3, 4)
    index = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).astype(np.float32)
    np.testing.assert_array_equal(compute_positions(grid), patchify(index, Grid(1, 1, 1)))


def test_coordinates_count_time_height_and_width_from_zero():
    expected = [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]]
    result = compute_positions(Grid(2, 2, 2))
    assert result.dtype == np.float32
    assert result.tolist() == expected


def test_an_image_has_time_zero():
    result = compute_positions(Grid(1, 4, 6))
    assert result.shape == (24, 3)
    assert not result[:, 0].any()
    assert result.max(axis=0).tolist() == [0, 3, 5]


def test_coordinates_may_step_in_seconds():
    result = compute_positions(Grid(3, 1, 2), step=(4 / 24, 1.0, 0.5))
    assert result.dtype == np.float32
    np.testing.assert_allclose(np.unique(result[:, 0]), [0, 1 / 6, 1 / 3], rtol=1e-6)
    assert np.unique(result[:, 2]).tolist() == [0, 0.5]


def test_a_lead_gives_the_time_of_each_patchs_first_frame():
    """Eight frames a patch, the first of which has one, at 25 frames a second."""
    result = compute_positions(Grid(4, 1, 1), step=(8 / 25, 1.0, 1.0), lead=7 / 8)
    np.testing.assert_allclose(result[:, 0], np.asarray([0, 1, 9, 17]) / 25, rtol=1e-6)
