"""Report of a run, made from its files and evaluation."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_video.apps.reports.elements import Chart, Curve
from dit_video.apps.reports.evaluation_report import format_values, make_headline_figures, make_result_table
from dit_video.apps.reports.report import Command, Figure, Reconstruction, Report, Sample, write_report
from dit_video.apps.reports.run_times import format_duration
from dit_video.core import config_json
from dit_video.core.files import read_json
from dit_video.diffusion import SOLVERS, TEXT
from dit_video.evaluation.collection import MetricResult
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.evaluation.measure import EvaluationResult
from dit_video.experiment.run import EXCLUDED_FILE, Run
from dit_video.experiment.several_models import list_models
from dit_video.experiment.stages.autoencoder import WINDOWS
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import RUN_CONFIG
from dit_video.sampling.request import Request
from dit_video.training.goodput import RunTimes, read_run_times
from dit_video.training.hooks.logging import read_metrics
from dit_video.training.program_report import ProgramReport

_MAX_RECONSTRUCTIONS = 12
"""Maximum number of reconstructions on the page; the figures are computed over all."""
_LEFT_OUT = ("metrics", "protocol", "results", "examples", "nearest")
"""Parts of `metrics.json` that are no table: the protocol and its metrics repeat the config."""
_MAX_EXCLUDED = 100
"""Maximum number of excluded clips that a table on the page lists; the run's file has all."""


def write_run_report(
    path: str | Path,
    pipeline: Pipeline,
    evaluation: EvaluationResult,
    *,
    title: str,
    source: Path,
    config: Any = None,
    minutes: float | None = None,
) -> None:
    """Write the report of a run.

    Args:
      path: HTML file.
      pipeline: Pipeline that was evaluated.
      evaluation: Result of the evaluation.
      title: Headline of the page.
      source: Folder of the run, whose loss curves are shown, or of a pipeline: anything that `dit_video.load` reads.
      config: Resolved config, shown as JSON; by default the pipeline's.
      minutes: Duration of the whole run.
    """
    counts = evaluation.record["model"]["parameters"]
    summary = (
        f"{sum(counts.values()) / 1e6:.2f} million parameters, created by: "
        f"{pipeline.config.provenance.get('command', '?')} (seed {pipeline.config.provenance.get('seed', '?')}). "
        f"{_describe_sampling(evaluation)}"
    )
    excluded, times = _read_excluded(source), read_run_times(source)
    report = Report(
        title=title,
        summary=summary,
        figures=_make_figures(evaluation.results, excluded, times, minutes),
        samples=_make_samples(evaluation),
        reconstructions=_make_reconstructions(evaluation),
        charts=_make_charts(source),
        programs=_read_programs(source),
        times=times,
        metrics=_make_tables(evaluation) | _make_window_tables(source) | _make_excluded_tables(excluded),
        config=config_json.to_json(pipeline.config) if config is None else config,
        commands=_make_commands(pipeline, source),
    )
    write_report(path, report)


def write_autoencoder_report(path: str | Path, run: Run, evaluation: EvaluationResult) -> None:
    """Write the report of a run that trains only an autoencoder."""
    experiment = run.experiment
    count = evaluation.record["model"]["parameters"]["autoencoder"]
    excluded, times = _read_excluded(run.folder), read_run_times(run.folder)
    report = Report(
        title=f"{experiment.name}: the autoencoder",
        summary=f"{count / 1e6:.2f} million parameters, created by: {run.command} (seed {experiment.seed}).",
        figures=_make_figures(evaluation.results, excluded, times),
        reconstructions=_make_reconstructions(evaluation),
        charts=_make_charts(run.folder),
        programs=_read_programs(run.folder),
        times=times,
        metrics=_make_tables(evaluation) | _make_window_tables(run.folder) | _make_excluded_tables(excluded),
        config=config_json.to_json(experiment),
    )
    write_report(path, report)


