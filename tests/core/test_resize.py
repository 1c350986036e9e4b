"""Resizing of pictures: the filter, its range, and computation in strips."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_video.core.resize import _make_weights, resize


def test_resize_keeps_a_constant_and_the_same_size():
    frames = np.full((2, 8, 6, 3), 77, np.uint8)
    assert resize(frames, 8, 6) is frames
    for height, width in [(4, 3), (5, 11), (1, 1), (16, 12)]:
        resized = resize(frames, height, width)
        assert resized.shape == (2, height, width, 3)
        assert (resized == 77).all()


@pytest.mark.parametrize(
    ("source", "target"), [((48, 64), (19, 26)), ((37, 51), (37, 20)), ((90, 16), (3, 40)), ((9, 7), (50, 61))]
)
def test_resize_is_a_product_with_the_filter_on_each_axis(source, target):
    frames = np.random.default_rng(1).integers(0, 256, (2, *source, 3), np.uint8)
    rows, columns = (
        _make_weights(before, after).astype(np.float64) for before, after in zip(source, target, strict=True)
    )
    exact = np.einsum("hH,wW,THWc->Thwc", rows, columns, frames)
    assert np.abs(resize(frames, *target) - exact).max() < 0.5 + 1e-3
    upright = resize(np.ascontiguousarray(frames.swapaxes(1, 2)), *target[::-1]).swapaxes(1, 2)
    assert np.abs(upright - exact).max() < 0.5 + 1e-3


def test_resizing_in_strips_gives_the_same_result(monkeypatch):
    frames = np.random.default_rng(2).integers(0, 256, (1, 40, 30, 3), np.uint8)
    whole = resize(frames, 21, 13)
    monkeypatch.setattr("dit_video.core.resize._MAX_PRODUCTS", 1000)
    np.testing.assert_allclose(resize(frames, 21, 13).astype(int), whole, atol=1)


def test_resize_to_half_is_a_symmetric_triangle_filter():
    frames = np.zeros((1, 1, 8, 3), np.uint8)
    frames[:, :, 3] = 255
    result = resize(frames, 1, 4)[0, 0, :, 0].tolist()
    assert result == [0, round(255 * 3 / 8), round(255 / 8), 0]
    mirrored = resize(frames[:, :, ::-1], 1, 4)[0, 0, :, 0].tolist()
    assert mirrored == result[::-1]


def test_resize_enlarges_linearly():
    frames = np.array([0, 100], np.uint8).repeat(3).reshape(1, 1, 2, 3)
    assert resize(frames, 1, 4)[0, 0, :, 0].tolist() == [0, 25, 75, 100]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20))
def test_resize_stays_within_the_range_of_its_input(height, width):
    frames = np.random.default_rng(0).integers(40, 200, (1, 9, 7, 3), np.uint8)
    resized = resize(frames, height, width)
    assert frames.min() <= resized.min()
    assert resized.max() <= frames.max()
