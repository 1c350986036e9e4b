"""Evaluate a run, an exported pipeline or a folder of videos, and write metrics.json, report.html and the samples."""

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
from dit_video.apps.reports.evaluation_report import write_evaluation_report
from dit_video.apps.reports.run_report import write_run_report
from dit_video.core import config_json
from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import UserError, script
from dit_video.core.platform.provenance import get_code_version
from dit_video.core.storage import is_remote, restore_address
from dit_video.distributed.faults.timeouts import TimeoutConfig
from dit_video.distributed.gather import is_first_process
from dit_video.distributed.processes import initialize_distributed
from dit_video.evaluation import evaluate
from dit_video.evaluation.clip_set import ClipSet, open_clip_set
from dit_video.evaluation.evaluate_protocol import ProtocolResult, evaluate_protocol, is_reconstruction
from dit_video.evaluation.measure import count_clips, measure
from dit_video.evaluation.protocol import Protocol
from dit_video.evaluation.protocols import PROTOCOLS, get_protocol
from dit_video.experiment.run import Run
from dit_video.experiment.several_models import open_sampled_run
from dit_video.loading import find_folder, read_config
from dit_video.sampling.pipeline_config import RUN_CONFIG as CONFIG
from dit_video.scenes.shapes_evaluation import ShapesEvaluation
from dit_video.training.hooks.logging import Progress

_MODEL, _SAMPLING, _PATIENCE = ModelOptions(), SamplingOptions(), TimeoutConfig()
_FOLDER_PROTOCOL, _QUICKSTART = "samples", "quickstart"
_MAX_NAMED = 5
"""Number of clips that are left out whose reasons are printed; all are in metrics.json."""
_PROTOCOL_HELP = f"Name of a protocol: {', '.join((*PROTOCOLS, _QUICKSTART))}."


def main(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_FOLDER")],
    out: Path | None = None,
    seed: int | None = None,
    protocol: Annotated[str | None, tyro.conf.arg(help=_PROTOCOL_HELP)] = None,
    data: Path | None = None,
    metrics: tuple[str, ...] = (),
    weights: Path | None = None,
    count: int | None = None,
    patience: TimeoutConfig = _PATIENCE,
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = _MODEL,
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = _SAMPLING,
) -> None:
    """Compute metrics of a model or of a folder of videos, and write metrics.json, report.html and the samples.

    Without a protocol a model is evaluated as its config says, and a folder of videos by the protocol samples. Several
    processes, started as with train.py (docs/distributed.md), sample together and share the clips to measure.

    For example:

        python experiments/evaluate.py runs/quickstart
        python experiments/evaluate.py experiments/pretrained/shapes --out runs/pretrained --seed 7
        python experiments/evaluate.py runs/scenes --protocol scenes
        python experiments/evaluate.py runs/wan --protocol msrvtt --data msrvtt --weights weights
        python experiments/evaluate.py folder/of/videos --data folder/of/real/videos --out results

    Args:
        run: Folder of a run, of a pipeline or of videos.
        out: Folder to write the files to; the run's folder by default.
        seed: Seed of the samples, of a model without a protocol; 0 by default.
        data: Folder of clips of the data, or of the originals of reconstructions.
        metrics: Names of the protocol's values to compute; all by default.
        weights: Folder of the weights of feature networks; `weights` by default.
        count: Number of samples, instead of the protocol's.
        patience: How long other processes are waited for.
        model: Weights, devices and memory.
        sampling: Steps, solver and guidance.
    """
    check_minimum(0, seed=seed)
    check_minimum(1, count=count, steps=sampling.steps)
    with initialize_distributed(sys.argv[1:], code=get_code_version(), timeouts=patience):
        if out is None and is_remote(restore_address(run)):
            raise UserError(f"the results of {restore_address(run)} need a folder on this machine. Use --out FOLDER.")
        run = find_folder(run)
        is_model = (run / CONFIG).is_file() or read_config(run) is not None
        if is_model and protocol in (None, _QUICKSTART):
            _refuse("they belong to a protocol", data=data, metrics=metrics, weights=weights, count=count)
            target = _get_folder(run, out, is_model=True)
            _evaluate_run(run, target, seed or 0, model, sampling, is_quickstart=protocol is not None)
            return
        _refuse("samples of a protocol have their own seed", seed=seed)
        if not is_model:
            _refuse(
                "a folder of videos is not sampled",
                options=None if (model, sampling) == (_MODEL, _SAMPLING) else "of sampling",
            )
        if not any(run.iterdir()):
            raise UserError(
                f"{run} holds neither a model nor videos: it is empty. Name a run, a pipeline or a folder of videos"
            )
        chosen = get_protocol(protocol or _FOLDER_PROTOCOL, metrics=metrics, weights=weights, count=count)
        folder = _get_folder(run, out, is_model=is_model) / chosen.name
        real_clips = None if data is None else open_clip_set(data, split=chosen.split)
        if is_model:
            result = _evaluate_model(run, chosen, folder, real_clips, model, sampling)
        else:
            result = _evaluate_samples(open_clip_set(run), chosen, folder, real_clips)
        if is_first_process():
            _write_report(folder / "report.html", result, title=f"Evaluation of {run.name}")


