"""Votes of raters who compared samples side by side: the page's key, the raters' files, and their results.

The key says which system each anonymous side is of, and the right answers of control questions. It lies next to the
page and not in it, so that a rater who has the page cannot see the systems.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.files import read_json, write_json
from dit_video.curation.raters.vote_statistics import (
    WinRate,
    compute_krippendorff_alpha,
    compute_win_rate,
    fit_bradley_terry,
)
from dit_video.evaluation.metrics.metric import compute_wilson_interval

FORMAT = 1
"""Version of the files of votes."""
QUESTIONS: Mapping[str, str] = {"prompt": "Which one follows the prompt better?", "look": "Which one looks better?"}
"""Text of each question of a pair, by its name."""
TIE = "tie"
"""Answer that prefers neither side."""
OVERALL = "overall"
"""Name of the results on all domains together."""


@dataclass(frozen=True, kw_only=True)
class PageControl:
    """The control question of a pair whose right answer is known."""

    kind: str
    """Kind of the wrong side: `degraded`, a copy of worse quality, or `other_prompt`, a sample of another prompt."""
    question: str
    """Question whose answer is known; answers of the other one are not used."""
    right: str
    """Right answer: id of the side that is the system's sample."""


@dataclass(frozen=True, kw_only=True)
class PagePair:
    """Two samples of a prompt on a page."""

    name: str
    """Random id of the pair, which votes name."""
    item: int
    """Number of the prompt's samples, which all pairs of these samples have in common."""
    prompt: str
    domain: str
    sides: tuple[str, str]
    """Random ids of the sides, in random order, which answers name."""
    systems: tuple[str, str]
    """System of each side; the same twice for a control."""
    control: PageControl | None = None
    """Control question; None for a comparison of two systems."""


@dataclass(frozen=True, kw_only=True)
class PageKey:
    """The key of a page."""

    page: str
    """Random id of the page, which its votes name."""
    systems: tuple[str, ...]
    """Names of the systems."""
    seed: int
    """Seed of the ids, the sides and the controls."""
    pairs: tuple[PagePair, ...]
    """All pairs of the page."""
    comparisons_per_rater: int | None = None
    """Number of comparisons of systems that a rater sees; None for all."""
    controls_per_rater: int | None = None
    """Number of control questions that a rater sees; None for all."""

    def write(self, path: str | Path) -> None:
        """Write the key as JSON."""
        write_json(path, config_json.to_json(self))

    @classmethod
    def read(cls, path: str | Path) -> "PageKey":
        """Read a key that `write` wrote.

        Raises:
          MissingError: If there is no file at `path`.
          UserError: If the file is damaged, or no key.
        """
        document = read_json(path)
        try:
            key = config_json.from_json(document)
        except UserError as error:
            raise UserError(f"{path} is a damaged key ({error}). Make the page again") from error
        if not isinstance(key, cls):
            raise UserError(f"{path} is no key of a page. Use PAGE.key.json")
        if unknown := {system for pair in key.pairs for system in pair.systems} - set(key.systems):
            raise UserError(f"{path} is a damaged key: {min(unknown)} is none of its systems. Make the page again")
        return key


@dataclass(frozen=True, kw_only=True)
class Vote:
    """A rater's answers on a pair."""

    pair: PagePair
    answers: Mapping[str, str]
    """Answer to each question: the id of a side, or `tie`."""
    left: str
    """Id of the side that was on the left."""
    seconds: float
    """Time that the rater took."""

    def score(self, question: str, side: str) -> float:
        """Return 1 if the answer prefers this side, 0 if the other one, and 0.5 for a tie."""
        answer = self.answers[question]
        return 0.5 if answer == TIE else float(answer == side)


def read_votes(paths: Sequence[str | Path], key: PageKey) -> dict[str, list[Vote]]:
    """Return the votes of each rater by name; a rater who has not finished has fewer.

    Raises:
      MissingError: If a file does not exist.
      UserError: If there is no file, a file is damaged or of another page, votes are not of the page's pairs, or a
        rater has two files.
    """
    if not paths:
        raise UserError("votes=[] is invalid: results need a file of votes. Use the files that raters exported.")
    raters: dict[str, list[Vote]] = {}
    files: dict[str, Path] = {}
    for path in map(Path, paths):
        rater, votes = _read_file(path, key)
        if (other := files.setdefault(rater.casefold(), path)) is not path:
            raise UserError(
                f"{path}: rater={rater!r} is invalid: {other} has votes of that rater, too. "
                "Use the newer file alone, or another name for another person."
            )
        raters[rater] = votes
    return raters


