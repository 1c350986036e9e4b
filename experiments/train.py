"""Train an experiment on a folder of clips, sample it and write its report.

    python experiments/train.py experiments/configs/clips.py --data CLIPS --workdir runs/clips
    python experiments/train.py experiments/configs/clips.py --data gs://BUCKET/clips --denoiser.steps 2000

CLIPS is a folder of video files of any size and length with a `metadata.csv` (`file_name,text`), or a data set written
by `tools/ingest.py`. A data set may be remote (`gs://…`), and so may the latents: `--latents gs://…`. Every scalar of
the config can be set on the command line; `train.py CONFIG --help` lists them.

After an interruption, run the same command again to continue. SIGTERM and Ctrl-C let the training save its state and
exit with code 0. Several processes, on one host or many, train one run together (see experiments/launch). With
`--autoencoder-only`, training stops after the autoencoder and reports it; the same command without the option continues
from there.
"""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__)

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro

sys.path.insert(0, str(Path(__file__).parent))  # for a caller in another folder, such as a test

from sampling_options import parse_guidance

from dit_video.apps.reports.run_report import write_autoencoder_report, write_run_report
from dit_video.core import config_json
from dit_video.core.command_line import parse_arguments
from dit_video.core.errors import UserError, script
from dit_video.core.platform.compilation_cache import enable_compilation_cache
from dit_video.diffusion import Guidance
from dit_video.distributed.faults.timeouts import TimeoutConfig
from dit_video.distributed.gather import is_first_process
from dit_video.evaluation import evaluate
from dit_video.evaluation.collection import MetricResult
from dit_video.experiment import Experiment, StagedExperiment, datasets
from dit_video.experiment.config import load_experiment
from dit_video.experiment.launch import open_run
from dit_video.experiment.run import Run, StagedRun
from dit_video.nn.attention import Backend, BackendName
from dit_video.training import goodput


@dataclass(frozen=True)
class Arguments:
    """Train an experiment on a folder of clips, sample it and write its report.

    Every scalar of the config is an option. For example:

        python experiments/train.py experiments/configs/clips.py --data CLIPS --workdir runs/clips
        python experiments/train.py experiments/configs/clips.py --data gs://BUCKET/clips --denoiser.steps 2000
    """

    experiment: Annotated[StagedExperiment, tyro.conf.arg(name="")]
    data: tuple[str, ...]
    """Folders of clips, or data sets written by tools/ingest.py; several are mixed by the config's data.weights."""
    latents: str | None = None
    """Folder or address (gs://…) to read cached latents from, or write them to; WORKDIR/latents by default."""
    checkpoints: str | None = None
    """Folder or address (gs://…) of the checkpoints, from which a lost WORKDIR is restored; WORKDIR by default."""
    workdir: str | None = None
    """Folder or address (gs://…) of the run; runs/NAME by default."""
    autoencoder_only: bool = False
    """Stop after training the autoencoder, and report its reconstructions of the held-out clips."""
    profile: tuple[int, int] | None = None
    """First and last step to trace for XProf and TensorBoard, such as --profile 10 12. Traces the denoiser, or the
    autoencoder with --autoencoder-only, into WORKDIR/denoiser/profile."""
    cache: bool = True
    """Keep compiled programs, so that the next start is faster: in ~/.cache/dit_video/programs, or in WORKDIR/.programs
    if WORKDIR is an address, or several processes share no home."""
    stopped_code: int = 0
    """Exit code after SIGTERM or Ctrl-C; use 75 for a manager that takes 0 for finished, such as Kubernetes."""
    patience: TimeoutConfig = field(default_factory=TimeoutConfig)
    """Timeouts of the processes of a run when they wait for each other."""


