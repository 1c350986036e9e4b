"""Compare evaluations of several models, or of checkpoints of one, in a table, a JSON file and a page."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__, huge_pages=False)

from pathlib import Path
from typing import Annotated

import tyro

from dit_video.apps.reports.comparison_report import write_comparison_report
from dit_video.core.command_line import parse_arguments
from dit_video.core.errors import script
from dit_video.core.files import write_json
from dit_video.evaluation.comparison import compare, format_comparison


def main(
    results: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RESULT [RESULT ...]")],
    out: Path | None = None,
) -> None:
    """Compare evaluations by one protocol; those by different ones are refused, with the fields that differ.

    For example:

        python experiments/compare.py runs/a/scenes runs/b/scenes
        python experiments/compare.py runs/a/evaluations/step_* --out comparison

    Args:
        results: Folders of `metrics.json`, or the files. Results at several steps of a training become curves.
        out: Folder of comparison.json and report.html.
    """
    comparison = compare(results)
    print(format_comparison(comparison))
    if out is not None:
        write_json(out / "comparison.json", comparison.to_json())
        write_comparison_report(out / "report.html", comparison)
        print(f"report: {out / 'report.html'}")


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
