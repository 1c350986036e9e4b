"""Known pixels in a decoded clip: exact, without a jump of sharpness where they end."""

import numpy as np
import pytest

from dit_video.sampling.known_pixels import KnownPixels
from dit_video.sampling.request import Condition
from dit_video.video import Clip


def make_known(known, is_known, strength=1.0):
    return KnownPixels(known, np.where(is_known, np.float32(strength), np.float32(0)))


def draw_clip(seed, shape=(7, 12, 16, 3)):
    return np.random.default_rng(seed).integers(40, 216, shape).astype(np.uint8)


def test_known_frames_are_restored_and_their_error_fades_where_the_clip_changes():
    original = np.full((7, 12, 16, 3), 100, np.uint8)
    decoded = np.repeat(draw_clip(0, (1, 12, 16, 3)), 7, axis=0)
    is_known = np.zeros((7, 12, 16), bool)
    is_known[[0, 6]] = True
    still = make_known(original, is_known).restore(decoded)
    np.testing.assert_array_equal(still, original)  # what is decoded stays the same, and so does its error
    moving = np.clip(decoded.astype(int) + 30 * np.arange(7)[:, None, None, None] % 60, 0, 255).astype(np.uint8)
    restored = make_known(original, is_known).restore(moving)
    np.testing.assert_array_equal(restored[[0, 6]], original[[0, 6]])
    error = np.abs(original[1].astype(float) - moving[0])
    change = np.abs(restored.astype(float) - moving).mean(axis=(1, 2, 3)) / error.mean()
    assert 0.4 < change[1] < 0.6
    assert change[3] < 0.3


def test_a_known_region_is_restored_but_for_its_border():
    original, decoded = draw_clip(0), draw_clip(1)
    is_known = np.zeros((7, 12, 16), bool)
    is_known[:, :, :10] = True
    restored = make_known(original, is_known).restore(decoded)
    np.testing.assert_array_equal(restored[:, :, :6], original[:, :, :6])
    np.testing.assert_array_equal(restored[:, :, 10:], decoded[:, :, 10:])
    between = np.rint((original[:, :, 9].astype(float) + 4.0 * decoded[:, :, 9]) / 5)
    np.testing.assert_allclose(restored[:, :, 9], between, atol=1)


def test_what_a_strength_releases_is_not_restored():
    original, decoded = draw_clip(0), draw_clip(1)
    is_known = np.zeros((7, 12, 16), bool)
    is_known[0] = True
    np.testing.assert_array_equal(make_known(original, is_known, 0.8).restore(decoded), decoded)
    np.testing.assert_array_equal(make_known(original, ~is_known & False).restore(decoded), decoded)


@pytest.mark.slow
def test_a_pipeline_returns_the_pixels_that_it_keeps(tiny_pipeline):
    clip = Clip(draw_clip(0, (9, 16, 32, 3)), fps=8)
    options = {"size": (9, 16, 32), "steps": 2, "method": "training_free"}
    kept = tiny_pipeline.generate("a red circle", image=clip.frames[0], last_image=clip.frames[8], **options)
    np.testing.assert_array_equal(kept.frames[[0, 8]], clip.frames[[0, 8]])
    assert (kept.frames[4] != clip.frames[4]).any()
    generated = np.zeros(clip.frames.shape[:3], bool)
    generated[:, :, 16:] = True
    half = tiny_pipeline.generate("a red circle", video=clip, generated=generated, **options)
    np.testing.assert_array_equal(half.frames[:, :, :12], clip.frames[:, :, :12])
    assert (half.frames[:, :, 16:] != clip.frames[:, :, 16:]).any()
    weak = tiny_pipeline.generate("a", conditions=[Condition(content=clip.frames[0], strength=0.5)], **options)
    assert (weak.frames[0] != clip.frames[0]).any()
