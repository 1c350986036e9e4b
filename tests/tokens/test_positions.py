"""Positions of tokens, and their rotary embedding."""

import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.tokens import Grid, Rotary3d, compute_positions, compute_rotary_angles, patchify, rotate


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


# Rotary


ROTARY = Rotary3d(split=(4, 6, 2), theta=100.0)
DRAW = np.random.default_rng(0)
Q, K = (jnp.asarray(DRAW.normal(size=(5, 2, 12)), jnp.float32) for _ in range(2))
AT = jnp.asarray(DRAW.uniform(-20, 20, size=(5, 3)), jnp.float32)


def products(q_at, k_at):
    """Return the products of every query with every key, `[N M K]`."""
    q, k = rotate(Q, compute_rotary_angles(q_at, ROTARY)), rotate(K, compute_rotary_angles(k_at, ROTARY))
    return np.einsum("nkd,mkd->nmk", q, k)


def test_a_product_depends_on_the_difference_of_coordinates_only():
    shift = jnp.asarray([3.0, -7.5, 11.25])
    before = products(AT, AT)
    np.testing.assert_allclose(products(AT + shift, AT + shift), before, atol=2e-5)
    for axis in range(3):
        moved = products(AT, AT.at[:, axis].add(1.0))
        assert np.abs(moved - before).max() > 0.1


def test_pairs_turn_as_complex_numbers():
    angles = compute_rotary_angles(AT, ROTARY)
    expected = np.concatenate(
        [AT[:, [axis]] * 100.0 ** (-np.arange(0, width, 2) / width) for axis, width in enumerate(ROTARY.split)], axis=1
    )
    np.testing.assert_allclose(angles, expected, rtol=1e-5)
    turned = (np.asarray(Q[..., :6]) + 1j * np.asarray(Q[..., 6:])) * np.exp(1j * expected)[:, None]
    np.testing.assert_allclose(rotate(Q, angles), np.concatenate([turned.real, turned.imag], axis=-1), atol=2e-5)


def test_halves_are_neighbouring_pairs_after_a_permutation():
    angles = compute_rotary_angles(AT, ROTARY)
    interleaved = Q.reshape(5, 2, 6, 2)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = interleaved[..., 0], interleaved[..., 1]
    turned = np.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    permuted = rotate(jnp.concatenate([first, second], axis=-1), angles)
    np.testing.assert_allclose(permuted, np.concatenate([turned[..., 0], turned[..., 1]], axis=-1), atol=1e-6)


def test_zero_turns_nothing_and_no_coordinate_changes_a_length():
    np.testing.assert_array_equal(rotate(Q, compute_rotary_angles(0 * AT, ROTARY)), Q)
    turned = rotate(Q, compute_rotary_angles(AT, ROTARY))
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(Q, axis=-1), rtol=1e-5)


def test_bfloat16_is_turned_in_float32():
    # The angle 1000 is 1000 in float32, and off by up to 4 in bfloat16.
    angles = compute_rotary_angles(jnp.full((5, 3), 1001.0), ROTARY)
    result = rotate(Q.astype(jnp.bfloat16), angles)
    assert angles.dtype == jnp.float32
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(result.astype(jnp.float32), rotate(Q, angles), atol=0.04)


def test_the_even_split_is_that_of_wan():
    assert Rotary3d.even(128).split == (44, 42, 42)
    for width in range(2, 130, 2):
        Rotary3d.even(width).check(width)


@pytest.mark.parametrize(("split", "width"), [((4, 4, 4), 16), ((3, 3, 2), 8), ((12, -2, -2), 8)])
def test_a_split_that_does_not_fit_the_head_is_refused(split, width):
    with pytest.raises(UserError, match=f"must be even and add up to the head width {width}"):
        Rotary3d(split=split).check(width)
    with pytest.raises(UserError, match="head width 7"):
        Rotary3d.even(7).check(7)


def test_scale_interpolates_between_positions():
    half = Rotary3d(split=ROTARY.split, theta=ROTARY.theta, scale=(0.5, 1.0, 0.25))
    result = compute_rotary_angles(AT * jnp.asarray([2.0, 1.0, 4.0]), half)
    np.testing.assert_allclose(result, compute_rotary_angles(AT, ROTARY), rtol=1e-6)


def test_stretch_slows_the_slowest_pair_and_leaves_the_fastest():
    longer = Rotary3d(split=ROTARY.split, theta=ROTARY.theta, stretch=(4.0, 1.0, 3.0))
    before, after = compute_rotary_angles(AT, ROTARY), compute_rotary_angles(AT, longer)
    np.testing.assert_allclose(after[:, 0], before[:, 0], rtol=1e-6)
    np.testing.assert_allclose(after[:, 1], before[:, 1] / 4, rtol=1e-5)
    np.testing.assert_array_equal(after[:, 2:5], before[:, 2:5])
    np.testing.assert_array_equal(after[:, 5], before[:, 5])  # the only pair of its axis


@pytest.mark.parametrize("fields", [{"scale": (1.0, 0.0, 1.0)}, {"stretch": (1.0, 1.0, -2.0)}])
def test_scales_and_stretches_that_are_not_positive_are_refused(fields):
    with pytest.raises(UserError, match="must be positive"):
        Rotary3d(split=(4, 4, 4), **fields)
