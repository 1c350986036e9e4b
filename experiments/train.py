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

import dataclasses
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import tyro

sys.path.insert(0, str(Path(__file__).parent))  # for a caller in another folder, such as a test

from sampling_options import GUIDANCE_SPEC, format_scales, parse_guidance

from dit_video.apps.reports.run_report import write_autoencoder_report, write_models_report, write_run_report
from dit_video.core import config_json
from dit_video.core.command_line import parse_arguments
from dit_video.core.errors import UserError, script
from dit_video.core.platform.compilation_cache import enable_compilation_cache
from dit_video.diffusion import Guidance
from dit_video.distributed.faults.timeouts import TimeoutConfig
from dit_video.distributed.gather import is_first_process
from dit_video.evaluation import evaluate
from dit_video.evaluation.collection import MetricResult
from dit_video.experiment import Experiment, Run, TrainModel, datasets
from dit_video.experiment.config_file import load_experiment
from dit_video.experiment.launch import open_run
from dit_video.experiment.several_models import find_join, open_sampled_run
from dit_video.sampling.sampling_config import make_guidance
from dit_video.training import goodput


@dataclass(frozen=True)
class Arguments:
    """Train an experiment on a folder of clips, sample it and write its report.

    Every scalar of the config is an option. For example:

        python experiments/train.py experiments/configs/clips.py --data CLIPS --workdir runs/clips
        python experiments/train.py experiments/configs/clips.py --data gs://BUCKET/clips --denoiser.steps 2000
    """

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
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
    arguments = parse_arguments(
        Arguments,
        args=rest,
        default=Arguments(experiment=make_options(experiment), data=tyro.MISSING),
        prog=f"train.py {config}",
        config=(tyro.conf.AvoidSubcommands,),
        registry=make_registry(experiment),
    )
    experiment = read_options(arguments.experiment, experiment)
    workdir = arguments.workdir or f"runs/{experiment.name}"
    if not arguments.data:
        raise UserError("--data is empty: it needs at least one folder. Use --data CLIPS")
    datasets.check_datasets(arguments.data, workdir=workdir)  # fail before the run's folder is created
    start_time = time.perf_counter()
    options: dict[str, Any] = {"timeouts": arguments.patience, "stopped_code": arguments.stopped_code}
    with open_run(workdir, experiment, profile=arguments.profile, **options) as run:
        if arguments.cache:
            enable_compilation_cache(run_folder=workdir)
        run.prepare(*arguments.data, latents=arguments.latents, checkpoints=arguments.checkpoints)
        if arguments.autoencoder_only:
            evaluate.check_held_out(run.held_out_clips)  # before the training, not after it
        run.run_stages("autoencoder" if arguments.autoencoder_only else None)
        results = evaluate_autoencoder(run) if arguments.autoencoder_only else evaluate_run(run)
        has_report = (run.folder / "report.html").is_file()
    evaluate.print_results(results)
    if is_first_process():
        result = f"report: {workdir}/report.html" if has_report else f"run: {workdir}"
        print(f"{(time.perf_counter() - start_time) / 60:.1f} minutes; {result}")


def evaluate_autoencoder(run: Run) -> dict[str, MetricResult]:
    """Write the report of a run whose autoencoder is trained, and return the results."""
    if not is_first_process():
        return {}
    with run.recorder.phase(goodput.EVALUATION):
        evaluation = evaluate.evaluate_autoencoder(
            run.codec(), run.experiment.evaluation, run.folder, data=run.evaluation_data()
        )
    run.recorder.flush()  # the report shows where the time went
    with run.recorder.phase(goodput.REPORT):
        write_autoencoder_report(run.folder / "report.html", run, evaluation)
    return evaluation.results


def evaluate_run(run: Run) -> dict[str, MetricResult]:
    """Sample a finished run on its devices, write its report and return the results in the first process.

    A run without a denoiser has none. One of several models samples the joined pipeline, or each model if none joins
    them.
    """
    is_joined = find_join(run.experiment) is not None
    if run.experiment.model is None and not is_joined:
        return evaluate_models(run)
    experiment, workdir, recorder = run.experiment, run.folder, run.recorder
    with recorder.phase(goodput.EVALUATION):
        pipeline = run.load_pipeline()
        sampled = open_sampled_run(run)
        protocol = dataclasses.replace(sampled.experiment.evaluation, seed=experiment.seed)
        evaluation = run.evaluate(protocol, pipeline=pipeline, data=sampled.evaluation_data())
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


