"""The report of a run: its files, gathered into one page."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dit_video.core import config_json
from dit_video.evaluation.config import ShapesEvaluation
from dit_video.evaluation.evaluate import Measured
from dit_video.evaluation.metrics.prompt_following import Result, score
from dit_video.experiment.run import Run
from dit_video.pipelines.pipeline import Pipeline
from dit_video.reports.contents import Chart, Command, Curve, Figure, Reconstruction, Report, Sample
from dit_video.reports.report import write_report
from dit_video.training.hooks.logging import read

_SHOWN = 12
"""Reconstructions on the page; the figures are of all."""


def report_run(
    path: str | Path,
    pipeline: Pipeline,
    measured: Measured,
    *,
    title: str,
    source: Path,
    config: Any = None,
    minutes: float | None = None,
) -> None:
    """Write the page.

    Args:
      path: of the HTML file.
      pipeline: what was evaluated.
      measured: the evaluation.
      title: the page's headline.
      source: the run's folder, whose loss curves are shown, or a pipeline's: what `dit_video.load` reads.
      config: the resolved config, shown as JSON.
      minutes: how long the whole run took.
    """
    counts, drawn = measured.metrics["parameters"], measured.metrics["sampling"]
    summary = (
        f"{sum(counts.values()) / 1e6:.2f} million parameters, made by: {pipeline.config.made_by.get('command', '?')} "
        f"(seed {pipeline.config.made_by.get('seed', '?')}). Samples: {drawn['steps']} steps of {drawn['sampler']}, "
        f"guidance {_guidance(drawn['guidance'])}, one sample a prompt, none selected."
    )
    report = Report(
        title=title,
        summary=summary,
        figures=_figures(measured.metrics, minutes),
        samples=_samples(measured),
        reconstructions=_reconstructions(measured),
        charts=_charts(source),
        metrics=measured.metrics,
        config=config_json.to_json(pipeline.config) if config is None else config,
        commands=_commands(pipeline, source),
    )
    write_report(path, report)


def report_autoencoder(path: str | Path, run: Run, measured: Measured) -> None:
    """Write the page of a run whose autoencoder alone is trained."""
    experiment = run.experiment
    count = measured.metrics["parameters"]["autoencoder"]
    report = Report(
        title=f"{experiment.name}: the autoencoder",
        summary=f"{count / 1e6:.2f} million parameters, made by: {run.command} (seed {experiment.seed}).",
        figures=_figures(measured.metrics, None),
        reconstructions=_reconstructions(measured),
        charts=_charts(run.folder),
        metrics=measured.metrics,
        config=config_json.to_json(experiment),
    )
    write_report(path, report)


def _guidance(scales: float | Sequence[float]) -> str:
    """One number, or those of two experts."""
    return " and ".join(f"{scale:g}" for scale in (scales if isinstance(scales, Sequence) else (scales,)))


def _reconstructions(measured: Measured) -> tuple[Reconstruction, ...]:
    return tuple(
        Reconstruction(
            original=one.original,
            decoded=one.decoded,
            psnr=one.psnr,
            ssim=one.ssim,
            name=one.name,
            linear=one.linear,
            linear_psnr=one.linear_psnr,
        )
        for one in measured.reconstructions[:_SHOWN]
    )


def _figures(metrics: Mapping[str, Any], minutes: float | None) -> tuple[Figure, ...]:
    figures = []
    if following := metrics.get("prompt_following"):
        for name in ("colour", "direction", "shape"):
            rate, unseen = following["all"][name], following["never_seen"][name]
            note = (
                f"95 % interval {rate['low']:.0%} to {rate['high']:.0%}; never-seen combinations {unseen['rate']:.0%}"
            )
            label, value = f"{name} as asked", f"{rate['rate']:.1%}"
            figures.append(Figure(label=label, value=value, note=note, share=rate["rate"]))
        if (spread := following["start_spread"]["lowest_ratio"]) is not None:
            note = "of the data's spread of start positions: the lowest of all directions and axes"
            figures.append(Figure(label="variety", value=f"{spread:.0%}", note=note))
    if quality := metrics.get("reconstruction"):
        note = f"SSIM {quality['ssim']:.3f}, clips not trained on"
        if "linear_psnr" in quality:
            note += f"; the best linear autoencoder: {quality['linear_psnr']:.1f} dB"
        figures.append(Figure(label="reconstruction", value=f"{quality['psnr']:.1f} dB", note=note))
    if minutes is not None:
        figures.append(Figure(label="whole run", value=f"{minutes:.1f} min", note="from nothing to this page"))
    return tuple(figures)


def _samples(measured: Measured) -> tuple[Sample, ...]:
    """Every sample, with what the judge found wrong where there is one."""
    shown = [
        Sample(clip=one.clip, prompt=one.entry["prompt"], seen=seen, note=f"seed {one.entry['seed']}")
        for one, seen in zip(measured.samples, measured.seen, strict=True)
    ]
    if not measured.verdicts:
        return tuple(shown)
    return tuple(
        replace(sample, verdict=_answers(result)) for sample, result in zip(shown, measured.verdicts, strict=True)
    )


def _answers(result: Result) -> dict[str, bool]:
    """Which of the attributes that were asked for are there."""
    answers = asdict(score(result.description, result.verdict))
    return {name: answer for name, answer in answers.items() if answer is not None}


def _charts(folder: Path) -> tuple[Chart, ...]:
    charts = []
    for name, title in (("autoencoder", "Autoencoder"), ("denoiser", "Denoiser")):
        path = folder / name / "metrics.jsonl"
        if path.is_file() and (entries := read(path)):
            steps = tuple(entry["step"] for entry in entries)
            curve = Curve(name="loss", steps=steps, values=tuple(entry["loss"] for entry in entries))
            charts.append(Chart(title=title, curves=(curve,), note="training loss a step"))
    return tuple(charts)


def _commands(pipeline: Pipeline, source: Path) -> tuple[Command, ...]:
    frames, height, width = pipeline.config.size
    size = f"{frames}x{height}x{width}"
    folder = shlex.quote(str(source))
    prompt = "a red circle moving left" if isinstance(pipeline.config.evaluation, ShapesEvaluation) else "a prompt"
    return (
        Command(
            text=f'python experiments/sample.py {folder} --prompt "{prompt}" --size {size} --seed 3 --out clip.mp4',
            note="one clip",
        ),
        Command(
            text=f'import dit_video\npipe = dit_video.load({str(source)!r})\npipe.generate("{prompt}", size=({frames}, '
            f"{height}, {width}), seed=3)",
            note="in a notebook",
        ),
    )
