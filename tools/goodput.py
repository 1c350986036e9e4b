"""Print where the time of a run went."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__, huge_pages=False)

import json
from typing import Annotated

import tyro

from dit_video.apps.reports.run_times import format_run_times, make_run_times_document
from dit_video.core.command_line import parse_arguments
from dit_video.core.errors import MissingError, script
from dit_video.training.goodput import read_run_times


def main(
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    json_: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Print where the time of a run went, from its first start to its newest record: goodput and badput by category.

    Goodput is the share of training steps that were kept. For example:

        python tools/goodput.py runs/clips
        python tools/goodput.py gs://BUCKET/runs/clips --json

    Args:
        run: Folder or address of a run, which may be in training.
        json_: Print JSON: seconds by category, of the whole run and of each attempt.
    """
    times = read_run_times(run)
    if not times.attempts:
        rule = "it has no records of its time, as a model of another run, or a run that has not begun or is old"
        raise MissingError(f"RUN={run} is invalid: {rule}. Use the folder of another run.")
    print(json.dumps(make_run_times_document(times), indent=2) if json_ else format_run_times(times))


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
