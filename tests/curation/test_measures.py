import av
import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dit_video.core.resize import resize
from dit_video.curation import measures
from dit_video.curation.measures import Borders, FrameSample, ThumbnailMaker

lumas = arrays.arrays(
    np.float64,
    st.tuples(st.integers(8, 20), st.integers(8, 20)),
    elements=st.floats(0, 255, width=32),
)


def texture(height=96, width=128, *, seed=0):
    """Return a picture of smooth light and dark spots."""
    noise = np.random.default_rng(seed).random((height, width))
    smooth = scipy.ndimage.gaussian_filter(noise, 6, mode="wrap")
    return np.rint(255 * (smooth - smooth.min()) / (smooth.max() - smooth.min())).astype(np.uint8)


def test_luma_weighs_the_colours():
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 200, 200]]], np.uint8)
    np.testing.assert_allclose(measures.compute_luma(colours), [[76.245, 149.685, 29.07, 200]], rtol=1e-5)


@given(lumas, st.floats(-50, 50))
def test_a_brightened_picture_differs_by_its_change_of_luma(luma, change):
    assert measures.mean_difference(luma, luma) == 0
    assert measures.mean_difference(luma, luma + change) == pytest.approx(abs(change), abs=1e-9)


def test_black_needs_nearly_all_pixels():
    luma = np.full((10, 100), 25.0)
    assert measures.is_black(luma)
    luma[0, :20] = 26
    assert measures.is_black(luma)
    luma[0, 20] = 26
    assert not measures.is_black(luma)


@given(lumas)
def test_sharpness_is_the_variance_of_the_laplacian(luma):
    expected = scipy.ndimage.laplace(luma)[1:-1, 1:-1].var()
    assert measures.compute_sharpness(luma) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_blur_lowers_sharpness():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.float64)
    blurred = [
        measures.compute_sharpness(scipy.ndimage.gaussian_filter(noise, sigma)) for sigma in (0.0, 1.0, 2.0, 4.0)
    ]
    assert blurred == sorted(blurred, reverse=True)
    assert blurred[3] < blurred[0] / 1000


@given(top=st.integers(0, 20), bottom=st.integers(0, 20), left=st.integers(0, 20), right=st.integers(0, 20))
def test_borders_of_any_width_are_found(top, bottom, left, right):
    picture = np.full((64, 80), 100, np.uint8)
    picture[:top] = picture[64 - bottom :] = 16
    picture[:, :left] = picture[:, 80 - right :] = 0
    result = measures.find_borders(picture)
    assert result == Borders(top, bottom, left, right)
    assert result.compute_area_share(64, 80) == pytest.approx((picture != 100).mean())


def test_borders_ignore_specks_and_stop_at_dark_scenes():
    picture = np.full((50, 200), 17, np.uint8)
    picture[:10] = 3
    picture[4, 7] = 255
    assert measures.find_borders(picture) == Borders(10, 0, 0, 0)
    picture[4, :3] = 255
    assert measures.find_borders(picture) == Borders(4, 0, 0, 0)
    assert measures.find_borders(np.full((50, 200), 16, np.uint8)) is None
    assert Borders(1, 2, 3, 4).compute_area_share(50, 200) == pytest.approx(1 - 47 * 193 / 10_000)


@given(st.integers(0, 1000))
def test_the_hash_depends_on_low_frequencies(seed):
    luma = texture(40, 56, seed=seed).astype(np.float64)
    low = scipy.fft.dct(scipy.fft.dct(luma, axis=0), axis=1)[1:9, 1:9].ravel()
    expected = sum(1 << bit for bit in range(64) if low[bit] > np.median(low))
    assert measures.perceptual_hash(luma) == expected
    assert expected.bit_count() == 32


def test_the_hash_is_robust_to_copies():
    frame = np.repeat(texture()[..., None], 3, axis=-1)
    bits = measures.perceptual_hash(measures.compute_luma(frame))
    assert bits is not None
    copies = {
        "resized": resize(frame[None], 53, 70)[0],
        "brighter": np.clip(frame * 0.8 + 40, 0, 255).astype(np.uint8),
        "noisy": np.clip(frame + np.random.default_rng(1).normal(0, 8, frame.shape), 0, 255).astype(np.uint8),
    }
    for name, copy in copies.items():
        assert (bits ^ measures.perceptual_hash(measures.compute_luma(copy))).bit_count() <= 4, name
    others = [measures.perceptual_hash(texture(seed=seed).astype(float)) for seed in range(1, 30)]
    assert min((bits ^ other).bit_count() for other in others) > 10