def main() -> None:
    config, *rest = sys.argv[1:] or [""]
    if config in ("-h", "--help"):
        print(__doc__)
        return
    if not config or config.startswith("-"):
        raise UserError("the first argument must be a config; use train.py experiments/configs/clips.py --data CLIPS")
    experiment = load_experiment(config)
    run_class = Run if isinstance(experiment, Experiment) else StagedRun
    arguments = parse_arguments(
        Arguments,
        args=rest,
        default=Arguments(experiment=experiment, data=tyro.MISSING),
        prog=f"train.py {config}",
        config=(tyro.conf.AvoidSubcommands,),
        registry=make_registry(experiment),
    )
    workdir = arguments.workdir or f"runs/{arguments.experiment.name}"
    if not arguments.data:
        raise UserError("--data is empty: it needs at least one folder. Use --data CLIPS")
    datasets.check_datasets(arguments.data, workdir=workdir)  # fail before the run's folder is created
    start_time = time.perf_counter()
    options: dict[str, Any] = {"timeouts": arguments.patience, "stopped_code": arguments.stopped_code}
    with open_run(run_class, workdir, arguments.experiment, profile=arguments.profile, **options) as run:
        if arguments.cache:
            enable_compilation_cache(run_folder=workdir)
        run.prepare(*arguments.data, latents=arguments.latents, checkpoints=arguments.checkpoints)
        if arguments.autoencoder_only and isinstance(run, Run):
            evaluate.check_held_out(run.runtime.held_out_clips)  # before the training, not after it
        run.run_stages("autoencoder" if arguments.autoencoder_only else None)
        results = evaluate_autoencoder(run) if arguments.autoencoder_only else evaluate_run(run)
    evaluate.print_results(results)
    if is_first_process():
        result = f"report: {workdir}/report.html" if isinstance(run, Run) else f"run: {workdir}"
        print(f"{(time.perf_counter() - start_time) / 60:.1f} minutes; {result}")


def evaluate_autoencoder(run: StagedRun) -> dict[str, MetricResult]:
    """Write the report of a run whose autoencoder is trained, and return the results."""
    if not is_first_process() or not isinstance(run, Run):
        return {}
    with run.runtime.recorder.phase(goodput.EVALUATION):
        evaluation = evaluate.evaluate_autoencoder(
            run.codec(), run.evaluation_clips(), run.folder, metrics=run.experiment.evaluation.metrics
        )
    run.runtime.recorder.flush()  # the report shows where the time went
    with run.runtime.recorder.phase(goodput.REPORT):
        write_autoencoder_report(run.folder / "report.html", run, evaluation)
    return evaluation.results


def evaluate_run(run: StagedRun) -> dict[str, MetricResult]:
    """Sample a finished run on its devices, write its report and return the results in the first process.

    A run without a denoiser has none.
    """
    if not isinstance(run, Run):
        return {}
    experiment, workdir, recorder = run.experiment, run.folder, run.runtime.recorder
    with recorder.phase(goodput.EVALUATION):
        pipeline = run.load_pipeline()
        evaluation = evaluate.evaluate(
            pipeline,
            workdir,
            seed=experiment.seed,
            clips=run.evaluation_clips(),
            evaluation=experiment.evaluation,
            share=run.runtime.main_process_first,
        )
    if not is_first_process():
        return {}
    recorder.flush()  # the report shows where the time went
    with recorder.phase(goodput.REPORT):
        write_run_report(
            workdir / "report.html",
            pipeline,
            evaluation,
            title=experiment.name,
            source=workdir,
            config=config_json.to_json(experiment),
        )
    return evaluation.results


def make_registry(experiment: StagedExperiment) -> tyro.constructors.ConstructorRegistry | None:
    """Return rules for values that are a scalar or a record, which tyro would make positional arguments.

    Guidance becomes an option of one scale or two, and attention one with the name of a backend. A config whose
    `Guidance` has other values, or whose attention is a `SplashBlocks`, has an option for each of its fields.
    """
    if not isinstance(experiment, Experiment):
        return None
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def parse_value(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        own = experiment.sampling.guidance
        if info.type is Guidance and own == Guidance(scale=own.scale):
            return tyro.constructors.PrimitiveConstructorSpec(
                nargs=(1, 2),
                metavar="FLOAT [FLOAT]",
                instance_from_str=lambda texts: Guidance(scale=parse_guidance(texts)),
                is_instance=lambda value: isinstance(value, Guidance),
                str_from_instance=lambda value: [str(scale) for scale in value.scales],
            )
        if info.type == Backend and isinstance(experiment.denoiser.backbone.attention, str):
            return tyro.constructors.PrimitiveConstructorSpec(
                nargs=1,
                metavar=f"{{{','.join(get_args(BackendName))}}}",
                choices=get_args(BackendName),
                instance_from_str=lambda texts: texts[0],
                is_instance=lambda value: value in get_args(BackendName),
                str_from_instance=lambda value: [value],
            )
        return None

    return registry


if __name__ == "__main__":
    script(main)()
