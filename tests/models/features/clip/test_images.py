import dataclasses

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.models.features import ClipImageProcessor
from dit_video.models.features.clip import preprocess_frames, resize_bicubic

FRAMES = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)


def plain(**fields):
    return ClipImageProcessor(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **fields)


def test_resizing_keeps_constants_and_linear_ramps():
    flat = np.full((1, 30, 50, 3), 77, np.uint8)
    assert (resize_bicubic(flat, 13, 90) == 77).all()
    assert resize_bicubic(FRAMES, 40, 60) is not FRAMES
    np.testing.assert_array_equal(resize_bicubic(FRAMES, 40, 60), FRAMES)
    ramp = np.broadcast_to(np.arange(0, 240, 2, dtype=np.uint8)[None, None, :, None], (1, 8, 120, 3))
    half = resize_bicubic(ramp, 4, 60)[0, 0, 4:-4, 0]
    np.testing.assert_array_equal(half, np.arange(0, 240, 4)[4:-4] + 1)


def test_the_response_to_an_impulse_is_the_kernel():
    """Keys' cubic with a = -1/2 at distances of an eighth, three eighths, … of a pixel, of four times the width."""
    line = np.zeros((1, 1, 9, 3), np.uint8)
    line[0, 0, 4] = 200
    result = resize_bicubic(line, 1, 36)[0, 0, :, 0].astype(float)
    x = np.abs((np.arange(36) + 0.5) / 4 - 4.5)
    kernel = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    np.testing.assert_allclose(result, np.clip(200 * kernel, 0, 255), atol=0.51)


def test_the_shorter_side_is_resized_and_the_centre_is_cropped():
    images = plain(resize=20, crop=(20, 20))
    assert images.compute_size(40, 60) == (20, 30)
    assert images.compute_size(60, 40) == (30, 20)
    assert images.compute_size(37, 50) == (20, 27)  # 27.03
    assert images.compute_size(30, 30) == (20, 20)
    expected = resize_bicubic(FRAMES, 20, 30)[:, :, 5:25].astype(np.float32) / 255
    np.testing.assert_allclose(preprocess_frames(FRAMES, images), expected, atol=1e-6)


def test_other_sizes_are_resized_or_cropped_as_configured():
    squashed = preprocess_frames(FRAMES, plain(resize=(16, 24), crop=None))
    np.testing.assert_allclose(squashed * 255, resize_bicubic(FRAMES, 16, 24), atol=1e-4)
    cropped = preprocess_frames(FRAMES, plain(resize=None, crop=(31, 20)))
    np.testing.assert_allclose(cropped * 255, FRAMES[:, 4:35, 20:40], atol=1e-4)


def test_colours_are_normalised():
    images = ClipImageProcessor(resize=None, crop=None, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    result = preprocess_frames(FRAMES, images)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, (FRAMES / 255 - [0.1, 0.2, 0.3]) / [1, 2, 4], atol=1e-6)


def test_invalid_settings_and_frames_are_refused():
    with pytest.raises(UserError, match=r"crop=50x20 .*40x60"):
        preprocess_frames(FRAMES, plain(resize=None, crop=(50, 20)))
    for change in ({"resize": 0}, {"resize": (4, 0)}, {"crop": (0, 4)}):
        with pytest.raises(UserError, match=r"resize=.*crop=.*at least 1"):
            dataclasses.replace(ClipImageProcessor(), **change)
    with pytest.raises(UserError, match=r"std=\(1.0, 0.0, 1.0\) .*above 0"):
        ClipImageProcessor(std=(1.0, 0.0, 1.0))
