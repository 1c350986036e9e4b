"""Metrics of single frames without reference: sharpness and colourfulness."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from dit_video.evaluation.metrics.frames import Colourfulness, Sharpness, compute_colourfulness, compute_sharpness
from dit_video.evaluation.metrics.metric import MetricBatch
from dit_video.video import Clip

RANDOM = np.random.default_rng(0).integers(0, 256, (3, 24, 31, 3)).astype(np.uint8)


def fill(*colour, size=(8, 8)):
    return np.broadcast_to(np.array(colour, np.uint8), (1, *size, 3)).copy()


def test_sharpness_of_plain_frames_and_ramps_is_zero():
    assert compute_sharpness(fill(10, 200, 30)) == pytest.approx(0.0, abs=1e-9)
    # A ramp has no second derivative but at its mirrored ends.
    ramp = np.repeat(np.arange(0, 240, 10, dtype=np.uint8)[None, None, :, None], 3, axis=-1)
    ends = np.zeros(24)
    ends[0], ends[-1] = 20, -20
    assert compute_sharpness(np.repeat(ramp, 8, axis=1)) == pytest.approx(ends.var())


def test_sharpness_of_a_dot_is_that_of_the_kernel():
    frame = fill(0, 0, 0, size=(9, 9))
    frame[0, 4, 4] = 100
    values = np.array([-400.0, *[100.0] * 4, *[0.0] * 76])
    assert compute_sharpness(frame) == pytest.approx(values.var())


def test_sharpness_equals_the_variance_of_opencv_s_laplacian():
    cv2 = pytest.importorskip("cv2")
    luma = [frame.astype(np.float64) @ [0.299, 0.587, 0.114] for frame in RANDOM]
    expected = [cv2.Laplacian(each, cv2.CV_64F).var() for each in luma]
    assert compute_sharpness(RANDOM) == pytest.approx(np.mean(expected), rel=1e-9)


def test_blur_lowers_sharpness_and_noise_raises_it():
    smooth = gaussian_filter(RANDOM, (0, 1, 1, 0))
    values = [compute_sharpness(gaussian_filter(smooth, (0, sigma, sigma, 0))) for sigma in (0.0, 1.0, 2.0)]
    assert values[0] > 2 * values[1] > 4 * values[2]
    noisy = np.clip(smooth + np.random.default_rng(1).normal(size=smooth.shape) * 20, 0, 255).astype(np.uint8)
    assert compute_sharpness(noisy) > values[0]


def test_sharpness_does_not_depend_on_brightness_or_the_order_of_frames():
    dark = RANDOM // 2
    assert compute_sharpness(dark + 100) == pytest.approx(compute_sharpness(dark))
    assert compute_sharpness(RANDOM[::-1]) == pytest.approx(compute_sharpness(RANDOM))


def test_grey_frames_have_no_colourfulness():
    assert compute_colourfulness(np.repeat(RANDOM[..., :1], 3, axis=-1)) == 0.0


def test_colourfulness_of_known_frames():
    # One colour: only the means count. rg = 255, yb = 127.5.
    assert compute_colourfulness(fill(255, 0, 0)) == pytest.approx(0.3 * np.hypot(255, 127.5))
    # Half red, half green: rg is ±255, with the mean 0; yb is 127.5 everywhere.
    halves = fill(255, 0, 0)
    halves[:, :4] = (0, 255, 0)
    assert compute_colourfulness(halves) == pytest.approx(255 + 0.3 * 127.5)
    # The paper's measure is of one picture: a clip's is the mean over frames.
    clip = np.concatenate([fill(255, 0, 0), halves])
    assert compute_colourfulness(clip) == pytest.approx((255 + 0.3 * (127.5 + np.hypot(255, 127.5))) / 2)


def test_colourfulness_falls_with_saturation_and_not_with_the_places_of_pixels():
    grey = RANDOM.mean(axis=-1, keepdims=True)
    values = [compute_colourfulness((grey + share * (RANDOM - grey)).astype(np.uint8)) for share in (1.0, 0.5, 0.1)]
    assert values[0] > 1.8 * values[1] > 1.8**2 * values[2]
    mixed = np.random.default_rng(2).permutation(RANDOM.reshape(3, -1, 3), axis=1).reshape(RANDOM.shape)
    assert compute_colourfulness(mixed) == pytest.approx(compute_colourfulness(RANDOM))


@pytest.mark.parametrize(
    ("metric", "compute"), [(Sharpness(), compute_sharpness), (Colourfulness(), compute_colourfulness)]
)
def test_images_and_clips_of_any_size_count_alike(metric, compute):
    clips = [Clip(frames=RANDOM, fps=8), Clip(frames=RANDOM[:1, :10, :12], fps=1)]
    value = metric.compute(metric.update(metric.init(), MetricBatch(samples=clips)))[metric.name]
    assert value.count == 2
    assert value.value == pytest.approx(np.mean([compute(clip.frames) for clip in clips]))
