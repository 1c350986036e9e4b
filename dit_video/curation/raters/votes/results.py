"""Results of the votes on a page: win rates by domain, scores, agreement, and the raters' control questions."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_video.curation.raters.votes.agreement import compute_krippendorff_alpha
from dit_video.curation.raters.votes.bradley_terry import BradleyTerryFit, fit_bradley_terry
from dit_video.curation.raters.votes.control_results import RaterResult, judge_raters
from dit_video.curation.raters.votes.page_key import QUESTIONS, TIE, PageKey
from dit_video.curation.raters.votes.votes_file import RaterVotes, Vote
from dit_video.curation.raters.votes.win_rates import WinRate, compute_win_rate
from dit_video.evaluation.metrics.metric import compute_wilson_interval

OVERALL = "overall"
"""Name of the results on all domains together."""


@dataclass(frozen=True, kw_only=True)
class SystemComparison:
    """Win rate of a system against another one, on the prompts of a domain."""

    system: str
    """System whose wins are counted."""
    other: str
    """System that it is compared with."""
    domain: str
    """Domain of the prompts, or `overall`."""
    win_rate: WinRate
    """Share of wins, with its interval."""


@dataclass(frozen=True, kw_only=True)
class QuestionResults:
    """Results of one question."""

    comparisons: Sequence[SystemComparison]
    """Win rates of all pairs of systems, overall first, then by domain."""
    scores: BradleyTerryFit | None
    """Scores of all systems in the order of the key; None if no finite scores have the largest likelihood."""
    agreement: float | None
    """Krippendorff's alpha of the answers by side, on shared pairs; None if no pair has answers of two raters."""
    shared_pairs: int
    """Number of comparisons that two raters or more answered."""
    left: WinRate
    """Win rate of the side on the left, which is 1/2 for raters without a preference for a side."""


@dataclass(frozen=True, kw_only=True)
class VoteResults:
    """Results of a page."""

    page: str
    """Id of the page."""
    systems: Sequence[str]
    """Names of the systems."""
    raters: Mapping[str, RaterResult]
    """Result of each rater's control questions, by name."""
    questions: Mapping[str, QuestionResults]
    """Results of each question, by name."""

    def to_json(self) -> dict[str, Any]:
        """Return the results as JSON values; the bounds of an interval that is unbounded are None."""
        return {
            "page": self.page,
            "systems": list(self.systems),
            "raters": {
                name: dataclasses.asdict(result) | {"interval": compute_wilson_interval(result.passed, result.controls)}
                for name, result in self.raters.items()
            },
            "questions": {name: self._question_to_json(result) for name, result in self.questions.items()},
        }

    def _question_to_json(self, result: QuestionResults) -> dict[str, Any]:
        comparisons = [
            {"system": each.system, "other": each.other, "domain": each.domain, **dataclasses.asdict(each.win_rate)}
            for each in result.comparisons
        ]
        scores = None
        if result.scores is not None:
            bounds = [
                [bound if math.isfinite(bound) else None for bound in row] for row in result.scores.intervals.tolist()
            ]
            values = zip(self.systems, result.scores.scores.tolist(), bounds, strict=True)
            scores = {system: {"score": score, "interval": interval} for system, score, interval in values}
        return {
            "win_rates": comparisons,
            "bradley_terry": scores,
            "krippendorff_alpha": result.agreement,
            "shared_pairs": result.shared_pairs,
            "left_win_rate": dataclasses.asdict(result.left),
        }


def summarize_votes(
    key: PageKey, raters: Sequence[RaterVotes], *, max_failed_controls: float | int = 0.25
) -> VoteResults:
    """Return the results of a page from its raters' votes.

    Votes on control questions count for the raters alone. A rater who fails a larger share of them than
    `max_failed_controls` is excluded, and the results list that rater with a note.

    Raises:
      UserError: `max_failed_controls` is no share.
    """
    results = judge_raters(raters, max_failed=max_failed_controls)
    included = [rater for rater in raters if not results[rater.rater].is_excluded]
    return VoteResults(
        page=key.page,
        systems=key.systems,
        raters=results,
        questions={question: _summarize_question(key, included, question) for question in QUESTIONS},
    )


def _summarize_question(key: PageKey, raters: Sequence[RaterVotes], question: str) -> QuestionResults:
    votes = [vote for rater in raters for vote in rater.votes if vote.pair.control is None]
    domains = sorted({pair.domain for pair in key.pairs})
    comparisons = [
        SystemComparison(
            system=system, other=other, domain=domain, win_rate=_compare(votes, question, system, other, domain)
        )
        for domain in (OVERALL, *domains)
        for system, other in itertools.combinations(key.systems, 2)
    ]
    answers = [0.5 if vote.answers[question] == TIE else float(vote.answers[question] == vote.left) for vote in votes]
    items = [vote.pair.item for vote in votes]
    voters = Counter(vote.pair.name for vote in votes)
    return QuestionResults(
        comparisons=comparisons,
        scores=_fit_scores(key, votes, question),
        agreement=_compute_agreement(key, raters, question),
        shared_pairs=sum(count > 1 for count in voters.values()),
        left=compute_win_rate(np.array(answers, np.float64), np.array(items, np.int64)),
    )


def _compare(votes: Sequence[Vote], question: str, system: str, other: str, domain: str) -> WinRate:
    """Return the win rate of a system against another one on a domain's prompts."""
    scores, items = [], []
    for vote in votes:
        if {system, other} == set(vote.pair.systems) and domain in (OVERALL, vote.pair.domain):
            score = vote.score_first(question)
            scores.append(score if vote.pair.systems[0] == system else 1 - score)
            items.append(vote.pair.item)
    return compute_win_rate(np.array(scores, np.float64), np.array(items, np.int64))


def _fit_scores(key: PageKey, votes: Sequence[Vote], question: str) -> BradleyTerryFit | None:
    numbers = {system: number for number, system in enumerate(key.systems)}
    items = {item: number for number, item in enumerate(sorted({vote.pair.item for vote in votes}))}
    wins = np.zeros((len(items), len(numbers), len(numbers)))
    ties = np.zeros_like(wins)
    for vote in votes:
        item, (first, second) = items[vote.pair.item], (numbers[system] for system in vote.pair.systems)
        score = vote.score_first(question)
        if score == 0.5:
            ties[item, first, second] += 1
            ties[item, second, first] += 1
        else:
            winner, loser = (first, second) if score == 1 else (second, first)
            wins[item, winner, loser] += 1
    return fit_bradley_terry(wins, ties)


def _compute_agreement(key: PageKey, raters: Sequence[RaterVotes], question: str) -> float | None:
    """Return the agreement on comparisons, by side: if by system, a system that always wins would be no agreement."""
    units = {pair.name: unit for unit, pair in enumerate(pair for pair in key.pairs if pair.control is None)}
    values = np.full((len(raters), len(units)), np.nan)
    for number, rater in enumerate(raters):
        for vote in rater.votes:
            if vote.pair.control is None:
                values[number, units[vote.pair.name]] = vote.score_first(question)
    return compute_krippendorff_alpha(values)
