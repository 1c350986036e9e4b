"""Evaluate a run, or a pipeline that was exported: metrics.json, samples/ and report.html.

python experiments/evaluate.py runs/quickstart
python experiments/evaluate.py experiments/pretrained/shapes --out runs/pretrained --seed 7
"""

from dit_video.platform.huge_pages import use_huge_pages

use_huge_pages(__name__)

from pathlib import Path
from typing import Annotated

import tyro

import dit_video
from dit_video.core import config_json
from dit_video.core.errors import UserError, script
from dit_video.evaluation import evaluate
from dit_video.experiment.folder import CONFIG
from dit_video.experiment.run import Run
from dit_video.platform.compilation_cache import keep_programs
from dit_video.reports.run_report import report_run


def main(
    run: Annotated[Path, tyro.conf.Positional],
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
    """Reconstruct held-out clips, sample, judge, and write the report.

    Args:
        run: a run folder, or a pipeline folder.
        out: where the files go; the run folder itself by default.
        seed: of the samples.
        steps: of the sampler, instead of the run's.
        guidance: instead of the run's; 1 is none.
        sampler: such as euler, heun, unipc, dpm++2m or ddim, instead of the run's.
        interval: the times, from 0 (data) to 1 (noise), at which there is guidance at all.
        rescale: from 0 to 1, how far guided predictions are brought to the deviation of those without guidance.
        projected: whether guidance leaves out what lies along the prediction itself, which saturates.
        ema: of a run: which of its averages, by its decay; 0 for the weights themselves.
        sigma_rel: of a run: the relative width of an average that is put together from its snapshots.
        cache: whether compiled programs are kept for the next start, in ~/.cache/dit_video/programs.
    """
    if cache:
        keep_programs()
    pipeline = dit_video.load(run, ema=ema, sigma_rel=sigma_rel)
    trained = Run.open(run) if (run / CONFIG).is_file() else None
    if trained is None and out is None:
        raise UserError(f"{run} is a pipeline without a run; say where the files go with --out")
    folder = run if out is None else out
    measured = evaluate.evaluate(
        pipeline,
        folder,
        seed=seed,
        run=trained,
        steps=steps,
        guidance=pipeline.config.sampling.guided(
            scale=guidance, interval=interval, rescale=rescale, projected=projected
        ),
        sampler=sampler,
    )
    report_run(
        folder / "report.html",
        pipeline,
        measured,
        title=f"Evaluation of {run.name}",
        source=run,
        config=None if trained is None else config_json.to_json(trained.experiment),
    )
    for name, value in measured.metrics.get("prompt_following", {}).get("all", {}).items():
        print(f"{name}: {value['rate']:.1%} ({value['low']:.1%} to {value['high']:.1%}, {value['count']} samples)")
    if quality := measured.metrics.get("reconstruction"):
        print(f"reconstruction of held-out clips: {quality['psnr']:.2f} dB, SSIM {quality['ssim']:.4f}")
    print(f"look at {folder / 'report.html'}")


if __name__ == "__main__":
    script(tyro.cli)(main)
