import numpy as np
import pytest

from dit_video.evaluation.metrics.metric import compute_mean_interval, compute_wilson_interval


def test_the_wilson_interval_is_that_of_the_formula():
    assert compute_wilson_interval(0, 0) == (0.0, 1.0)
    assert compute_wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert compute_wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert compute_wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_the_interval_of_a_mean_is_student_s():
    assert compute_mean_interval([1.0, 2.0, 3.0]) == pytest.approx(
        (2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), abs=1e-5
    )
    assert compute_mean_interval([4.0]) is None
    assert compute_mean_interval([]) is None


def test_the_interval_covers_the_true_mean_in_95_of_100_cases():
    draws = np.random.default_rng(0).normal(7.0, 2.0, (1000, 4))
    intervals = np.asarray([compute_mean_interval(row.tolist()) for row in draws])
    assert np.mean((intervals[:, 0] < 7) & (intervals[:, 1] > 7)) == pytest.approx(0.95, abs=0.02)