def evaluate_models(run: Run) -> dict[str, MetricResult]:
    """Evaluate each model of a run of several in its own folder, and write the report of all of them."""
    results = {stage.name: evaluate_run(stage.open_run(run)) for stage in run.stages if isinstance(stage, TrainModel)}
    if results and is_first_process():
        write_models_report(run.folder / "report.html", run, results)
        for name, own in results.items():
            print(f"{name}:")
            evaluate.print_results(own)
    return {}  # which are printed by now


def make_options(experiment: Experiment) -> Experiment:
    """Return an experiment of a class with a field for each stage, so that stages have options by their names.

    A stage with an experiment of its own has that one's options: `--prior.denoiser.steps`.
    """
    stages = []
    for number, stage in enumerate(experiment.stages):
        options = make_options(stage.experiment) if isinstance(stage, TrainModel) else stage
        stages.append(
            (f"stage_{number}", Annotated[type(options), tyro.conf.arg(name=stage.name)], field(default=options))
        )
    hidden = ("stages", Annotated[tuple, tyro.conf.Fixed, tyro.conf.Suppress], field(default=experiment.stages))
    # Checked by `read_options`, as a whole.
    unchecked = {"__post_init__": lambda self: None}
    made: Any = dataclasses.make_dataclass(
        "Options", [*stages, hidden], bases=(Experiment,), namespace=unchecked, frozen=True, kw_only=True
    )
    return made(**{each.name: getattr(experiment, each.name) for each in dataclasses.fields(experiment)})


def read_options(options: Any, experiment: Experiment) -> Experiment:
    """Return the experiment with the values that options have set."""
    values = {each.name: getattr(options, each.name) for each in dataclasses.fields(experiment)}
    stages = []
    for number, stage in enumerate(experiment.stages):
        changed = getattr(options, f"stage_{number}")
        if isinstance(stage, TrainModel):
            changed = dataclasses.replace(stage, experiment=read_options(changed, stage.experiment))
        stages.append(changed)
    return Experiment(**values | {"stages": tuple(stages)})


def make_registry(experiment: Experiment) -> tyro.constructors.ConstructorRegistry | None:
    """Return rules for values that are a scalar or a record, which tyro would make positional arguments.

    Guidance becomes an option of its scales, and a field of the backbone that is a name, such as that of the
    attention's backend, one with all names. A config whose `Guidance` has other values, or whose field is a record, has
    an option for each of its fields.
    """
    if experiment.model is None:
        return None
    backbone, registry = experiment.model.backbone, tyro.constructors.ConstructorRegistry()
    hints = get_type_hints(type(backbone)).items()
    named = [hint for name, hint in hints if isinstance(getattr(backbone, name, None), str)]

    @registry.primitive_rule
    def parse_value(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        own = experiment.sampling.guidance
        if info.type == get_type_hints(Guidance)["scales"]:
            return dataclasses.replace(
                GUIDANCE_SPEC, instance_from_str=lambda texts: make_guidance(parse_guidance(texts)).scales
            )
        if info.type is Guidance and own == Guidance(scales=own.scales):
            return dataclasses.replace(
                GUIDANCE_SPEC,
                instance_from_str=lambda texts: make_guidance(parse_guidance(texts), base=own),
                is_instance=lambda value: isinstance(value, Guidance),
                str_from_instance=lambda value: format_scales(value.scales),
            )
        names = tuple(name for member in get_args(info.type) for name in get_args(member))
        if names and info.type in named:  # a literal or a record
            return tyro.constructors.PrimitiveConstructorSpec(
                nargs=1,
                metavar=f"{{{','.join(names)}}}",
                choices=names,
                instance_from_str=lambda texts: texts[0],
                is_instance=lambda value: value in names,
                str_from_instance=lambda value: [value],
            )
        return None

    return registry


if __name__ == "__main__":
    script(main)()
