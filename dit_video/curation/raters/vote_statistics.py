"""Statistics of votes on pairs: win rates with ties as half a win, Bradley-Terry scores, agreement between raters."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from scipy.optimize import root
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, ndtri, stdtrit

QUANTILE = float(ndtri(0.975))
"""Quantile of the normal distribution for 95 % intervals."""


class WinRate(NamedTuple):
    """The share of votes that a system wins against another one; a tie is half a win."""

    value: float | None
    """Share of wins, 0 to 1; None without votes."""
    interval: tuple[float, float]
    """Bounds of the 95 % interval."""
    wins: int
    """Number of votes for the system."""
    ties: int
    """Number of votes for neither."""
    losses: int
    """Number of votes for the other system."""
    prompts: int
    """Number of prompts with votes."""


def compute_win_rate(scores: Float64[np.ndarray, " n"], items: Int64[np.ndarray, " n"]) -> WinRate:
    """Return the win rate of a system from its votes.

    The interval is `compute_score_interval` of an effective number of votes: votes of several raters on one pair are
    not independent, so their number is divided by the design effect (Kish 1965), the variance of the mean with
    prompts as clusters over that of independent votes, and at least 1. (Wilson's interval with that number is one of
    those of Korn and Graubard 1998.) If all votes are equal, they determine no design effect, and the number of
    prompts is used.

    Args:
      scores: 1 for a vote for the system, 0.5 for a tie, 0 for a vote for the other one.
      items: Number of each vote's prompt.
    """
    if not len(scores):
        return WinRate(value=None, interval=(0.0, 1.0), wins=0, ties=0, losses=0, prompts=0)
    value, prompts = float(scores.mean(axis=0)), len(np.unique(items))
    wins, ties, losses = (int((scores == score).sum(axis=0)) for score in (1, 0.5, 0))
    interval = compute_score_interval(value, ties / len(scores), _compute_effective_count(scores, items))
    return WinRate(value, interval, wins, ties, losses, prompts)


def _compute_effective_count(scores: Float64[np.ndarray, " n"], items: Int64[np.ndarray, " n"]) -> float:
    """Return the number of independent votes that determine the mean as well as these do."""
    count, (names, clusters) = len(scores), np.unique(items, return_inverse=True)
    centred = scores - scores.mean(axis=0)
    independent = float((centred**2).sum(axis=0))
    if independent < 1e-12 or len(names) == 1:
        return float(len(names))
    sums = np.bincount(clusters, weights=centred, minlength=len(names))
    clustered = float((sums**2).sum(axis=0)) * len(names) / (len(names) - 1)
    return count / max(1.0, clustered / (independent * count / (count - 1)))


def compute_score_interval(value: float, tie_share: float, count: float | int) -> tuple[float, float]:
    """Return the 95 % interval of a win rate, which is Wilson's (1927) if there are no ties.

    A vote is 1, 1/2 or 0; with a share t of ties its variance is p (1 - p) - t / 4, so that the bounds p solve
    n (value - p)² = z² (p (1 - p) - t / 4). For t the observed share times n / (n + z²) is used: few votes that are
    all ties do not make the interval empty. (Ties as half a win of a binomial variable, the usual choice, would make
    it too wide.)

    Args:
      value: Share of wins, with ties as half a win.
      tie_share: Share of ties.
      count: Number of independent votes.
    """
    square = QUANTILE**2
    ties = tie_share * count / (count + square)
    spread = 4 * count * (value * (1 - value) - ties / 4) + square * (1 - ties)
    centre, reach = 2 * count * value + square, QUANTILE * max(0.0, spread) ** 0.5
    low, high = ((centre + sign * reach) / (2 * (count + square)) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


class BradleyTerryFit(NamedTuple):
    """Scores of systems: i is preferred to j with probability 1 / (1 + exp(s_j - s_i)), a tie being half a win."""

    scores: Float64[np.ndarray, " S"]
    """Log odds, with mean 0."""
    intervals: Float64[np.ndarray, "S 2"]
    """Bounds of the 95 % interval of each score."""


def fit_bradley_terry(
    wins: Float64[np.ndarray, "item S S"], ties: Float64[np.ndarray, "item S S"]
) -> BradleyTerryFit | None:
    """Return the scores of largest likelihood (Bradley and Terry 1952) with 95 % intervals; None if none are finite.

    Scores are finite if no group of systems wins every vote against the others (Ford 1957). Intervals are those of
    Student's t with one degree of freedom less than there are prompts. The variance is the robust one, the inverse
    information around the sum over prompts of outer products of the likelihood's gradient: it holds for ties, which are
    no outcome of the model, and for votes on the same samples, which are not independent (Liang and Zeger 1986). It is
    not below the inverse Fisher information times 1 - t, the variance of independent votes on equal systems with a
    share t of ties, shrunk as in `compute_score_interval`: prompts whose votes happen to agree do not make the
    interval empty.

    Args:
      wins: For each prompt the number of votes for system i (first axis) against j.
      ties: For each prompt the number of ties of i and j; symmetric.
    """
    halves = wins + ties / 2
    halves = halves[halves.sum(axis=(1, 2)) > 0]
    total, prompts, systems = halves.sum(axis=0), len(halves), wins.shape[1]
    groups, _ = connected_components(total > 0, directed=True, connection="strong")
    if groups != 1 or systems < 2:
        return None
    # The likelihood depends on differences alone and says nothing of their mean, which this matrix holds at 0.
    mean = np.full((systems, systems), 1 / systems)

    def compute_gradients(scores: np.ndarray) -> np.ndarray:
        """Return the gradient of each prompt's log likelihood."""
        return (halves - (halves + halves.swapaxes(1, 2)) * expit(scores[:, None] - scores)).sum(axis=2)

    def compute_information(scores: np.ndarray) -> np.ndarray:
        expected = expit(scores[:, None] - scores)
        weights = (total + total.T) * expected * expected.T
        return np.diag(weights.sum(axis=1)) - weights + mean

    scores = root(
        lambda scores: compute_gradients(scores).sum(axis=0) - mean @ scores,
        np.zeros(systems),
        jac=lambda scores: -compute_information(scores),
        tol=1e-12,
    ).x
    inverse, gradients = np.linalg.inv(compute_information(scores)) - mean, compute_gradients(scores)
    robust = inverse @ (gradients.T @ gradients * prompts / max(1, prompts - 1)) @ inverse
    tie_share = float(ties.sum(axis=(0, 1, 2))) / 2 / (float(total.sum(axis=(0, 1))) + QUANTILE**2)
    variances = np.maximum(np.diag(robust), np.diag(inverse) * (1 - tie_share))
    reach = float(stdtrit(prompts - 1, 0.975)) * variances**0.5 if prompts > 1 else np.full(systems, np.inf)
    return BradleyTerryFit(scores, np.stack([scores - reach, scores + reach], axis=1))


