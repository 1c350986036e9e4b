"""Distill a model into a few-step student, sample it and compare it with its teacher in a report.

The teacher is the folder of a run, of a pipeline, or of open weights in diffusers' layout; or its address, or its name
on the Hugging Face hub, as `dit_video.load` takes them. A run has its own clips; for the pipeline of rendered shapes,
clips are rendered; all others need --data, as in `train.py`. The student starts from the teacher's weights and learns
to match its guided samples without guidance:

    --method consistency    map any point of the teacher's trajectory to its end (latent consistency)
    --method dmd            match the distribution of the teacher's samples (DMD2, without its discriminator)

A student of open weights is an adapter (LoRA), and so is the critic of DMD: the teacher's weights are in memory once.
`--train full` trains all weights of copies instead, and `--train lora` the adapter of any teacher.
WORKDIR/pytorch_lora_weights.safetensors is the adapter, for `load_lora` and diffusers.

WORKDIR/pipeline is the student, with 4 sampling steps; sample it with `dit_video.load(WORKDIR)` or `sample.py`. For the
rendered shapes, WORKDIR/few_steps.json and the report compare how well teacher and student follow prompts and how much
their samples vary, per number of steps. After an interruption, run the same command again to continue. Several
processes train one student together, as with `train.py` (see experiments/launch).
"""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__)

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

import dit_video
from dit_video.apps.reports.run_report import write_run_report
from dit_video.core import config_json
from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import UserError, script
from dit_video.core.files import write_json
from dit_video.core.platform.compilation_cache import enable_compilation_cache
from dit_video.core.storage import StoragePathLike
from dit_video.distributed.faults.timeouts import TimeoutConfig
from dit_video.distributed.gather import is_first_process
from dit_video.experiment import datasets
from dit_video.experiment.export import LORA_FILE
from dit_video.experiment.launch import open_run
from dit_video.experiment.recipes.distill import DistillationOptions, make_distillation_experiment
from dit_video.loading import find_folder
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import RUN_CONFIG as CONFIG
from dit_video.scenes import shapes
from dit_video.scenes.shape_metrics import ATTRIBUTES
from dit_video.scenes.shapes_evaluation import ShapesEvaluation, compare_few_steps
from dit_video.training.hooks.logging import Progress


@dataclass(frozen=True)
class Arguments:
    """Distill a model into a few-step student, sample it and compare it with its teacher in a report.

    For example:

        python experiments/distill.py experiments/pretrained/shapes --method dmd --steps 150 --batch 4
        python experiments/distill.py runs/mine --method consistency --workdir runs/mine-few
        python experiments/distill.py Wan2.1-T2V-1.3B-Diffusers --data CLIPS --method dmd
    """

    teacher: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TEACHER")]
    """Folder of the teacher: a run, a pipeline, or open weights in diffusers' layout; or its address, or its name on
    the Hugging Face hub."""
    workdir: str = "runs/distilled"
    """Folder or address (gs://…) of the student's run."""
    data: tuple[str, ...] = ()
    """Folders of clips, or data sets written by tools/ingest.py; the clips of the teacher's run by default."""
    clips: int = 2000
    """Number of clips to render if the teacher was trained on rendered shapes and --data is not set."""
    seeds: int = 3
    """Number of samples per prompt of the rendered shapes in the comparison; 0 skips the comparison."""
    full: int = 50
    """Number of sampling steps of the teacher in the comparison."""
    options: Annotated[DistillationOptions, tyro.conf.arg(name="")] = field(default_factory=DistillationOptions)
    cache: bool = True
    """Keep compiled programs, so that the next start is faster: in ~/.cache/dit_video/programs, or in WORKDIR/.programs
    if WORKDIR is an address, or several processes share no home."""
    stopped_code: int = 0
    """Exit code after SIGTERM or Ctrl-C; use 75 for a manager that takes 0 for finished, such as Kubernetes."""
    patience: TimeoutConfig = field(default_factory=TimeoutConfig)
    """Timeouts of the processes of a run when they wait for each other."""


