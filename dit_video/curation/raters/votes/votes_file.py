"""Files of votes, which the page of pairs exports: one file a rater."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_video.core.errors import UserError
from dit_video.core.files import read_json
from dit_video.curation.raters.votes.page_key import FORMAT, QUESTIONS, TIE, PageKey, PagePair


@dataclass(frozen=True, kw_only=True)
class Vote:
    """A rater's answers on a pair."""

    pair: PagePair
    """Pair of the page."""
    answers: Mapping[str, str]
    """Answer to each question: the id of a side, or `tie`."""
    left: str
    """Id of the side that was on the left."""
    seconds: float
    """Time that the rater took."""

    def score_first(self, question: str) -> float:
        """Return 1 if the answer prefers the pair's first side, 0 if the second, and 0.5 for a tie."""
        answer = self.answers[question]
        return 0.5 if answer == TIE else float(answer == self.pair.sides[0])


@dataclass(frozen=True, kw_only=True)
class RaterVotes:
    """All votes of a rater."""

    rater: str
    """Name that the rater typed."""
    votes: Sequence[Vote]
    """Votes in the order of the file."""


def read_votes(paths: Sequence[str | Path], key: PageKey) -> list[RaterVotes]:
    """Read the files of votes of a page, one for each rater; a rater who has not finished has fewer votes.

    Raises:
      MissingError: a file does not exist.
      UserError: no file, or a file that is damaged or of another page, or votes that are not of the page's pairs, or
        a rater with two files.
    """
    if not paths:
        raise UserError("votes=[] is invalid: results need a file of votes. Use the files that raters exported.")
    raters: dict[str, tuple[Path, RaterVotes]] = {}
    pairs = {pair.name: pair for pair in key.pairs}
    for path in map(Path, paths):
        votes = _read_file(path, key, pairs)
        name = votes.rater.casefold()
        if name in raters:
            raise UserError(
                f"{path}: rater={votes.rater!r} is invalid: {raters[name][0]} has votes of that rater, too. "
                "Use the newer file alone, or another name for another person."
            )
        raters[name] = path, votes
    return [votes for _, votes in raters.values()]


def _read_file(path: Path, key: PageKey, pairs: Mapping[str, PagePair]) -> RaterVotes:
    document = read_json(path)
    if (
        not isinstance(document, dict)
        or document.get("format") != FORMAT
        or not isinstance(document.get("votes"), list)
    ):
        raise UserError(f"{path} is no file of votes: format {FORMAT} or the list of votes is missing. Export it again")
    if document.get("page") != key.page:
        rule = f"the key is of page {key.page}"
        raise UserError(f"{path}: page={document.get('page')!r} is invalid: {rule}. Use votes and key of one page.")
    rater = document.get("rater")
    if not isinstance(rater, str) or not rater.strip():
        raise UserError(f"{path}: rater={rater!r} is invalid: votes have the name of their rater. Export them again.")
    votes: dict[str, Vote] = {}
    for number, entry in enumerate(document["votes"]):
        vote = _parse_vote(entry, f"{path}: vote {number}", pairs)
        if vote.pair.name in votes:
            rule = "a rater votes once on a pair"
            raise UserError(f"{path}: pair={vote.pair.name!r} is invalid: {rule}. Remove one of its votes.")
        votes[vote.pair.name] = vote
    return RaterVotes(rater=" ".join(rater.split()), votes=tuple(votes.values()))


def _parse_vote(entry: Any, place: str, pairs: Mapping[str, PagePair]) -> Vote:
    """Return the vote of an entry; `place` begins the error."""
    values: dict[str, Any] = entry if isinstance(entry, dict) else {}
    name = values.get("pair")
    pair = pairs.get(name) if isinstance(name, str) else None
    if pair is None:
        raise UserError(f"{place}: pair={name!r} is invalid: the page has no such pair. Use the votes as exported.")
    answers: dict[str, Any] = {question: values.get(question) for question in QUESTIONS}
    for question, answer in answers.items():
        if answer not in (*pair.sides, TIE):
            rule = f"an answer is a side of the pair, or {TIE!r}"
            raise UserError(f"{place}: {question}={answer!r} is invalid: {rule}. Use the votes as exported.")
    if values.get("left") not in pair.sides:
        rule = "it must be a side of the pair"
        raise UserError(f"{place}: left={values.get('left')!r} is invalid: {rule}. Use the votes as exported.")
    seconds: Any = values.get("seconds")
    if type(seconds) not in (int, float) or not math.isfinite(seconds) or seconds < 0:
        rule = "it must be a number, 0 or more"
        raise UserError(f"{place}: seconds={seconds!r} is invalid: {rule}. Use the votes as exported.")
    return Vote(pair=pair, answers=answers, left=values["left"], seconds=float(seconds))
