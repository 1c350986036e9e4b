"""Distil a model into one of few steps, sample it, and write its report beside its teacher's figures.

    python experiments/distill.py experiments/pretrained/shapes --method dmd --steps 150 --batch 4
    python experiments/distill.py runs/mine --method consistency --workdir runs/mine-few

The teacher is a run's folder or a pipeline's. A run brings its own clips; for a pipeline of the rendered shapes clips
are rendered; any other takes them with --data, as `train.py` does. The student begins as the teacher and learns to
make without guidance what that makes with it:

    --method consistency    to go from any point of the teacher's flow straight to its end (latent consistency)
    --method dmd            to make samples that are distributed as the teacher's (DMD2, without its discriminator)

WORKDIR/pipeline is the student, of 4 steps; `dit_video.load(WORKDIR)` and `sample.py` sample it. Of the rendered shapes
WORKDIR/few_steps.json and the report say how teacher and student follow prompts and vary, by their steps. Interrupted,
the same command continues where it was.
"""

from dit_video.platform.huge_pages import use_huge_pages

use_huge_pages(__name__)

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

import dit_video
from dit_video.core import config_json
from dit_video.core.errors import UserError, script
from dit_video.core.files import write_json
from dit_video.core.storage import Address
from dit_video.data.synthetic import shapes
from dit_video.evaluation import evaluate
from dit_video.evaluation.config import ShapesEvaluation
from dit_video.experiment import datasets
from dit_video.experiment.folder import CONFIG
from dit_video.experiment.run import Run
from dit_video.pipelines.pipeline import Pipeline
from dit_video.platform.compilation_cache import keep_programs
from dit_video.recipes.distill import ATTRIBUTES, Distilling, compare, distilling
from dit_video.reports.run_report import report_run
from dit_video.training.hooks.logging import Progress


@dataclass(frozen=True)
class Arguments:
    """Distil a run's or a pipeline's model into few steps, and sample it."""

    teacher: Annotated[Path, tyro.conf.Positional]
    """a run's folder, or a pipeline's"""
    workdir: Path = Path("runs/distilled")
    """the student's folder"""
    data: tuple[str, ...] = ()
    """folders of clips, or data sets that tools/ingest.py made; a run's own by default"""
    clips: int = 2000
    """how many are rendered, where the teacher is of the rendered shapes and no data are named"""
    seeds: int = 3
    """how many times every prompt of the rendered shapes is sampled for the comparison; 0 leaves it out"""
    full: int = 50
    """steps of the teacher that the student is measured by"""
    options: Annotated[Distilling, tyro.conf.arg(name="")] = field(default_factory=Distilling)
    cache: bool = True
    """whether compiled programs are kept for the next start, in ~/.cache/dit_video/programs"""


def main() -> None:
    arguments = tyro.cli(Arguments)
    if arguments.cache:
        keep_programs()
    began = time.perf_counter()
    experiment = distilling(arguments.teacher, arguments.options)
    judged = isinstance(experiment.evaluation, ShapesEvaluation)
    if arguments.data:
        datasets.check(arguments.data)  # before a run is made of it
    elif not judged and not (arguments.teacher / CONFIG).is_file():
        raise UserError(f"{arguments.teacher} is a pipeline without clips; name folders of them: --data CLIPS")
    run = Run.create(arguments.workdir, experiment)
    student = run.train(*(arguments.data or _own(arguments)))
    teacher = dit_video.load(arguments.teacher)
    measured = evaluate.evaluate(student, run.folder, seed=experiment.seed, run=run)
    if judged and arguments.seeds:
        measured.metrics["few_steps"] = _compared(arguments, teacher, student, run.folder)
    report_run(
        run.folder / "report.html",
        student,
        measured,
        title=f"{arguments.teacher.name}, in {experiment.sampling.steps} steps",
        source=run.folder,
        config=config_json.to_json(experiment),
    )
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes; look at {run.folder / 'report.html'}")


def _own(arguments: Arguments) -> tuple[Address, ...]:
    """The clips of the teacher's run; rendered ones where it has none."""
    if (arguments.teacher / CONFIG).is_file():
        return datasets.sources(arguments.teacher / "data")
    folder, count, seed = arguments.workdir / "clips", arguments.clips, arguments.options.seed
    with Progress("rendering clips", count, unit="clip") as progress:
        shapes.write_folder(folder, count=count, seed=seed, progress=lambda done, _: progress.update(done))
    return (folder,)


def _compared(arguments: Arguments, teacher: Pipeline, student: Pipeline, folder: Path) -> dict[str, Any]:
    """The table, which is written and said."""
    few = tuple(sorted({4, 2, 1, arguments.options.sampling_steps}, reverse=True))
    with Progress("comparing", 1 + 2 * len(few), unit="row") as progress:
        seeds = range(arguments.options.seed, arguments.options.seed + arguments.seeds)
        table = compare(teacher, student, full=arguments.full, few=few, seeds=tuple(seeds), progress=progress.update)
    write_json(folder / "few_steps.json", table)
    for name, row in table.items():
        rates = ", ".join(f"{attribute} {row[attribute]:.1%}" for attribute in ATTRIBUTES)
        spread = "–" if row["spread"] is None else f"{row['spread']:.3f}"
        kept = " and ".join(
            "–" if row[part] is None else f"{row[part]:.1%}" for part in ("following_kept", "spread_kept")
        )
        print(f"{name}: {rates}; spread {spread}; keeps {kept} of the teacher's following and spread")
    return table


if __name__ == "__main__":
    script(main)()