def main() -> None:
    arguments = parse_arguments(Arguments)
    options = arguments.options
    check_minimum(1, clips=arguments.clips, full=arguments.full)
    check_minimum(1, steps=options.steps, sampling_steps=options.sampling_steps, batch=options.batch)
    check_minimum(0, seeds=arguments.seeds, seed=options.seed)
    start_time = time.perf_counter()
    name = arguments.teacher.name
    arguments = replace(arguments, teacher=find_folder(arguments.teacher))
    experiment = make_distillation_experiment(arguments.teacher, arguments.options)
    is_shapes = isinstance(experiment.evaluation, ShapesEvaluation)
    if arguments.data:
        datasets.check_datasets(arguments.data, workdir=arguments.workdir)  # fail before the run's folder is created
    elif not is_shapes and not (arguments.teacher / CONFIG).is_file():
        raise UserError(f"{arguments.teacher} has no clips of its own; use --data CLIPS")
    launch: dict[str, Any] = {"timeouts": arguments.patience, "stopped_code": arguments.stopped_code}
    with open_run(arguments.workdir, experiment, **launch) as run:
        if arguments.cache:
            enable_compilation_cache(run_folder=arguments.workdir)
        with run.main_process_first():
            data = arguments.data or _get_data(arguments, run.folder)
        run.train(*data)
        student = run.load_pipeline()
        evaluation = run.evaluate(pipeline=student)
        if is_shapes and arguments.seeds:
            teacher = dit_video.load(arguments.teacher, parallel=run.sampling_parallelism)
            evaluation.record["few_steps"] = _compare_few_steps(arguments, teacher, student, run.folder)
        if not is_first_process():
            return
        write_run_report(
            run.folder / "report.html",
            student,
            evaluation,
            title=f"{name}, in {experiment.sampling.steps} steps",
            source=run.folder,
            config=config_json.to_json(experiment),
        )
    if (run.folder / LORA_FILE).is_file():
        print(f"{arguments.workdir}/{LORA_FILE}")
    print(f"{(time.perf_counter() - start_time) / 60:.1f} minutes; report: {arguments.workdir}/report.html")


def _get_data(arguments: Arguments, run: Path) -> tuple[StoragePathLike, ...]:
    """Return the data of the teacher's run, or a folder of rendered clips if the teacher is a pipeline."""
    if (arguments.teacher / CONFIG).is_file():
        return datasets.list_datasets(arguments.teacher / "data")
    folder, count, seed = run / "clips", arguments.clips, arguments.options.seed
    if is_first_process():
        with Progress("rendering clips", count, unit="clip") as progress:
            shapes.write_folder(folder, count=count, seed=seed, progress=lambda done, _: progress.update(done))
    return (folder,)


def _compare_few_steps(arguments: Arguments, teacher: Pipeline, student: Pipeline, folder: Path) -> dict[str, Any]:
    """Compare teacher and student, return the table, and in the first process write it to few_steps.json and print it.

    All processes sample, and each decodes and measures all clips.
    """
    few = tuple(sorted({4, 2, 1, arguments.options.sampling_steps}, reverse=True))
    with Progress("comparing", 1 + 2 * len(few), unit="row", visible=is_first_process()) as progress:
        seeds = range(arguments.options.seed, arguments.options.seed + arguments.seeds)
        table = compare_few_steps(
            teacher,
            student,
            reference_steps=arguments.full,
            few_steps=few,
            seeds=tuple(seeds),
            progress=progress.update,
        )
    if not is_first_process():
        return table
    write_json(folder / "few_steps.json", table)
    for name, row in table.items():
        rates = ", ".join(f"{attribute} {row[attribute]:.1%}" for attribute in ATTRIBUTES)
        spread = "–" if row["spread"] is None else f"{row['spread']:.3f}"
        retained = " and ".join(
            "–" if row[part] is None else f"{row[part]:.1%}" for part in ("following_kept", "spread_kept")
        )
        print(f"{name}: {rates}; spread {spread}; keeps {retained} of the teacher's following and spread")
    return table


if __name__ == "__main__":
    script(main)()
