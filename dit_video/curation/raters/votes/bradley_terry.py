"""Scores of several systems from comparisons of two: the model of Bradley and Terry (1952)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, stdtrit

from dit_video.curation.raters.votes.win_rates import QUANTILE

_MAX_STEPS, _MAX_STEP, _TOLERANCE = 200, 1.0, 1e-10
"""Maximum number of Newton's steps, largest change of a score in a step, and change at which they end."""


class BradleyTerryFit(NamedTuple):
    """Scores of systems: i is preferred to j with probability 1 / (1 + exp(s_j - s_i)), a tie being half a win."""

    scores: Float64[np.ndarray, " S"]
    """Log odds, with mean 0."""
    intervals: Float64[np.ndarray, "S 2"]
    """Bounds of the 95 % interval of each score."""


def fit_bradley_terry(
    wins: Float64[np.ndarray, "item S S"], ties: Float64[np.ndarray, "item S S"]
) -> BradleyTerryFit | None:
    """Return the scores of largest likelihood with 95 % intervals; None if no finite scores have it.

    Scores are finite if no group of systems wins every vote against the others (Ford 1957). Intervals are those of
    Student's t with one degree of freedom less than there are prompts. The variance is the robust one, the inverse
    information around the sum over prompts of outer products of the likelihood's gradient: it holds for ties, which are
    no outcome of the model, and for votes on the same samples, which are not independent (Liang and Zeger 1986). It is
    not below the inverse Fisher information times 1 - t, the variance of independent votes on equal systems with a
    share t of ties, shrunk as in `compute_score_interval`: prompts whose votes happen to agree do not make the
    interval empty.

    Args:
      wins: for each prompt the number of votes for system i (first axis) against j.
      ties: for each prompt the number of ties of i and j; symmetric.
    """
    halves = wins + ties / 2
    halves = halves[halves.sum(axis=(1, 2)) > 0]
    total, systems = halves.sum(axis=0), wins.shape[1]
    groups, _ = connected_components(total > 0, directed=True, connection="strong")
    if groups != 1 or systems < 2:
        return None
    scores = _maximize_likelihood(total)
    votes = float(total.sum(axis=(0, 1)))
    tie_share = float(ties.sum(axis=(0, 1, 2))) / 2 / (votes + QUANTILE**2)
    variances = _compute_variances(scores, halves, tie_share)
    prompts = len(halves)
    reach = float(stdtrit(prompts - 1, 0.975)) * variances**0.5 if prompts > 1 else np.full(systems, np.inf)
    return BradleyTerryFit(scores, np.stack([scores - reach, scores + reach], axis=1))


def _maximize_likelihood(total: Float64[np.ndarray, "S S"]) -> Float64[np.ndarray, " S"]:
    """Return the scores with mean 0 by Newton's method; the likelihood is concave, and steps are bounded."""
    counts, scores = total + total.T, np.zeros(len(total))
    for _ in range(_MAX_STEPS):
        gradient, inverse = _compute_derivatives(scores, total, counts)
        step = inverse @ gradient
        largest = float(np.abs(step).max(axis=0))
        scores = scores + step * (1.0 if largest <= _MAX_STEP else _MAX_STEP / largest)
        if largest < _TOLERANCE:
            break
    return scores - scores.mean(axis=0)


def _compute_derivatives(
    scores: Float64[np.ndarray, " S"], total: Float64[np.ndarray, "S S"], counts: Float64[np.ndarray, "S S"]
) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, "S S"]]:
    """Return the gradient of the log likelihood, and the inverse of its negative second derivative at mean 0."""
    expected = expit(scores[:, None] - scores)
    weights = counts * expected * expected.T
    information = np.diag(weights.sum(axis=1)) - weights
    # The likelihood depends on differences alone: the mean's direction, of which it says nothing, is taken out.
    mean = np.full_like(information, 1 / len(scores))
    return (total - counts * expected).sum(axis=1), np.linalg.inv(information + mean) - mean


def _compute_variances(
    scores: Float64[np.ndarray, " S"], halves: Float64[np.ndarray, "item S S"], tie_share: float
) -> Float64[np.ndarray, " S"]:
    """Return the variances of the scores."""
    prompts, total = len(halves), halves.sum(axis=0)
    _, inverse = _compute_derivatives(scores, total, total + total.T)
    expected = expit(scores[:, None] - scores)
    gradients = (halves - (halves + halves.swapaxes(1, 2)) * expected).sum(axis=2)
    robust = inverse @ (gradients.T @ gradients * prompts / max(1, prompts - 1)) @ inverse
    return np.maximum(np.diag(robust), np.diag(inverse) * (1 - tie_share))
