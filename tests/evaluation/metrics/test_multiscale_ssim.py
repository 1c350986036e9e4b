"""SSIM and MS-SSIM against scikit-image, pytorch-msssim and the published formula."""

import dataclasses

import numpy as np
import pytest
from scipy.ndimage import correlate, gaussian_filter

from dit_video.core.errors import UserError
from dit_video.evaluation.metrics.metric import ClipReconstruction, MetricBatch
from dit_video.evaluation.metrics.reconstruction import MultiscaleSsim, compute_multiscale_ssim, count_scales, ssim
from dit_video.video import Clip


def make_frames(seed, height, width, frames=2):
    """Return smooth random frames, whose neighbouring pixels are alike as in pictures."""
    noise = np.random.default_rng(seed).normal(size=(frames, height, width, 3))
    smooth = gaussian_filter(noise, (0, 3, 3, 0))
    return np.clip(127 + 60 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def add_noise(frames, strength, seed=9):
    noise = np.random.default_rng(seed).normal(size=frames.shape)
    return np.clip(frames + strength * noise, 0, 255).astype(np.uint8)


def make_pair(height, width, strength=20.0, frames=2):
    original = make_frames(0, height, width, frames)
    clips = (Clip(frames=each, fps=8) for each in (original, add_noise(original, strength)))
    return ClipReconstruction("clip", *clips)


def compute_published(a, b, weights):
    """Return MS-SSIM of two planes, written after the paper: a window of weights, box filters, every second pixel."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(plane):
        return correlate(plane, window)[5:-5, 5:-5]

    product = 1.0
    for level, weight in enumerate(weights):
        if level:
            box = np.full((2, 2), 0.25)
            a, b = (correlate(each, box, mode="reflect", origin=-1)[::2, ::2] for each in (a, b))
        mean_a, mean_b = mean(a), mean(b)
        variances = mean(a**2) - mean_a**2 + mean(b**2) - mean_b**2
        structure = (2 * (mean(a * b) - mean_a * mean_b) + 7.65**2) / (variances + 7.65**2)
        luminance = (2 * mean_a * mean_b + 2.55**2) / (mean_a**2 + mean_b**2 + 2.55**2)
        is_last = level == len(weights) - 1
        product *= (structure * luminance if is_last else structure).mean() ** weight
    return product


@pytest.mark.parametrize("size", [(32, 48), (19, 16)])
def test_ssim_equals_that_of_scikit_image(size):
    metrics = pytest.importorskip("skimage.metrics")
    original = make_frames(0, *size)
    other = add_noise(original, 25.0)
    options = {"win_size": 11, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [
        metrics.structural_similarity(*pair, channel_axis=-1, data_range=255, **options)
        for pair in zip(original, other, strict=True)
    ]
    # It crops 5 pixels of each border, as ours does.
    assert ssim(original, other) == pytest.approx(np.mean(expected), rel=1e-9)


@pytest.mark.parametrize(("size", "scales"), [((176, 180), 5), ((90, 89), 4), ((47, 49), 3), ((11, 30), 1)])
def test_ms_ssim_equals_the_published_formula(size, scales):
    original = make_frames(1, *size, frames=1)
    other = add_noise(original, 30.0)
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:scales])
    weights = weights if scales == 5 else weights / weights.sum()
    planes = [compute_published(*(x[0, ..., c].astype(float) for x in (original, other)), weights) for c in range(3)]
    value = compute_multiscale_ssim(original, other)
    assert value.scales == scales
    assert value.value == pytest.approx(np.mean(planes), rel=1e-9)
    assert 0 < value.value < 1


@pytest.mark.parity
@pytest.mark.parametrize("size", [(176, 192), (256, 256)])
def test_ms_ssim_equals_pytorch_msssim(size):
    torch, package = pytest.importorskip("torch"), pytest.importorskip("pytorch_msssim")
    original = make_frames(2, *size)
    other = add_noise(original, 40.0)
    tensors = [torch.tensor(each).movedim(-1, 1).double() for each in (original, other)]
    expected = package.ms_ssim(*tensors, data_range=255, size_average=True)
    assert compute_multiscale_ssim(original, other).value == pytest.approx(float(expected), rel=1e-6)


def test_one_scale_is_ssim():
    original = make_frames(3, 40, 40)
    other = add_noise(original, 10.0)
    # The mean over positions comes first in both; no power changes it.
    assert compute_multiscale_ssim(original, other, scales=1).value == pytest.approx(ssim(original, other), rel=1e-12)


def test_equal_clips_are_at_one_and_noise_and_blur_lower_it():
    original = make_frames(4, 64, 64)
    assert compute_multiscale_ssim(original, original).value == pytest.approx(1.0)
    for others in (
        [add_noise(original, strength) for strength in (5.0, 20.0, 60.0)],
        [gaussian_filter(original, (0, sigma, sigma, 0)) for sigma in (1.0, 2.0, 4.0)],
    ):
        values = [compute_multiscale_ssim(original, other).value for other in others]
        assert 1 > values[0] > values[1] > values[2] >= 0


def test_an_inverted_clip_has_no_similarity_rather_than_a_power_of_a_negative_number():
    original = make_frames(5, 48, 48)
    assert compute_multiscale_ssim(original, 255 - original).value == 0.0


def test_as_many_scales_as_fit_are_used():
    sides = {176: 5, 175: 4, 88: 4, 87: 3, 44: 3, 43: 2, 22: 2, 21: 1, 11: 1}
    assert {side: count_scales(side, 500) for side in sides} == sides
    with pytest.raises(UserError, match="10x500; use PSNR"):
        count_scales(10, 500)
    with pytest.raises(UserError, match=r"scales=4 is invalid.*1 to 3 fit. Use 3"):
        compute_multiscale_ssim(make_frames(0, 48, 48), make_frames(0, 48, 48), scales=4)
    with pytest.raises(UserError, match="resize or cut one of them"):
        compute_multiscale_ssim(make_frames(0, 48, 48), make_frames(0, 48, 50))


def test_mixed_numbers_of_scales_are_noted():
    metric = MultiscaleSsim()
    small, large = make_pair(32, 32), make_pair(48, 48)
    image = ClipReconstruction("image", *(dataclasses.replace(x, frames=x.frames[:1]) for x in small[1:3]))
    state = metric.update(metric.init(), MetricBatch(pairs=[small, image]))
    assert metric.compute(state)["multiscale_ssim"].note == "2 scales"
    value = metric.compute(metric.update(state, MetricBatch(pairs=[large])))["multiscale_ssim"]
    assert value.count == 3
    assert value.note == "mixed numbers of scales, whose values are not comparable: 2 for 2 clips, 3 for 1 clips"
    assert value.value == pytest.approx(
        np.mean([each.value for each in metric.measure(MetricBatch(pairs=[small, image, large]))])
    )
    empty = metric.compute(metric.init())["multiscale_ssim"]
    assert (empty.value, empty.count, empty.note) == (None, 0, "")
