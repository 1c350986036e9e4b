"""Answers of raters to control questions, and the raters who are left out for them."""

from collections.abc import Sequence
from dataclasses import dataclass

from dit_video.core.errors import UserError
from dit_video.curation.raters.votes.votes_file import RaterVotes


@dataclass(frozen=True, kw_only=True)
class RaterResult:
    """A rater's control questions, and whether the rater's votes count."""

    votes: int
    """Number of votes on pairs of two systems."""
    controls: int
    """Number of control questions that were answered."""
    passed: int
    """Number of right answers to them."""
    is_excluded: bool
    """True if the votes do not count."""
    note: str = ""
    """Reason for which a rater is excluded, or remark."""
    median_seconds: float | None = None
    """Median time of a vote; None without votes."""


def judge_raters(raters: Sequence[RaterVotes], *, max_failed: float | int = 0.25) -> dict[str, RaterResult]:
    """Return the result of every rater by name.

    A tie on a control question is a wrong answer. A rater who answered none is not excluded, and the note says so.

    Args:
      raters: votes of all raters.
      max_failed: largest share of wrong answers to control questions of a rater whose votes count.

    Raises:
      UserError: the share is not between 0 and 1.
    """
    if not 0 <= max_failed <= 1:
        rule = "it is a share of control questions"
        raise UserError(f"max_failed={max_failed} is invalid: {rule}. Use a number from 0 to 1.")
    return {each.rater: _judge(each, max_failed) for each in raters}


def _judge(rater: RaterVotes, max_failed: float | int) -> RaterResult:
    controls = [(vote, control) for vote in rater.votes if (control := vote.pair.control) is not None]
    passed = sum(vote.answers[control.question] == control.right for vote, control in controls)
    failed = len(controls) - passed
    is_excluded = bool(controls) and failed / len(controls) > max_failed
    note = "" if controls else "no control question was answered"
    if is_excluded:
        note = f"excluded: {failed} of {len(controls)} control questions failed, more than {max_failed:.0%}"
    times = sorted(vote.seconds for vote in rater.votes)
    return RaterResult(
        votes=len(rater.votes) - len(controls),
        controls=len(controls),
        passed=passed,
        is_excluded=is_excluded,
        note=note,
        median_seconds=times[len(times) // 2] if times else None,
    )
