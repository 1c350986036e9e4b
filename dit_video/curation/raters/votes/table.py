"""Results of votes as a table of plain text."""

from collections.abc import Iterator, Sequence

from dit_video.curation.raters.votes.page_key import QUESTIONS
from dit_video.curation.raters.votes.results import QuestionResults, VoteResults
from dit_video.curation.raters.votes.win_rates import WinRate


def format_results(results: VoteResults) -> str:
    """Return the results as text: raters, and for each question win rates, scores and agreement."""
    excluded = sum(each.is_excluded for each in results.raters.values())
    parts = [f"{len(results.raters)} raters, {excluded} excluded"]
    rows = [(name, each.votes, f"{each.passed} of {each.controls}", each.note) for name, each in results.raters.items()]
    parts.append(_format_table(("rater", "votes", "controls passed", "note"), rows))
    for question, result in results.questions.items():
        parts += [f"{question}: {QUESTIONS[question]}", *_format_question(results.systems, result)]
    return "\n\n".join(parts)


def _format_question(systems: Sequence[str], result: QuestionResults) -> Iterator[str]:
    rows = [
        (each.domain, f"{each.system} against {each.other}", *_format_rate(each.win_rate))
        for each in result.comparisons
        if each.win_rate.value is not None
    ]
    headings = ("domain", "systems", "win rate", "95 % interval", "wins", "ties", "losses", "prompts")
    yield _format_table(headings, rows) if rows else "no votes"
    if result.scores is not None:
        fit = zip(systems, result.scores.scores.tolist(), result.scores.intervals.tolist(), strict=True)
        best_first = sorted(fit, key=lambda entry: -entry[1])
        scores = [(system, f"{score:+.3f}", f"{low:+.3f} to {high:+.3f}") for system, score, (low, high) in best_first]
        yield _format_table(("system", "Bradley–Terry score", "95 % interval"), scores)
    elif rows:
        yield "Bradley–Terry scores: none, because some systems were not compared or won every vote"
    if result.agreement is not None:
        agreement = f"{result.agreement:.3f} on {result.shared_pairs} shared pairs"
    else:
        reason = "all answers are equal" if result.shared_pairs else "no two raters voted on one pair"
        agreement = f"none, because {reason}"
    left = "" if result.left.value is None else f"; the left side won {result.left.value:.1%} of the votes"
    yield f"agreement between raters (Krippendorff's alpha): {agreement}{left}"


def _format_rate(rate: WinRate) -> tuple[str, str, int, int, int, int]:
    low, high = rate.interval
    return f"{rate.value:.1%}", f"{low:.1%} to {high:.1%}", rate.wins, rate.ties, rate.losses, rate.prompts


def _format_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return aligned columns, numbers to the right."""
    lines = [list(headings), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    is_number = [
        bool(rows) and all(str(row[column])[:1] in "+-0123456789" for row in rows) for column in range(len(headings))
    ]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=True)
        ).rstrip()
        for line in lines
    )
