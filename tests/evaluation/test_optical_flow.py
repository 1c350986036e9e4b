"""Optical flow against known motion, and warping along it."""

import sys

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from dit_video.core.errors import MissingError
from dit_video.evaluation.optical_flow import estimate_flow, interpolate_middle, warp_backward
from dit_video.scenes import draw_scene, render
from dit_video.tokens import Grid

SMOOTH = gaussian_filter(np.random.default_rng(0).normal(size=(64, 68, 3)), (2, 2, 0))
PICTURE = np.clip(127 + 50 * SMOOTH / SMOOTH.std(), 0, 255).astype(np.uint8)
FIRST, MIDDLE, SECOND = (PICTURE[:, start : start + 64] for start in (2, 1, 0))
"""Frames whose content moves to the right by one pixel a frame."""


def test_flow_of_a_shifted_picture_is_the_shift():
    flow = estimate_flow(FIRST, SECOND)
    np.testing.assert_allclose(flow[8:-8, 8:-8], np.broadcast_to([0.0, 2.0], (48, 48, 2)), atol=0.15)
    flow = estimate_flow(*(each.transpose(1, 0, 2) for each in (FIRST, SECOND)))
    np.testing.assert_allclose(flow[8:-8, 8:-8], np.broadcast_to([2.0, 0.0], (48, 48, 2)), atol=0.15)
    assert (estimate_flow(FIRST, FIRST) == 0).all()


def test_flow_of_a_rendered_scene_is_close_to_its_truth():
    scene = render(draw_scene(4, seed=1, level=1, sizes=(Grid(17, 48, 48),)))
    frames, moving, errors, lengths = scene.clip.frames, 0, [], []
    for index in range(0, 16, 4):
        is_object = scene.is_visible[index] & (scene.instances[index] > 0)
        truth = scene.flow[index][is_object]
        moving += is_object.sum()
        errors.append(np.hypot(*(estimate_flow(frames[index], frames[index + 1])[is_object] - truth).T).mean())
        lengths.append(np.hypot(*truth.T).mean())
    assert moving > 500
    assert np.mean(lengths) > 0.8
    assert np.mean(errors) < 0.4 * np.mean(lengths)


def test_warping_undoes_a_shift():
    flow = np.broadcast_to(np.float32([0, 2]), (64, 64, 2))
    np.testing.assert_array_equal(warp_backward(SECOND, flow)[:, :-2], FIRST[:, :-2])
    np.testing.assert_array_equal(warp_backward(SECOND, np.zeros((64, 64, 2), np.float32)), SECOND)
    # Beyond the border is the outermost pixel.
    np.testing.assert_array_equal(warp_backward(SECOND, flow)[:, -1], SECOND[:, -1])


def test_flow_without_opencv_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingError, match=r"OpenCV .*pip install -e '\.\[ingest\]'"):
        estimate_flow(FIRST, SECOND)


def test_the_middle_of_a_shift_is_half_of_it():
    error = np.abs(interpolate_middle(FIRST, SECOND).astype(float) - MIDDLE)[:, 4:-4].mean()
    blend = np.abs((FIRST.astype(float) + SECOND) / 2 - MIDDLE)[:, 4:-4].mean()
    assert error < 1.0
    assert error < 0.5 * blend
    np.testing.assert_array_equal(interpolate_middle(FIRST, FIRST), FIRST)
