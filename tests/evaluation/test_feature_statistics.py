"""Statistics of features: moments, Fréchet and kernel distance, precision and recall, inception score."""

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats

from dit_video.core.errors import UserError
from dit_video.evaluation.feature_statistics import (
    FeatureMoments,
    compute_frechet_distance,
    compute_inception_score,
    compute_kernel_distance,
    compute_overlap,
    compute_root_trace,
    find_nearest,
    find_nearest_other,
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


@pytest.mark.nightly
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


def test_the_kernel_distance_is_the_unbiased_estimate():
    first, second = draw(9, 4).astype(np.float64), draw(9, 4, seed=1, shift=0.5).astype(np.float64)
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    within = sum(np.mean([(each[i] @ each[j] / 4 + 1) ** 3 for i, j in pairs]) for each in (first, second))
    between = np.mean([(x @ y / 4 + 1) ** 3 for x in first for y in second])
    distance = compute_kernel_distance(first, second, subsets=3)
    assert distance.value == pytest.approx(within - 2 * between, rel=1e-9)
    assert distance.std == pytest.approx(0, abs=1e-9)


def test_the_kernel_distance_has_no_bias_by_the_number_of_examples():
    values = [
        compute_kernel_distance(draw(40, 4, seed=seed), draw(40, 4, seed=100 + seed), subsets=1) for seed in range(100)
    ]
    means = np.array([each.value for each in values])
    assert abs(means.mean()) < 2 * means.std() / 10
    far = compute_kernel_distance(draw(400, 4), draw(400, 4, seed=1, shift=1.0), subset_size=100)
    assert far.value > 10 * means.std()
    assert far.std > 0


def test_precision_and_recall_tell_faults_from_missing_modes():
    real = np.concatenate([draw(100, 4, seed=seed, shift=10 * seed) for seed in range(4)])
    same = np.concatenate([draw(100, 4, seed=10 + seed, shift=10 * seed) for seed in range(4)])
    overlap = compute_overlap(real, same)
    assert min(overlap) > 0.7
    missing = compute_overlap(real, same[:100])
    assert missing.precision > 0.7
    assert missing.recall < 0.3
    faulty = compute_overlap(real, np.concatenate([same, draw(400, 4, seed=20, shift=100)]))
    assert faulty.precision < 0.55
    assert faulty.recall > 0.7
    assert compute_overlap(real, real) == (1.0, 1.0)
    assert compute_overlap(real, draw(50, 4, shift=1000)) == (0.0, 0.0)


def test_overlap_equals_the_definition_over_blocks_of_examples():
    real, generated = draw(1100, 2), draw(1050, 2, seed=1, shift=1.0)

    def is_covered(centres, points):
        within = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        radii = np.sort(within, axis=1)[:, 3]
        return (np.linalg.norm(points[:, None] - centres[None], axis=-1) <= radii).any(axis=1).mean()

    overlap = compute_overlap(real, generated)
    assert overlap.precision == pytest.approx(is_covered(real, generated), abs=2e-3)
    assert overlap.recall == pytest.approx(is_covered(generated, real), abs=2e-3)


def test_the_inception_score_is_the_number_of_classes_that_are_told_apart():
    sure = 50 * np.eye(5, dtype=np.float32)[np.arange(200) % 5]
    assert compute_inception_score(sure) == pytest.approx((5, 0), abs=1e-6)
    assert compute_inception_score(np.zeros((20, 7), np.float32)) == pytest.approx((1, 0), abs=1e-9)
    assert compute_inception_score(np.repeat(sure[:1], 20, axis=0)) == pytest.approx((1, 0), abs=1e-9)


def test_the_inception_score_equals_its_definition_in_each_split():
    logits = 2 * draw(30, 6)
    probs = scipy.special.softmax(logits.astype(np.float64), axis=1)
    scores = [
        np.exp(np.mean([scipy.stats.entropy(each, part.mean(axis=0)) for each in part]))
        for part in (probs[:10], probs[10:20], probs[20:])
    ]
    assert compute_inception_score(logits, splits=3) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)


def test_equal_frames_of_clips_count_as_one_example():
    first, second, logits = draw(40, 4), draw(30, 4, seed=1, shift=0.5), 2 * draw(40, 6)

    def repeat(features):
        return np.repeat(features, 3, axis=0), np.repeat(np.arange(len(features)), 3)

    (many, own), (others, theirs) = repeat(first), repeat(second)
    one = compute_kernel_distance(first, second, subset_size=15)
    together = compute_kernel_distance(many, others, subset_size=15, clips=(own, theirs))
    assert together == pytest.approx(one, rel=1e-6)
    # Pairs of frames of one clip, and more of them, would change both the value and its deviation.
    apart = compute_kernel_distance(many, others, subset_size=45)
    assert apart.value > one.value + one.std / 2
    assert compute_overlap(many, others, clips=(own, theirs)) == compute_overlap(first, second)
    assert compute_overlap(many, others) != compute_overlap(first, second)
    scores = compute_inception_score(logits, splits=3)
    repeated, numbers = repeat(logits)
    assert compute_inception_score(repeated, splits=3, clips=numbers) == pytest.approx(scores, rel=1e-9)
    assert compute_inception_score(repeated, splits=3) != pytest.approx(scores, rel=1e-3)


def test_the_nearest_other_point_is_of_another_clip():
    points = np.array([[0], [1], [1.5], [4]], np.float32)
    distances, numbers = find_nearest_other(points)
    np.testing.assert_allclose(distances, [1, 0.5, 0.5, 2.5])
    assert numbers.tolist() == [1, 2, 1, 2]
    distances, numbers = find_nearest_other(points, np.array([0, 1, 1, 2]))
    np.testing.assert_allclose(distances, [1, 1, 1.5, 2.5])
    assert numbers.tolist() == [1, 0, 0, 2]
    assert find_nearest(points, points)[1].tolist() == [0, 1, 2, 3]


def test_what_has_no_value_is_refused():
    with pytest.raises(UserError, match="a kernel distance of 1 clips"):
        compute_kernel_distance(draw(1, 4), draw(5, 4))
    with pytest.raises(UserError, match="one set has 4 features, the other 3"):
        compute_kernel_distance(draw(5, 4), draw(5, 3))
    with pytest.raises(UserError, match="neighbours=3 is invalid for 3 clips"):
        compute_overlap(draw(3, 4), draw(9, 4))
    with pytest.raises(UserError, match="splits=10 is invalid for 9 clips"):
        compute_inception_score(draw(9, 4))
