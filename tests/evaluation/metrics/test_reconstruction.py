import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.evaluation.metrics.reconstruction import psnr, ssim


def random_clip(seed, frames=2, height=16, width=19):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3)).astype(np.uint8)


def plain(value, height=16):
    return np.full((2, height, 16, 3), value, np.uint8)


def test_psnr_of_known_errors():
    assert psnr(plain(100), plain(101)) == pytest.approx(48.1308036)  # 20 log10 255
    assert psnr(plain(0), plain(255)) == pytest.approx(0.0)
    assert psnr(plain(10), plain(10)) == float("inf")
    half = plain(100)
    half[0] += 10  # the error is over the whole clip, not the mean of two PSNRs
    assert psnr(plain(100), half) == pytest.approx(10 * np.log10(255**2 / 50))


def test_psnr_does_not_wrap_around():
    assert psnr(plain(255), plain(0)) == psnr(plain(0), plain(255))


def test_ssim_of_plain_frames_is_the_luminance_term():
    c1 = (0.01 * 255) ** 2
    for a, b in ((100, 120), (0, 255), (7, 7)):
        assert ssim(plain(a), plain(b)) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))


def test_ssim_equals_its_definition():
    """The definition is that of Wang et al. 2004, eq. 13-16, computed window by window."""
    a, b = random_clip(0, frames=1, height=13, width=12), random_clip(1, frames=1, height=13, width=12)
    b = (0.6 * a + 0.4 * b).astype(np.uint8)
    y, x = np.mgrid[-5:6, -5:6]
    weights = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for row in range(3):
        for column in range(2):
            for plane in range(3):
                u = a[0, row : row + 11, column : column + 11, plane].astype(float)
                v = b[0, row : row + 11, column : column + 11, plane].astype(float)
                mu, mv = (weights * u).sum(), (weights * v).sum()
                uu, vv = (weights * (u - mu) ** 2).sum(), (weights * (v - mv) ** 2).sum()
                uv = (weights * (u - mu) * (v - mv)).sum()
                c1, c2 = 2.55**2, 7.65**2
                values.append((2 * mu * mv + c1) * (2 * uv + c2) / ((mu**2 + mv**2 + c1) * (uu + vv + c2)))
    assert ssim(a, b) == pytest.approx(np.mean(values), rel=1e-9)


def test_ssim_is_symmetric_and_falls_with_noise():
    clip, other = random_clip(2), random_clip(3)
    assert ssim(clip, clip) == pytest.approx(1.0)
    assert ssim(clip, other) == pytest.approx(ssim(other, clip))
    assert -0.2 < ssim(clip, other) < 0.2
    assert ssim(clip, 255 - clip) < 0
    values = [ssim(clip, np.clip(clip + noise, 0, 255).astype(np.uint8)) for noise in (5.0, 20.0, 60.0)]
    assert values == sorted(values, reverse=True)


def test_unlike_and_small_clips_are_refused():
    for metric in (psnr, ssim):
        with pytest.raises(UserError, match="resize or cut one of them"):
            metric(plain(1), plain(1, height=15))
    with pytest.raises(UserError, match="11x11"):
        ssim(plain(1, height=10), plain(1, height=10))
