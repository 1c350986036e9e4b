"""Evaluate a model at several numbers of steps and guidance scales, and plot quality against cost."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__)

import sys
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).parent))  # for a caller in another folder, such as a test

from model_options import ModelOptions
from sampling_options import SamplingOptions

import dit_video.scenes.protocols  # noqa: F401, registers its protocols
from dit_video.apps.reports.comparison_report import write_sweep_report
from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import script
from dit_video.core.files import write_json
from dit_video.distributed.gather import is_first_process
from dit_video.evaluation.clip_set import open_clip_set
from dit_video.evaluation.comparison import format_comparison
from dit_video.evaluation.protocol import EvaluationData
from dit_video.evaluation.protocols import get_protocol
from dit_video.evaluation.sweep import sweep_sampling

_MODEL, _SAMPLING = ModelOptions(), SamplingOptions()


def main(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    out: Path,
    protocol: str = "scenes",
    grid_steps: tuple[int, ...] = (4, 8, 16, 32),
    grid_guidance: tuple[float, ...] = (1.0, 2.0, 4.0),
    data: Path | None = None,
    metrics: tuple[str, ...] = (),
    weights: Path | None = None,
    count: int | None = None,
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = _MODEL,
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = _SAMPLING,
) -> None:
    """Evaluate a model at several numbers of steps and guidance scales, and plot quality against cost.

    For example:

        python experiments/sweep.py runs/scenes --out runs/scenes/sweep --count 256
        python experiments/sweep.py runs/scenes --out runs/scenes/sweep --grid-steps 4 8 16 --grid-guidance 1 2 4

    Args:
        run: Folder of a run or of a pipeline.
        out: Folder of the results: one for each point, sweep.json and report.html.
        protocol: Name of the protocol of all points.
        grid_steps: Numbers of steps.
        grid_guidance: Guidance scales.
        data: Folder of clips of the data, where the protocol needs them.
        metrics: Names of the protocol's values to compute; all by default.
        weights: Folder of the weights of feature networks; `weights` by default.
        count: Number of samples of a point, instead of the protocol's.
        model: Weights, devices and memory.
        sampling: Sampling, whose steps and guidance scale are those of the points.
    """
    check_minimum(1, count=count)
    chosen = get_protocol(protocol, metrics=metrics, weights=weights, count=count)
    clips = (
        None if data is None else EvaluationData(open_clip_set(data, split=chosen.split, background=chosen.background))
    )
    pipeline = model.load_pipeline(run, sampling)
    sweep = sweep_sampling(
        pipeline,
        chosen,
        out,
        steps=grid_steps,
        guidance=grid_guidance,
        data=clips,
        sampling=sampling.make_sampling(pipeline.config),
        on_point=_announce,
    )
    if not is_first_process():
        return
    points = [point._asdict() for point in sweep.points]
    write_json(out / "sweep.json", {"points": points, **sweep.comparison.to_json()})
    write_sweep_report(out / "report.html", sweep, title=f"Sampling of {run.name}")
    print(format_comparison(sweep.comparison))
    print(f"report: {out / 'report.html'}")


def _announce(steps: int, guidance: float) -> None:
    if is_first_process():
        print(f"{steps} steps, guidance {guidance:g}")


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