def _read_file(path: Path, key: PageKey) -> tuple[str, list[Vote]]:
    """Return the name of a file's rater, and the votes."""
    document = read_json(path)
    entries = document.get("votes") if isinstance(document, dict) and document.get("format") == FORMAT else None
    if not isinstance(entries, list):
        raise UserError(f"{path} is no file of votes: format {FORMAT} or the list of votes is missing. Export it again")
    if document.get("page") != key.page:
        rule = f"the key is of page {key.page}"
        raise UserError(f"{path}: page={document.get('page')!r} is invalid: {rule}. Use votes and key of one page.")
    rater = document.get("rater")
    if not isinstance(rater, str) or not rater.strip():
        raise UserError(f"{path}: rater={rater!r} is invalid: votes have the name of their rater. Export them again.")
    pairs = {pair.name: pair for pair in key.pairs}
    votes = [_parse_vote(entry, f"{path}: vote {number}", pairs) for number, entry in enumerate(entries)]
    if repeated := [name for name, count in Counter(vote.pair.name for vote in votes).items() if count > 1]:
        rule = "a rater votes once on a pair"
        raise UserError(f"{path}: pair={repeated[0]!r} is invalid: {rule}. Remove one of its votes.")
    return " ".join(rater.split()), votes


def _parse_vote(entry: Any, place: str, pairs: Mapping[str, PagePair]) -> Vote:
    """Return the vote of an entry; `place` begins the error."""
    values: dict[str, Any] = entry if isinstance(entry, dict) else {}

    def check(name: str, is_valid: bool, rule: str) -> None:
        if not is_valid:
            raise UserError(f"{place}: {name}={values.get(name)!r} is invalid: {rule}. Use the votes as exported.")

    check("pair", values.get("pair") in [*pairs], "the page has no such pair")
    pair = pairs[values["pair"]]
    for question in QUESTIONS:
        check(question, values.get(question) in (*pair.sides, TIE), f"an answer is a side of the pair, or {TIE!r}")
    check("left", values.get("left") in pair.sides, "it must be a side of the pair")
    is_number = type(values.get("seconds")) in (int, float)
    check("seconds", is_number and 0 <= values["seconds"] < math.inf, "it must be a number, 0 or more")
    answers = {question: values[question] for question in QUESTIONS}
    return Vote(pair=pair, answers=answers, left=values["left"], seconds=float(values["seconds"]))


def summarize_votes(
    key: PageKey, raters: Mapping[str, Sequence[Vote]], *, max_failed_controls: float | int = 0.25
) -> dict[str, Any]:
    """Return the results of a page from its raters' votes, as JSON values.

    Votes on control questions count for the raters alone. A rater who fails a larger share of them than
    `max_failed_controls` is excluded, and the results list that rater with a note. A tie on a control question is a
    wrong answer. A rater who answered none is not excluded, and the note says so.

    - `page`, `systems`: the page's id, and the names of the systems.
    - `raters`: by name, numbers of `votes` on comparisons, `controls` and those `passed` with the `interval` of their
      share, `is_excluded` with a `note`, and `median_seconds` of a vote.
    - `questions`: by name,
      `win_rates`: `system`, `other` and `domain` with the fields of a `WinRate`, overall first, then by domain;
      `bradley_terry`: `score` and `interval` by system, or None; bounds of an unbounded interval are None;
      `krippendorff_alpha`: agreement by side on the pairs that two raters answered, `shared_pairs`, or None;
      `left_win_rate`: win rate of the side on the left, 1/2 for raters without a preference for a side.

    Raises:
      UserError: If `max_failed_controls` is no share.
    """
    if not 0 <= max_failed_controls <= 1:
        rule = "it is a share of control questions"
        raise UserError(f"max_failed={max_failed_controls} is invalid: {rule}. Use a number from 0 to 1.")
    judged = {rater: _judge_rater(votes, max_failed_controls) for rater, votes in raters.items()}
    included = [
        [vote for vote in votes if vote.pair.control is None]
        for rater, votes in raters.items()
        if not judged[rater]["is_excluded"]
    ]
    questions = {question: _summarize_question(key, included, question) for question in QUESTIONS}
    return {"page": key.page, "systems": [*key.systems], "raters": judged, "questions": questions}