def compute_krippendorff_alpha(values: Float64[np.ndarray, "rater unit"], *, is_ordered: bool = True) -> float | None:
    """Return Krippendorff's alpha: 1 if raters agree, 0 if they agree as often as by chance, below 0 if they disagree.

    Source: Krippendorff, "Computing Krippendorff's alpha-reliability" (2011). Raters need not have answered the same
    units. None if no unit has two answers, or if all answers are equal.

    Args:
      values: Answers, NaN where a rater has none.
      is_ordered: True for differences of values (interval data), which make a tie half as far from a win as a loss is;
        False for values that are equal or not (nominal data).
    """
    levels = np.unique(values[~np.isnan(values)])
    counts = (values[:, :, None] == levels).sum(axis=0).astype(np.float64)
    counts = counts[counts.sum(axis=1) > 1]
    weighted = counts / (counts.sum(axis=1, keepdims=True) - 1)
    observed = weighted.T @ counts - np.diag(weighted.sum(axis=0))
    totals = observed.sum(axis=1)
    distance = (levels[:, None] - levels) ** 2 if is_ordered else 1 - np.eye(len(levels))
    expected = float(totals @ distance @ totals)
    if expected == 0:
        return None
    return 1 - (float(totals.sum(axis=0)) - 1) * float((observed * distance).sum(axis=(0, 1))) / expected
