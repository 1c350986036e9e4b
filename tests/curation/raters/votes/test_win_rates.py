"""Win rates with ties, and their intervals."""

import numpy as np
import pytest

from dit_video.curation.raters.votes.win_rates import compute_score_interval, compute_win_rate
from dit_video.evaluation.metrics.metric import compute_wilson_interval


def rate(scores, items=None):
    scores = np.array(scores, np.float64)
    return compute_win_rate(scores, np.arange(len(scores)) if items is None else np.array(items, np.int64))


def test_a_tie_is_half_a_win():
    result = rate([1, 1, 0.5, 0])
    assert result.value == 0.625
    assert (result.wins, result.ties, result.losses, result.prompts) == (2, 1, 1, 4)


@pytest.mark.parametrize(("wins", "count"), [(0, 5), (3, 5), (70, 100), (100, 100)])
def test_without_ties_the_interval_is_wilson_s(wins, count):
    expected = compute_wilson_interval(wins, count)
    assert rate([1] * wins + [0] * (count - wins)).interval == pytest.approx(expected, abs=1e-12)


def test_ties_narrow_the_interval_and_never_empty_it():
    low, high = compute_score_interval(0.5, 0.5, 40)
    wide_low, wide_high = compute_score_interval(0.5, 0.0, 40)
    assert wide_low < low < 0.5 < high < wide_high
    low, high = rate([0.5, 0.5]).interval
    assert low < 0.25 < 0.75 < high
    assert rate([]).interval == (0.0, 1.0)
    assert rate([]).value is None


def test_the_interval_of_the_opposite_answers_is_the_mirrored_one():
    scores = np.array([1, 1, 0.5, 0, 1, 0.5])
    low, high = rate(scores).interval
    assert rate(1 - scores).interval == pytest.approx((1 - high, 1 - low))


def test_many_raters_of_one_prompt_are_one_observation():
    scores, items = [1, 1, 0, 1], [0, 1, 2, 3]
    once = rate(scores, items).interval
    repeated = rate(np.repeat(scores, 50), np.repeat(items, 50)).interval
    naive = rate(np.repeat(scores, 50)).interval
    assert repeated[1] - repeated[0] > 0.8 * (once[1] - once[0])
    assert naive[1] - naive[0] < 0.3 * (once[1] - once[0])
    assert rate([1] * 50, [0] * 50).interval == rate([1]).interval


@pytest.mark.parametrize("tie_share", [0.0, 0.3])
@pytest.mark.parametrize("win_rate", [0.5, 0.75])
def test_the_interval_holds_the_true_rate_in_95_of_100_cases(win_rate, tie_share):
    generator = np.random.default_rng(0)
    shares = [win_rate - tie_share / 2, tie_share, 1 - win_rate - tie_share / 2]
    draws = generator.choice([1.0, 0.5, 0.0], (1500, 60), p=shares)
    intervals = np.array([rate(each).interval for each in draws])
    covered = (intervals[:, 0] <= win_rate) & (win_rate <= intervals[:, 1])
    assert 0.93 < covered.mean(axis=0) < 0.98