def _judge_rater(votes: Sequence[Vote], max_failed: float | int) -> dict[str, Any]:
    checks = [vote.answers[c.question] == c.right for vote in votes if (c := vote.pair.control) is not None]
    controls, passed = len(checks), sum(checks)
    is_excluded = bool(checks) and (controls - passed) / controls > max_failed
    note = "" if checks else "no control question was answered"
    if is_excluded:
        note = f"excluded: {controls - passed} of {controls} control questions failed, more than {max_failed:.0%}"
    times = sorted(vote.seconds for vote in votes)
    return {
        "votes": len(votes) - controls,
        "controls": controls,
        "passed": passed,
        "is_excluded": is_excluded,
        "note": note,
        "median_seconds": times[len(times) // 2] if times else None,
        "interval": compute_wilson_interval(passed, controls),
    }


def _summarize_question(key: PageKey, raters: Sequence[Sequence[Vote]], question: str) -> dict[str, Any]:
    votes = [vote for each in raters for vote in each]
    comparisons = [
        {"system": system, "other": other, "domain": domain}
        | _compute_win_rate(
            [
                (vote, vote.pair.sides[vote.pair.systems.index(system)])
                for vote in votes
                if {system, other} == {*vote.pair.systems} and domain in (OVERALL, vote.pair.domain)
            ],
            question,
        )._asdict()
        for domain in (OVERALL, *sorted({pair.domain for pair in key.pairs}))
        for system, other in itertools.combinations(key.systems, 2)
    ]
    # Agreement is by side: if by system, a system that always wins would be no agreement.
    units = {pair.name: unit for unit, pair in enumerate(key.pairs)}
    answers = np.full((len(raters), len(units)), np.nan)
    for row, each in zip(answers, raters, strict=True):
        for vote in each:
            row[units[vote.pair.name]] = vote.score(question, vote.pair.sides[0])
    return {
        "win_rates": comparisons,
        "bradley_terry": _fit_scores(key, votes, question),
        "krippendorff_alpha": compute_krippendorff_alpha(answers),
        "shared_pairs": sum(count > 1 for count in Counter(vote.pair.name for vote in votes).values()),
        "left_win_rate": _compute_win_rate([(vote, vote.left) for vote in votes], question)._asdict(),
    }


def _compute_win_rate(votes: Sequence[tuple[Vote, str]], question: str) -> WinRate:
    """Return the win rate of the side that is named with each vote."""
    scores = np.array([vote.score(question, side) for vote, side in votes], np.float64)
    return compute_win_rate(scores, np.array([vote.pair.item for vote, _ in votes], np.int64))


def _fit_scores(key: PageKey, votes: Sequence[Vote], question: str) -> dict[str, Any] | None:
    """Return the Bradley-Terry score of each system with its interval; None if no finite scores are the most likely."""
    numbers = {system: number for number, system in enumerate(key.systems)}
    items = {item: number for number, item in enumerate(sorted({vote.pair.item for vote in votes}))}
    wins, ties = np.zeros((2, len(items), len(numbers), len(numbers)))
    for vote in votes:
        item, (first, second) = items[vote.pair.item], (numbers[system] for system in vote.pair.systems)
        score = vote.score(question, vote.pair.sides[0])
        for i, j, wanted in ((first, second, 1), (second, first, 0)):
            wins[item, i, j] += score == wanted
            ties[item, i, j] += score == 0.5
    fit = fit_bradley_terry(wins, ties)
    if fit is None:
        return None
    bounds = [[bound if math.isfinite(bound) else None for bound in row] for row in fit.intervals.tolist()]
    scores = zip(key.systems, fit.scores.tolist(), bounds, strict=True)
    return {system: {"score": score, "interval": interval} for system, score, interval in scores}


def format_results(results: Mapping[str, Any]) -> str:
    """Return the results of `summarize_votes` as text: raters, and for each question rates, scores and agreement."""
    raters = results["raters"]
    rows = [
        (name, each["votes"], f"{each['passed']} of {each['controls']}", each["note"]) for name, each in raters.items()
    ]
    parts = [
        f"{len(raters)} raters, {sum(each['is_excluded'] for each in raters.values())} excluded",
        _format_table(("rater", "votes", "controls passed", "note"), rows),
    ]
    for question, result in results["questions"].items():
        parts += [f"{question}: {QUESTIONS[question]}", *_format_question(result)]
    return "\n\n".join(parts)


def _format_question(result: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (
            each["domain"],
            f"{each['system']} against {each['other']}",
            f"{each['value']:.1%}",
            "{:.1%} to {:.1%}".format(*each["interval"]),
            *(each[name] for name in ("wins", "ties", "losses", "prompts")),
        )
        for each in result["win_rates"]
        if each["value"] is not None
    ]
    headings = ("domain", "systems", "win rate", "95 % interval", "wins", "ties", "losses", "prompts")
    yield _format_table(headings, rows) if rows else "no votes"
    if scores := result["bradley_terry"]:
        best_first = sorted(scores.items(), key=lambda entry: -entry[1]["score"])
        lines = []
        for system, each in best_first:
            low, high = each["interval"]
            interval = "unbounded" if low is None or high is None else f"{low:+.3f} to {high:+.3f}"
            lines.append((system, f"{each['score']:+.3f}", interval))
        yield _format_table(("system", "Bradley–Terry score", "95 % interval"), lines)
    elif rows:
        yield "Bradley–Terry scores: none, because some systems were not compared or won every vote"
    alpha, shared, left = result["krippendorff_alpha"], result["shared_pairs"], result["left_win_rate"]["value"]
    reason = "all answers are equal" if shared else "no two raters voted on one pair"
    agreement = f"none, because {reason}" if alpha is None else f"{alpha:.3f} on {shared} shared pairs"
    side = "" if left is None else f"; the left side won {left:.1%} of the votes"
    yield f"agreement between raters (Krippendorff's alpha): {agreement}{side}"


def _format_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return aligned columns."""
    lines = [headings, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
