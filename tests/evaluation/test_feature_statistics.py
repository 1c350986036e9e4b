"""Moments of features and the Fréchet distance."""

import numpy as np
import pytest
import scipy.linalg

from dit_video.core.errors import UserError
from dit_video.evaluation.feature_statistics import (
    FeatureMoments,
    compute_frechet_distance,
    compute_root_trace,
    measure_frechet_distance,
)


def draw(count, channels=6, *, seed=0, shift=0.0, scale=1.0):
    return (shift + scale * np.random.default_rng(seed).standard_normal((count, channels))).astype(np.float32)


def accumulate(features, chunk=7):
    moments = FeatureMoments.zeros(features.shape[1])
    for start in range(0, len(features), chunk):
        moments = moments.add(features[start : start + chunk])
    return moments


def make_covariance(channels, condition, *, seed):
    generator = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(generator.standard_normal((channels, channels)))
    return (basis * np.geomspace(1, 1 / condition, channels)) @ basis.T


def test_mean_and_covariance_equal_those_of_all_features():
    features = draw(101, shift=30.0)
    mean, covariance = accumulate(features).compute()
    np.testing.assert_allclose(mean, features.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-11)


def test_chunks_and_processes_give_the_same_moments():
    features = draw(64)
    whole = accumulate(features, chunk=64)
    for parts in (accumulate(features, chunk=5), accumulate(features[:32]).merge(accumulate(features[32:]))):
        for actual, expected in zip(parts, whole, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("condition", [1e2, 1e8, 1e14])
def test_the_trace_equals_that_of_scipy(condition):
    first, second = (make_covariance(40, condition, seed=seed) for seed in (0, 1))
    expected = np.trace(scipy.linalg.sqrtm(first @ second)).real
    assert compute_root_trace(first, second) == pytest.approx(expected, rel=1e-6)


def test_covariances_of_fewer_examples_than_features_have_an_exact_trace():
    factors = [draw(10, 40, seed=seed).astype(np.float64) for seed in (0, 1)]
    # tr sqrt(A A' B B') is the sum of the singular values of A' B.
    expected = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    products = [each.T @ each for each in factors]
    assert compute_root_trace(*products) == pytest.approx(expected, rel=1e-6)


def test_the_distance_of_normal_distributions_is_known():
    first, second = (
        accumulate(draw(20_000, seed=seed, **options), 1000)
        for seed, options in (
            (0, {}),
            (1, {"shift": 0.5, "scale": 2.0}),
        )
    )
    assert compute_frechet_distance(first, second) == pytest.approx(6 * 0.5**2 + 6 * (2 - 1) ** 2, rel=0.02)
    assert compute_frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_the_limit_is_closer_to_the_truth_and_half_the_examples_farther():
    errors = []
    for seed in range(10):
        sets = (accumulate(draw(320, 20, seed=100 + 2 * seed + number), 64) for number in range(2))
        distance = measure_frechet_distance(*sets)
        assert distance.half > distance.value > distance.limit
        errors.append((distance.half, distance.value, abs(distance.limit)))
    half, value, limit = np.mean(errors, axis=0)
    assert half == pytest.approx(2 * value, rel=0.15)
    assert limit < value / 5


def test_the_interval_holds_the_mean_of_other_draws():
    values, intervals = [], []
    for seed in range(60):
        sets = (accumulate(draw(256, seed=500 + 2 * seed + number, shift=0.3 * number), 64) for number in range(2))
        distance = measure_frechet_distance(*sets)
        values.append(distance.value)
        intervals.append(distance.interval)
    inside = [low <= np.mean(values) <= high for low, high in intervals]
    assert np.mean(inside) > 0.85
    assert np.ptp(intervals[0], axis=0) < np.mean(values)


def test_equal_frames_of_clips_do_not_narrow_the_interval():
    sets = [draw(192, seed=seed, shift=0.3 * seed) for seed in (0, 1)]
    frames = 4

    def measure_width(*moments):
        return np.ptp(measure_frechet_distance(*moments).interval, axis=0)

    empty = FeatureMoments.zeros(6)
    one = measure_width(*(empty.add(each) for each in sets))
    repeated = [np.repeat(each, frames, axis=0) for each in sets]
    together = [empty.add(each, [frames] * 192) for each in repeated]
    assert [each.clip_count for each in together] == [192, 192]
    assert measure_width(*together) == pytest.approx(one, rel=0.02)
    # With frames of a clip in groups of their own, groups are alike: the error that this avoids.
    assert measure_width(*(empty.add(each) for each in repeated)) < one / 1.5


def test_clips_of_other_lengths_keep_their_groups_in_every_batch():
    features, lengths = draw(90), np.tile([1, 5, 3], 10)
    whole = FeatureMoments.zeros(6).add(features, lengths)
    parts = FeatureMoments.zeros(6).add(features[:36], lengths[:12]).add(features[36:], lengths[12:])
    for actual, expected in zip(parts, whole, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)
    assert whole.counts[:4].tolist() == [1, 5, 3, 1]


def test_what_has_no_distance_is_refused():
    with pytest.raises(UserError, match="features of 1 of 4 clips are not finite"):
        FeatureMoments.zeros(2).add(np.array([[0, 1], [np.nan, 1], [2, 3], [4, 5]], np.float32))
    with pytest.raises(UserError, match="a covariance of 1 examples is invalid"):
        compute_frechet_distance(accumulate(draw(1)), accumulate(draw(9)))
    with pytest.raises(UserError, match="one set has 6 features, the other 5"):
        compute_frechet_distance(accumulate(draw(9)), accumulate(draw(9, 5)))