def write_models_report(path: str | Path, run: Run, results: Mapping[str, Mapping[str, MetricResult]]) -> None:
    """Write the report of a run of several models that nothing joins.

    Args:
      path: HTML file.
      run: The run.
      results: Results of each model, by its name. Its own report, `report.html` in its folder, has the clips.
    """
    excluded, times = _read_excluded(run.folder), read_run_times(run.folder)
    figures = [
        replace(figure, label=f"{name}: {figure.label}")
        for name, values in results.items()
        for figure in make_headline_figures(values)
    ]
    reports = ", ".join(f"{name}/report.html" for name in results)
    report = Report(
        title=run.experiment.name,
        summary=f"{len(results)} models, created by: {run.command}. Their samples: {reports}.",
        figures=(*figures, *_make_figures({}, excluded, times)),
        charts=_make_charts(run.folder),
        programs=_read_programs(run.folder),
        times=times,
        metrics={name: make_result_table(values) for name, values in results.items()} | _make_excluded_tables(excluded),
        config=config_json.to_json(run.experiment),
    )
    write_report(path, report)


def _make_reconstructions(evaluation: EvaluationResult) -> tuple[Reconstruction, ...]:
    clips, reconstructions, protocol = evaluation.real_clips, evaluation.reconstructions, evaluation.protocol
    if clips is None or reconstructions is None:
        return ()
    shown = []
    for name in list(evaluation.record["clips"])[:_MAX_RECONSTRUCTIONS]:
        number = clips.names.index(name)
        original = protocol.clips.sample(clips.read(number, protocol.clips.fps), seed=protocol.seed, number=number)
        shown.append(
            Reconstruction(
                original=original,
                decoded=reconstructions.read(number, protocol.clips.fps),
                values=format_values(evaluation.record["clips"][name], evaluation.results),
                name=name,
                linear=None if evaluation.make_baseline is None else evaluation.make_baseline(original),
            )
        )
    return tuple(shown)


def _make_figures(
    results: Mapping[str, MetricResult],
    excluded: Mapping[str, Mapping[str, Any]],
    times: RunTimes,
    minutes: float | None = None,
) -> tuple[Figure, ...]:
    """Return the headline values of all metrics, the time of the run, and the number of excluded clips."""
    figures = list(make_headline_figures(results))
    if minutes:
        figures.append(Figure(label="whole run", value=f"{minutes:.1f} min", note="from start to this page"))
    if (share := times.goodput) is not None:
        lost = f", {times.lost_steps:,} steps taken again" if times.lost_steps else ""
        note = f"training steps, of {format_duration(times.total / 1e6)}{lost}"
        figures.append(Figure(label="goodput", value=f"{100 * share:.1f} %", note=note, share=share))
    return (*figures, *_make_excluded_figures(excluded))


def _make_tables(evaluation: EvaluationResult) -> dict[str, Any]:
    """Return the content of `metrics.json` as tables, with a row for every value of a metric."""
    others = {name: part for name, part in evaluation.record.items() if part and name not in _LEFT_OUT}
    results = {"results": make_result_table(evaluation.results)} if evaluation.results else {}
    return results | others


