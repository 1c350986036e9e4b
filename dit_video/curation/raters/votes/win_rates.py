"""Win rates with ties as half a win, and their 95 % intervals."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from scipy.special import ndtri

QUANTILE = float(ndtri(0.975))
"""Quantile of the normal distribution for 95 % intervals."""


@dataclass(frozen=True, kw_only=True)
class WinRate:
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
      items: number of each vote's prompt.
    """
    count = len(scores)
    if not count:
        return WinRate(value=None, interval=(0.0, 1.0), wins=0, ties=0, losses=0, prompts=0)
    value, prompts = float(scores.mean(axis=0)), len(np.unique(items))
    ties = int((scores == 0.5).sum(axis=0))
    effective = _compute_effective_count(scores, items)
    return WinRate(
        value=value,
        interval=compute_score_interval(value, ties / count, effective),
        wins=int((scores == 1).sum(axis=0)),
        ties=ties,
        losses=int((scores == 0).sum(axis=0)),
        prompts=prompts,
    )


def _compute_effective_count(scores: Float64[np.ndarray, " n"], items: Int64[np.ndarray, " n"]) -> float:
    """Return the number of independent votes that determine the mean as well as these do."""
    count = len(scores)
    names, clusters = np.unique(items, return_inverse=True)
    centred = scores - scores.mean(axis=0)
    independent = float((centred**2).sum(axis=0))
    if independent < 1e-12:
        return float(len(names))
    if len(names) == 1:
        return 1.0
    sums = np.bincount(clusters, weights=centred, minlength=len(names))
    clustered = float((sums**2).sum(axis=0)) * len(names) / (len(names) - 1)
    return count / max(1.0, clustered / (independent * count / max(1, count - 1)))


def compute_score_interval(value: float, tie_share: float, count: float | int) -> tuple[float, float]:
    """Return the 95 % interval of a win rate, which is Wilson's (1927) if there are no ties.

    A vote is 1, 1/2 or 0; with a share t of ties its variance is p (1 - p) - t / 4, so that the bounds p solve
    n (value - p)² = z² (p (1 - p) - t / 4). For t the observed share times n / (n + z²) is used: few votes that are
    all ties do not make the interval empty. (Ties as half a win of a binomial variable, the usual choice, would make
    it too wide.)

    Args:
      value: share of wins, with ties as half a win.
      tie_share: share of ties.
      count: number of independent votes.
    """
    square = QUANTILE**2
    ties = tie_share * count / (count + square)
    spread = 4 * count * (value * (1 - value) - ties / 4) + square * (1 - ties)
    centre, reach = 2 * count * value + square, QUANTILE * max(0.0, spread) ** 0.5
    low, high = ((centre + sign * reach) / (2 * (count + square)) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)
