"""Evaluate a run or an exported pipeline, and write metrics.json, samples/ and report.html."""

from dit_video.platform.scripts import prepare_script

prepare_script(__name__)

from pathlib import Path
from typing import Annotated

import tyro

import dit_video
from dit_video.core import config_json
from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import UserError, script
from dit_video.evaluation import evaluate
from dit_video.experiment.folder import CONFIG
from dit_video.experiment.run import Run
from dit_video.platform.compilation_cache import enable_compilation_cache
from dit_video.reports.run_report import write_run_report


def main(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    out: Path | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    interval: tuple[float, float] | None = None,
    rescale: float | None = None,
    projected: bool | None = None,
    ema: float | None = None,
    sigma_rel: float | None = None,
    cache: bool = True,
) -> None:
    """Sample, compute the metrics of the config, and write metrics.json, samples/ and report.html.

    For example:

        python experiments/evaluate.py runs/quickstart
        python experiments/evaluate.py experiments/pretrained/shapes --out runs/pretrained --seed 7

    Args:
        run: Folder of a run or of a pipeline.
        out: Folder to write the files to; the run's folder by default.
        seed: Seed of the samples.
        steps: Number of sampling steps; the run's by default.
        guidance: Guidance scale, where 1 disables guidance; the run's by default.
        sampler: Name of the sampler, such as euler, heun, unipc, dpm++2m or ddim; the run's by default.
        interval: Range of times in which guidance is applied, from 0 (data) to 1 (noise).
        rescale: Guidance rescale factor from 0 to 1: how far the standard deviation of guided predictions is moved back
            to that of predictions without guidance.
        projected: Drop the part of guidance that is parallel to the prediction, which causes oversaturation (adaptive
            projected guidance).
        ema: Decay of the weight average to load from a run; 0 loads the raw weights.
        sigma_rel: Relative width of a post-hoc average, reconstructed from the snapshots of a run.
        cache: Keep compiled programs in ~/.cache/dit_video/programs, so that the next start is faster.
    """
    check_minimum(1, steps=steps)
    check_minimum(0, seed=seed)
    if cache:
        enable_compilation_cache()
    pipeline = dit_video.load(run, ema=ema, sigma_rel=sigma_rel)
    trained = Run.open(run) if (run / CONFIG).is_file() else None
    if trained is None and out is None:
        raise UserError(f"{run} is a pipeline, not a run, so it has no folder for the files; use --out FOLDER")
    folder = run if out is None else out
    evaluation = evaluate.evaluate(
        pipeline,
        folder,
        seed=seed,
        clips=None if trained is None else trained.evaluation_clips(),
        steps=steps,
        guidance=pipeline.config.sampling.override_guidance(
            scale=guidance, interval=interval, rescale=rescale, projected=projected
        ),
        sampler=sampler,
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