def test_a_plain_picture_has_no_hash():
    luma = np.full((40, 40), 120.0)
    assert measures.perceptual_hash(luma) is None
    assert measures.perceptual_hash(luma + np.random.default_rng(0).normal(0, 1, luma.shape)) is None


def sample(steps=1, difference=0.0, *, black=False, sharpness=0.0, hash=None, borders=None):
    return FrameSample(0, steps, difference, black, sharpness, hash, borders, 100, 200)


def test_motion_is_the_change_per_second():
    # 8 differences in 1 s; what came before the first sample is another shot's.
    assert measures.compute_motion([sample(difference=200.0), *[sample(difference=3.0)] * 8]) == pytest.approx(24)
    # The same change in pictures that are shown longer.
    assert measures.compute_motion([sample(4), sample(4, 12.0), sample(1, 12.0)]) == pytest.approx(24)
    assert measures.compute_motion([sample(difference=9.0)]) == 0


def test_frozen_time_is_the_share_of_still_frames():
    moving, still = sample(difference=5.0), sample(difference=0.1)
    assert measures.compute_frozen_share([moving] * 9) == 0
    assert measures.compute_frozen_share([moving, *[still] * 8, *[moving] * 8]) == pytest.approx(8 / 16)
    assert measures.compute_frozen_share([moving, *[still] * 7, *[moving] * 9]) == 0  # below a second
    assert measures.compute_frozen_share([moving, *[still] * 3]) == 1  # all of it
    assert measures.compute_frozen_share([moving, sample(9, 5.0), *[moving] * 7]) == pytest.approx(
        8 / 16
    )  # one frame, long shown
    assert measures.compute_frozen_share([sample(2, 5.0)] * 20) == 0  # four frames a second
    assert measures.compute_frozen_share([moving]) == 0


def test_black_time_is_weighted():
    assert measures.compute_black_share([sample(3, black=True), sample(1)]) == pytest.approx(0.75)


def test_sharpness_is_of_pictures_that_are_not_black():
    values = [sample(sharpness=value) for value in (1.0, 50.0, 900.0)]
    assert measures.compute_median_sharpness([*values, *[sample(black=True, sharpness=0.0)] * 9]) == 50
    assert measures.compute_median_sharpness([sample(black=True)]) == 0


def test_the_letterbox_is_that_of_nine_pictures_in_ten():
    barred, subtitled = sample(borders=Borders(10, 12, 0, 0)), sample(borders=Borders(10, 2, 0, 0))
    black = sample(black=True)
    assert measures.find_letterbox([barred] * 19 + [subtitled] + [black] * 9, 100, 200) == Borders(10, 12, 0, 0)
    assert measures.find_letterbox([barred] * 8 + [subtitled] * 2, 100, 200) == Borders(10, 2, 0, 0)
    assert measures.find_letterbox([barred], 50, 300) == Borders(5, 6, 0, 0)  # shown at another size
    assert measures.find_letterbox([black], 100, 200) == Borders(0, 0, 0, 0)


def test_hashes_are_spread_over_the_clip():
    one_each = [sample(hash=number) for number in range(80)]
    assert measures.select_hashes(one_each) == (9, 29, 49, 69)
    assert measures.select_hashes([sample(70, hash=1), sample(10, hash=2)]) == (1, 1, 1, 1)
    assert measures.select_hashes([sample(50, hash=1), sample(20, hash=None), sample(10, hash=2)]) == (1, 1, 1, 2)
    assert measures.select_hashes([sample(hash=7)]) == (7, 7, 7, 7)
    assert measures.select_hashes([sample(), sample()]) is None


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuvj444p", "yuv422p"])
def test_luma_of_planar_formats_is_that_of_swscale(pixel_format):
    levels = np.arange(256, dtype=np.uint8).repeat(6).reshape(24, 64)[:, :63]
    grey = av.VideoFrame.from_ndarray(np.ascontiguousarray(levels), format="gray")
    full_range = 2 if pixel_format.startswith("yuvj") else 1
    frame = grey.reformat(format=pixel_format, src_color_range=2, dst_color_range=full_range)
    frame.color_range = full_range
    expected = frame.reformat(format="gray", src_color_range=full_range, dst_color_range=2).to_ndarray()
    np.testing.assert_array_equal(ThumbnailMaker("levels").make_luma(frame), expected)


def test_tiny_pictures_are_averages_of_areas():
    picture = np.stack([texture(seed=seed) for seed in range(3)], axis=-1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    tiny = ThumbnailMaker("texture").make_tiny_picture(frame, 6, 8)
    np.testing.assert_allclose(tiny, picture.reshape(6, 16, 8, 16, 3).mean(axis=(1, 3)), atol=1.5)
