"""Evaluate a run, an exported pipeline or a folder of videos, and write metrics.json, report.html and the samples."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__)

import fnmatch
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

sys.path.insert(0, str(Path(__file__).parent))  # for a caller in another folder, such as a test

from model_options import ModelOptions
from sampling_options import SamplingOptions

import dit_video.scenes.protocols  # registers its protocols, as the next two do
import dit_video.scenes.shapes_evaluation
import dit_video.scenes.tasks  # noqa: F401
from dit_video.apps.reports.evaluation_report import write_evaluation_report
from dit_video.apps.reports.run_report import write_run_report
from dit_video.core import config_json
from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import UserError, script
from dit_video.core.files import check_writable_folder
from dit_video.core.platform.provenance import get_code_version
from dit_video.core.storage import is_remote, restore_address
from dit_video.distributed.faults.timeouts import TimeoutConfig
from dit_video.distributed.gather import is_first_process
from dit_video.distributed.processes import initialize_distributed
from dit_video.evaluation.clip_set import ClipSet, open_clip_set
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.evaluation.evaluate import evaluate, print_results
from dit_video.evaluation.measure import EvaluationResult, measure
from dit_video.evaluation.protocol import EvaluationData, EvaluationProtocol
from dit_video.evaluation.protocols import PROTOCOLS, get_protocol
from dit_video.experiment.run import Run
from dit_video.experiment.several_models import open_sampled_run
from dit_video.loading import find_folder, read_config
from dit_video.sampling.pipeline_config import RUN_CONFIG as CONFIG

_MODEL, _SAMPLING, _PATIENCE = ModelOptions(), SamplingOptions(), TimeoutConfig()
_FOLDER_PROTOCOL = "samples"
_MAX_NAMED = 5
"""Number of clips that are left out whose reasons are printed; all are in metrics.json."""
_PROTOCOL_HELP = f"Names or patterns, such as 'task_*', of protocols: {', '.join(PROTOCOLS)}."


def main(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_FOLDER")],
    out: Path | None = None,
    seed: int | None = None,
    protocol: Annotated[tuple[str, ...], tyro.conf.arg(help=_PROTOCOL_HELP)] = (),
    data: Path | None = None,
    metrics: tuple[str, ...] = (),
    weights: Path | None = None,
    count: int | None = None,
    fields: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD=VALUE")] = (),
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
        python experiments/evaluate.py runs/scenes/tasks --protocol 'task_*' --count 20
        python experiments/evaluate.py runs/wan --protocol msrvtt --data msrvtt --weights weights
        python experiments/evaluate.py folder/of/videos --data folder/of/real/videos --out results

    Args:
        run: Folder of a run, of a pipeline or of videos.
        out: Folder to write the files to; the run's folder by default.
        seed: Seed of the samples; 0 by default, or the protocol's.
        data: Folder of clips of the data, or of the originals of reconstructions.
        metrics: Names of the protocol's values to compute; all by default.
        weights: Folder of the weights of feature networks; `weights` by default.
        count: Number of samples, instead of the protocol's.
        fields: Other fields of the protocol and their values in JSON, such as levels=[3] or resample=3.
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
        if is_model and not protocol:
            _refuse(
                "they belong to a protocol", data=data, metrics=metrics, weights=weights, count=count, fields=fields
            )
            _evaluate_run(run, _get_folder(run, out, is_model=True), seed or 0, model, sampling)
            return
        if not is_model:
            has_options = seed is not None or (model, sampling) != (_MODEL, _SAMPLING)
            _refuse("a folder of videos is not sampled", options="of sampling" if has_options else None)
        if not any(run.iterdir()):
            raise UserError(
                f"{run} holds neither a model nor videos: it is empty. Name a run, a pipeline or a folder of videos"
            )
        given = dict(map(_parse_field, fields)) | ({} if seed is None else {"seed": seed})
        changes = {"metrics": metrics, "weights": weights, "count": count, "fields": given}
        results = _get_folder(run, out, is_model=is_model)
        pipeline = model.load_pipeline(run, sampling) if is_model else None
        for chosen in _get_protocols(protocol or (_FOLDER_PROTOCOL,), changes):
            folder = results / chosen.name
            real_clips = None if data is None else open_clip_set(data, split=chosen.split, background=chosen.background)
            if pipeline is None:
                result = _measure_folder(open_clip_set(run), chosen, folder, real_clips)
            else:
                result = evaluate(
                    pipeline,
                    chosen,
                    folder,
                    data=None if real_clips is None else EvaluationData(real_clips),
                    average={"ema": model.ema, "sigma_rel": model.sigma_rel},
                    sampling=sampling.make_sampling(pipeline.config),
                )
            if is_first_process():
                _write_report(folder / "report.html", result, title=f"{chosen.name} of {run.name}")


def _get_protocols(patterns: tuple[str, ...], changes: dict[str, Any]) -> list[EvaluationProtocol]:
    """Return the protocols whose names fit one of the patterns; a pattern without a match is taken for a name."""
    names = [fnmatch.filter(PROTOCOLS, pattern) or [pattern] for pattern in patterns]
    return [get_protocol(name, **changes) for name in dict.fromkeys(itertools.chain(*names))]


def _parse_field(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _refuse(rule: str, **values: object) -> None:
    """Refuse options that would have no effect.

    Raises:
      UserError: If one of the options has a value.
    """
    for name, value in values.items():
        if value not in (None, ()):
            raise UserError(f"{name}={value} is invalid here: {rule}. Leave it out, or use another --protocol")


def _write_report(path: Path, result: EvaluationResult, *, title: str) -> None:
    """Write the page, and print the results."""
    write_evaluation_report(path, result, title=title)
    for name, reason in result.skipped.items():
        print(f"{name}: not computed: {reason}")
    for location, reasons in result.record["excluded"].items():
        named = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:_MAX_NAMED])
        print(f"{len(reasons)} clips of {location} are left out: {named}")
    for _, about, estimate in result.results.values():
        if about.is_headline and estimate.value is None:
            print(f"{about.label}: no value: {estimate.note or 'no example determines it'}")
    print_results(result.results, is_precise=True)
    print(f"report: {path}")


def _get_folder(run: Path, out: Path | None, *, is_model: bool) -> Path:
    """Return the folder of the files.

    Raises:
      UserError: If no folder is given for a pipeline, whose own folder holds nothing else, or it cannot be written.
    """
    if out is None and not (run / CONFIG).is_file():
        kind = "a pipeline, not a run" if is_model else "a folder of videos"
        raise UserError(f"{run} is {kind}, so it has no folder for the files; use --out FOLDER")
    folder = run if out is None else out
    check_writable_folder(folder)
    return folder


def _evaluate_run(run: Path, folder: Path, seed: int, model: ModelOptions, sampling: SamplingOptions) -> None:
    """Evaluate a model on the prompts and by the metrics of its own config."""
    pipeline = model.load_pipeline(run, sampling)
    trained = Run.open(run) if (run / CONFIG).is_file() else None
    result = evaluate(
        pipeline,
        replace(pipeline.config.evaluation or CaptionEvaluation(), seed=seed),
        folder,
        data=None if trained is None else open_sampled_run(trained).evaluation_data(),
        sampling=sampling.make_sampling(pipeline.config),
        replace_samples=True,
    )
    if not is_first_process():
        return
    config = None if trained is None else config_json.to_json(trained.experiment)
    write_run_report(
        folder / "report.html", pipeline, result, title=f"Evaluation of {run.name}", source=run, config=config
    )
    print_results(result.results, is_precise=True)
    print(f"report: {folder / 'report.html'}")


def _measure_folder(
    samples: ClipSet, protocol: EvaluationProtocol, folder: Path, real_clips: ClipSet | None
) -> EvaluationResult:
    if protocol.count is not None and protocol.count > len(samples.names):
        rule = f"{samples.location} has {len(samples.names)} clips"
        fix = f"Use --count {len(samples.names)} or less, whose figures are of another protocol"
        raise UserError(f"count={protocol.count} is invalid: {rule}. {fix}")
    return measure(samples, protocol, folder, real_clips=real_clips)


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
