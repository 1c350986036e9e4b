"""Compute the results of raters' votes on a page of pairs."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__, huge_pages=False)

from pathlib import Path
from typing import Annotated

import tyro

from dit_video.core.command_line import parse_arguments
from dit_video.core.errors import script
from dit_video.core.files import write_json
from dit_video.curation.raters import PageKey, format_results, read_votes, summarize_votes


def main(
    key: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="KEY")],
    votes: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="VOTES")],
    out: Path | None = None,
    max_failed_controls: float = 0.25,
) -> None:
    """Compute win rates, Bradley-Terry scores and agreement from the votes on a page of `tools/side_by_side.py`.

    For example:

        python tools/side_by_side_results.py comparison.key.json votes-*.json
        python tools/side_by_side_results.py comparison.key.json votes-*.json --out results.json

    Args:
        key: Key of the page, PAGE.key.json.
        votes: Files of votes that the raters exported, one for each rater.
        out: JSON file to write all results to.
        max_failed_controls: Largest share of failed control questions of a rater whose votes count.
    """
    page_key = PageKey.read(key)
    results = summarize_votes(page_key, read_votes(votes, page_key), max_failed_controls=max_failed_controls)
    if out is not None:
        write_json(out, results)
    print(format_results(results))


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