def _refuse(rule: str, **values: object) -> None:
    """Refuse options that would have no effect.

    Raises:
      UserError: If one of the options has a value.
    """
    for name, value in values.items():
        if value not in (None, ()):
            raise UserError(f"{name}={value} is invalid here: {rule}. Leave it out, or use another --protocol")


def _write_report(path: Path, result: ProtocolResult, *, title: str) -> None:
    """Write the page, and print the results."""
    write_evaluation_report(
        path,
        result.measurement,
        result.protocol,
        result.samples,
        title=title,
        real_clips=result.real_clips,
        is_reconstruction=is_reconstruction(result.protocol),
    )
    for name, reason in result.measurement.skipped.items():
        print(f"{name}: not computed: {reason}")
    for location, reasons in result.measurement.record["excluded"].items():
        named = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:_MAX_NAMED])
        print(f"{len(reasons)} clips of {location} are left out: {named}")
    for _, about, estimate in result.measurement.results.values():
        if about.is_headline and estimate.value is None:
            print(f"{about.label}: no value: {estimate.note or 'no example determines it'}")
    evaluate.print_results(result.measurement.results, is_precise=True)
    print(f"report: {path}")


def _get_folder(run: Path, out: Path | None, *, is_model: bool) -> Path:
    """Return the folder of the files.

    Raises:
      UserError: If no folder is given for a pipeline, whose own folder holds nothing else.
    """
    if out is None and not (run / CONFIG).is_file():
        kind = "a pipeline, not a run" if is_model else "a folder of videos"
        raise UserError(f"{run} is {kind}, so it has no folder for the files; use --out FOLDER")
    return run if out is None else out


def _evaluate_run(
    run: Path, folder: Path, seed: int, model: ModelOptions, sampling: SamplingOptions, *, is_quickstart: bool
) -> None:
    """Evaluate a model on the prompts and by the metrics of its own config, or of the quickstart."""
    pipeline = model.load_pipeline(run, sampling)
    trained = Run.open(run) if (run / CONFIG).is_file() else None
    clips = None if trained is None else open_sampled_run(trained).evaluation_clips()
    evaluation = evaluate.evaluate(
        pipeline,
        folder,
        seed=seed,
        clips=clips,
        evaluation=ShapesEvaluation() if is_quickstart else None,
        sampling=sampling.make_sampling(pipeline.config),
    )
    if not is_first_process():
        return
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


def _evaluate_samples(samples: ClipSet, protocol: Protocol, folder: Path, real_clips: ClipSet | None) -> ProtocolResult:
    if protocol.count is not None and protocol.count > len(samples.names):
        rule = f"{samples.location} has {len(samples.names)} clips"
        fix = f"Use --count {len(samples.names)} or less, whose figures are of another protocol"
        raise UserError(f"count={protocol.count} is invalid: {rule}. {fix}")
    real_count = 0 if real_clips is None else protocol.real_count or len(real_clips.names)
    total = count_clips(protocol, samples=protocol.count or len(samples.names), real_clips=real_count)
    with Progress("measuring", total, unit="clip", visible=is_first_process()) as progress:
        measurement = measure(
            samples,
            protocol,
            folder,
            real_clips=real_clips,
            is_reconstruction=is_reconstruction(protocol),
            progress=progress.update,
        )
    return ProtocolResult(measurement, protocol, samples, real_clips)


def _evaluate_model(
    run: Path,
    protocol: Protocol,
    folder: Path,
    real_clips: ClipSet | None,
    model: ModelOptions,
    sampling: SamplingOptions,
) -> ProtocolResult:
    pipeline = model.load_pipeline(run, sampling)
    real_count = protocol.real_count or (protocol.count or 0 if real_clips is None else len(real_clips.names))
    total = protocol.count or real_count
    measured = count_clips(protocol, samples=total, real_clips=real_count)
    with (
        Progress("sampling", total, unit="clip", visible=is_first_process()) as sampled,
        Progress("measuring", measured, unit="clip", visible=is_first_process()) as measuring,
    ):
        return evaluate_protocol(
            pipeline,
            protocol,
            folder,
            data=real_clips,
            average={"ema": model.ema, "sigma_rel": model.sigma_rel},
            sampling=sampling.make_sampling(pipeline.config),
            sampling_progress=sampled.update,
            progress=measuring.update,
        )


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
