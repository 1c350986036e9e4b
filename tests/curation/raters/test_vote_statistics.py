"""Statistics of votes: win rates, Bradley-Terry scores and agreement, and the coverage of their intervals."""

import itertools

import numpy as np
import pytest
from scipy.special import expit

from dit_video.curation.raters.vote_statistics import (
    compute_krippendorff_alpha,
    compute_score_interval,
    compute_win_rate,
    fit_bradley_terry,
)
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


SCORES = np.array([0.9, 0.2, -0.3, -0.8])


def draw_votes(generator, scores, *, prompts, raters, tie_rate=1.0, effect=0.0):
    """Return wins and ties `[prompt S S]` of raters on all pairs; P(tie) = tie_rate p (1 - p), and p counts it half."""
    systems = len(scores)
    wins, ties = np.zeros((2, prompts, systems, systems))
    for i, j in itertools.combinations(range(systems), 2):
        p = expit(scores[i] - scores[j] + effect * generator.normal(size=prompts))
        tie = tie_rate * p * (1 - p)
        shares = np.stack([p - tie / 2, tie, 1 - p - tie / 2], axis=1)
        counts = generator.multinomial(raters, shares)
        wins[:, i, j], wins[:, j, i] = counts[:, 0], counts[:, 2]
        ties[:, i, j] = ties[:, j, i] = counts[:, 1]
    return wins, ties


def measure_coverage(scores, repeats=100, **options):
    """Return the share of scores that are in their interval, and the mean width of the intervals."""
    generator = np.random.default_rng(0)
    fits = [fit_bradley_terry(*draw_votes(generator, scores, **options)) for _ in range(repeats)]
    intervals = np.stack([fit.intervals for fit in fits])
    covered = (intervals[..., 0] <= scores) & (scores <= intervals[..., 1])
    return covered.mean(axis=(0, 1)), (intervals[..., 1] - intervals[..., 0]).mean(axis=(0, 1))


def test_1000_raters_recover_the_scores_in_95_of_100_cases():
    # 1,000 raters with 6 votes each on 40 prompts and 6 pairs of systems: 25 votes on each.
    coverage, width = measure_coverage(SCORES, prompts=40, raters=25)
    assert 0.90 <= coverage <= 0.99
    assert width < 0.2


def test_few_votes_keep_the_coverage():
    coverage, _ = measure_coverage(SCORES, prompts=30, raters=1)
    assert 0.90 <= coverage <= 0.99


def test_prompts_that_prefer_a_system_widen_the_intervals():
    equal = np.zeros(4)
    coverage, width = measure_coverage(equal, prompts=30, raters=20, effect=1.5)
    _, independent = measure_coverage(equal, prompts=30, raters=20)
    assert 0.90 <= coverage <= 0.99
    assert width > 2 * independent  # one of independent votes would hold 1 of 2 scores


def test_two_systems_have_the_log_odds_of_their_wins():
    wins = np.array([[[0, 3], [0, 0]], [[0, 0], [1, 0]]], np.float64)
    fit = fit_bradley_terry(wins, np.zeros_like(wins))
    assert fit.scores[0] - fit.scores[1] == pytest.approx(np.log(3))
    assert fit.scores.sum(axis=0) == pytest.approx(0)


def test_a_tie_is_half_a_win_for_each():
    wins = np.array([[[0, 2], [0, 0]], [[0, 0], [0, 0]]], np.float64)
    ties = np.array([[[0, 0], [0, 0]], [[0, 2], [2, 0]]], np.float64)
    fit = fit_bradley_terry(wins, ties)
    assert fit.scores[0] - fit.scores[1] == pytest.approx(np.log(3))


def test_expected_votes_give_the_exact_scores():
    wins = np.repeat(100 * expit(SCORES[:, None] - SCORES)[None] * (1 - np.eye(4)), 5, axis=0)
    np.testing.assert_allclose(fit_bradley_terry(wins, np.zeros_like(wins)).scores, SCORES, atol=1e-8)


def test_ties_alone_do_not_make_the_intervals_empty():
    ties = np.repeat(1 - np.eye(3)[None], 4, axis=0)
    fit = fit_bradley_terry(np.zeros_like(ties), ties)
    np.testing.assert_allclose(fit.scores, 0, atol=1e-12)
    assert (fit.intervals[:, 1] > 0.3).all()


def test_one_prompt_determines_no_interval():
    wins = np.array([[[0, 3], [1, 0]]], np.float64)
    assert np.isinf(fit_bradley_terry(wins, np.zeros_like(wins)).intervals).all()


def test_a_system_that_always_wins_or_was_not_compared_has_no_finite_score():
    wins = np.array([[[0, 4], [0, 0]]], np.float64)
    assert fit_bradley_terry(wins, np.zeros_like(wins)) is None
    apart = np.zeros((2, 3, 3))
    apart[:, 0, 1] = apart[:, 1, 0] = 2
    assert fit_bradley_terry(apart, np.zeros_like(apart)) is None


NONE = np.nan
EXAMPLE = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
        [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
    ]
)
"""Example of Krippendorff (2011) with four raters, twelve units and missing answers."""


@pytest.mark.parametrize(("is_ordered", "alpha"), [(False, 0.743), (True, 0.849)])
def test_the_published_example_has_the_published_alpha(is_ordered, alpha):
    assert compute_krippendorff_alpha(EXAMPLE, is_ordered=is_ordered) == pytest.approx(alpha, abs=5e-4)


def test_equal_answers_agree_and_random_ones_do_not():
    generator = np.random.default_rng(0)
    answers = generator.choice([0, 0.5, 1], (3, 4000))
    assert compute_krippendorff_alpha(np.repeat(answers[:1], 3, axis=0)) == pytest.approx(1)
    assert compute_krippendorff_alpha(answers) == pytest.approx(0, abs=0.03)
    assert compute_krippendorff_alpha(np.stack([answers[0], 1 - answers[0]])) < -0.9


def test_a_tie_against_a_win_is_a_smaller_disagreement_than_a_loss_against_a_win():
    close = np.array([[1, 0, 1, 0.5], [1, 0, 0.5, 0]])
    far = np.array([[1.0, 0, 1, 1], [1, 0, 0, 0]])
    assert compute_krippendorff_alpha(close) > compute_krippendorff_alpha(far)


def test_without_two_answers_on_a_unit_or_two_values_there_is_no_alpha():
    assert compute_krippendorff_alpha(np.array([[1, NONE], [NONE, 0]])) is None
    assert compute_krippendorff_alpha(np.ones((2, 3))) is None
    assert compute_krippendorff_alpha(np.empty((0, 3))) is None
