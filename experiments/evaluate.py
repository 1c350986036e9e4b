"""Evaluate a run or an exported pipeline, and write metrics.json, samples/ and report.html."""

from dit_video.platform.scripts import prepare_script

prepare_script(__name__)

import sys
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).parent))  # for a caller in another folder, such as a test

from sampling_options import SamplingOptions

from dit_video.core import config_json
from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import UserError, script
from dit_video.evaluation import evaluate
from dit_video.experiment.folder import CONFIG
from dit_video.experiment.run import Run
from dit_video.reports.run_report import write_run_report

_DEFAULTS = SamplingOptions()


def main(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    out: Path | None = None,
    seed: int = 0,
    options: Annotated[SamplingOptions, tyro.conf.arg(name="")] = _DEFAULTS,
) -> None:
    """Sample, compute the metrics of the config, and write metrics.json, samples/ and report.html.

    For example:

        python experiments/evaluate.py runs/quickstart
        python experiments/evaluate.py experiments/pretrained/shapes --out runs/pretrained --seed 7

    Args:
        run: Folder of a run or of a pipeline.
        out: Folder to write the files to; the run's folder by default.
        seed: Seed of the samples.
        options: Weights and sampling.
    """
    check_minimum(0, seed=seed)
    pipeline = options.load_pipeline(run)
    trained = Run.open(run) if (run / CONFIG).is_file() else None
    if trained is None and out is None:
        raise UserError(f"{run} is a pipeline, not a run, so it has no folder for the files; use --out FOLDER")
    folder = run if out is None else out
    evaluation = evaluate.evaluate(
        pipeline,
        folder,
        seed=seed,
        clips=None if trained is None else trained.evaluation_clips(),
        **options.make_overrides(pipeline.config),
    )
    write_run_report(
        folder / "report.html",
        pipeline,
        evaluation,
        title=f"Evaluation of {run.name}",
        source=run,
        config=None if trained is None else config_json.to_json(trained.experiment),
    )
    evaluate.print_results(evaluation.results, is_precise=True)
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
