"""Bradley–Terry scores: identities, and the coverage of their intervals."""

import itertools

import numpy as np
import pytest
from scipy.special import expit

from dit_video.curation.raters.votes.bradley_terry import fit_bradley_terry

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
