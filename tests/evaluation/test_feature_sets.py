"""Kernel distance, precision and recall, and inception score."""

import numpy as np
import pytest
import scipy.special
import scipy.stats

from dit_video.core.errors import UserError
from dit_video.evaluation.feature_statistics import (
    compute_inception_score,
    compute_kernel_distance,
    compute_overlap,
    find_nearest,
    find_nearest_other,
)


def draw(count, channels=4, *, seed=0, shift=0.0):
    return (shift + np.random.default_rng(seed).standard_normal((count, channels))).astype(np.float32)


def test_the_kernel_distance_is_the_unbiased_estimate():
    first, second = draw(9).astype(np.float64), draw(9, seed=1, shift=0.5).astype(np.float64)
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    within = sum(np.mean([(each[i] @ each[j] / 4 + 1) ** 3 for i, j in pairs]) for each in (first, second))
    between = np.mean([(x @ y / 4 + 1) ** 3 for x in first for y in second])
    distance = compute_kernel_distance(first, second, subsets=3)
    assert distance.value == pytest.approx(within - 2 * between, rel=1e-9)
    assert distance.std == pytest.approx(0, abs=1e-9)


def test_the_kernel_distance_has_no_bias_by_the_number_of_examples():
    values = [compute_kernel_distance(draw(40, seed=seed), draw(40, seed=100 + seed), subsets=1) for seed in range(100)]
    means = np.array([each.value for each in values])
    assert abs(means.mean()) < 2 * means.std() / 10
    far = compute_kernel_distance(draw(400), draw(400, seed=1, shift=1.0), subset_size=100)
    assert far.value > 10 * means.std()
    assert far.std > 0


def test_precision_and_recall_tell_faults_from_missing_modes():
    real = np.concatenate([draw(100, seed=seed, shift=10 * seed) for seed in range(4)])
    same = np.concatenate([draw(100, seed=10 + seed, shift=10 * seed) for seed in range(4)])
    overlap = compute_overlap(real, same)
    assert min(overlap) > 0.7
    missing = compute_overlap(real, same[:100])
    assert missing.precision > 0.7
    assert missing.recall < 0.3
    faulty = compute_overlap(real, np.concatenate([same, draw(400, seed=20, shift=100)]))
    assert faulty.precision < 0.55
    assert faulty.recall > 0.7
    assert compute_overlap(real, real) == (1.0, 1.0)
    assert compute_overlap(real, draw(50, shift=1000)) == (0.0, 0.0)


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
    first, second, logits = draw(40), draw(30, seed=1, shift=0.5), 2 * draw(40, 6)

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
        compute_kernel_distance(draw(1), draw(5))
    with pytest.raises(UserError, match="one set has 4 features, the other 3"):
        compute_kernel_distance(draw(5), draw(5, 3))
    with pytest.raises(UserError, match="neighbours=3 is invalid for 3 clips"):
        compute_overlap(draw(3), draw(9))
    with pytest.raises(UserError, match="splits=10 is invalid for 9 clips"):
        compute_inception_score(draw(9))