def _read_excluded(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the clips that a run could not use: of its last stage, and of each stage of its curriculum by name.

    Those of the models of a run of several have the model's name in front.
    """
    files = {}
    for model, run in _list_runs(folder).items():
        files[model, ""] = run / EXCLUDED_FILE
        files |= {
            (model, f", stage {path.parent.name}"): path for path in sorted(run.glob(f"stages/*/{EXCLUDED_FILE}"))
        }
    return {
        f"{model and f'{model}: '}excluded {clips.replace('_', '-')} clips{stage}": content
        for (model, stage), path in files.items()
        if path.is_file()
        for clips, content in read_json(path).items()
    }


def _make_excluded_figures(excluded: Mapping[str, Mapping[str, Any]]) -> tuple[Figure, ...]:
    """Return the number of excluded clips, with the first one's name and reason."""
    figures = []
    for label, content in excluded.items():
        count, (name, reason) = len(content["excluded"]), next(iter(content["excluded"].items()))
        figures.append(Figure(label=label, value=f"{count} of {content['clips']}", note=f"such as {name}: {reason}"))
    return tuple(figures)


def _make_excluded_tables(excluded: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the reasons for which clips are excluded, by name."""
    return {label: dict(list(content["excluded"].items())[:_MAX_EXCLUDED]) for label, content in excluded.items()}


def _make_window_tables(folder: Path) -> dict[str, Any]:
    """Return the shapes of windows that the autoencoder of a run was trained on, with the clips that have room."""
    path = folder / "autoencoder" / WINDOWS
    if not path.is_file():
        return {}
    windows = [(config_json.from_json(each["window"]), each["clips"]) for each in read_json(path)]
    sizes = {f"{window.size}, {window.batch} a step": f"{clips} clips" for window, clips in windows}
    return {"Windows of the autoencoder's training": sizes}


def _describe_sampling(evaluation: EvaluationResult) -> str:
    sampling = evaluation.sampling
    if sampling is None:
        return "Nothing is sampled."
    solver = next((name for name, each in SOLVERS.items() if each == sampling.solver), type(sampling.solver).__name__)
    named = [
        " ".join(filter(None, ("" if name == TEXT else name, " and ".join(f"{scale:g}" for scale in np.ravel(scales)))))
        for name, scales in sampling.guidance.scales.items()
    ]
    steps = f"{sampling.steps} steps of {solver.lower()}"
    return f"Samples: {steps}, guidance {', '.join(named)}, one sample per prompt, not selected."


def _make_samples(evaluation: EvaluationResult) -> tuple[Sample, ...]:
    """Return all samples, each with its values of metrics: those that are true or false as a verdict."""
    samples = []
    for number, (name, item) in enumerate(zip(evaluation.samples.names, evaluation.items, strict=True)):
        values = evaluation.record["examples"].get(name, {})
        verdict = {name: value for name, value in values.items() if isinstance(value, bool)}
        numbers = format_values({name: values[name] for name in values.keys() - verdict}, evaluation.results)
        options = item.entry if isinstance(item.entry, Request) else item.entry.options
        note = " · ".join((f"seed {options.seed}", *(f"{label} {text}" for label, text in numbers.items())))
        clip = evaluation.samples.read(number, None)
        samples.append(Sample(clip=clip, prompt=clip.caption, seen=item.is_trained_caption, note=note, verdict=verdict))
    return tuple(samples)


def _make_charts(folder: Path) -> tuple[Chart, ...]:
    charts = []
    for title, training in _list_trainings(folder):
        path = training / "metrics.jsonl"
        if path.is_file() and (entries := read_metrics(path)):
            steps = tuple(entry["step"] for entry in entries)
            curve = Curve(name="loss", steps=steps, values=tuple(entry["loss"] for entry in entries))
            charts.append(Chart(title=title, curves=(curve,), note="training loss per step"))
    return tuple(charts)


def _read_programs(folder: Path) -> dict[str, ProgramReport]:
    programs = {title: ProgramReport.read(training) for title, training in _list_trainings(folder)}
    return {title: program for title, program in programs.items() if program is not None}


def _list_trainings(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the titles and the folders of the trainings of a run, and of the runs that are nested in it."""
    for model, run in _list_runs(folder).items():
        for name, title in (("autoencoder", "Autoencoder"), ("denoiser", "Denoiser")):
            yield f"{title} of {model}" if model else title, run / name


def _list_runs(folder: Path) -> dict[str, Path]:
    """Return the folders of a run and of the runs that are nested in it, by their paths; the first one's is empty."""
    runs = {"": folder}
    if (folder / RUN_CONFIG).is_file():
        for name, nested in list_models(Run.open(folder)).items():
            runs |= {f"{name}/{inner}".rstrip("/"): path for inner, path in _list_runs(nested).items()}
    return runs


def _make_commands(pipeline: Pipeline, source: Path) -> tuple[Command, ...]:
    frames, height, width = pipeline.config.size
    size = f"{frames}x{height}x{width}"
    folder = shlex.quote(str(source))
    evaluation = pipeline.config.evaluation or CaptionEvaluation()
    prompt = next(iter((*pipeline.config.example_prompts, *evaluation.example_prompts, "a prompt")))
    return (
        Command(
            text=f"python experiments/sample.py {folder} --prompt {shlex.quote(prompt)} --size {size} --seed 3 "
            "--out clip.mp4",
            note="one clip",
        ),
        Command(
            text=f"import dit_video\npipe = dit_video.load({str(source)!r})\npipe.generate({prompt!r}, size=({frames}, "
            f"{height}, {width}), seed=3)",
            note="in a notebook",
        ),
    )
