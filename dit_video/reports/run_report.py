"""Report of a run, made from its files and evaluation."""

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
"""Maximum number of reconstructions on the page; the figures are computed over all."""


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
    """Write the report of a run.

    Args:
      path: HTML file.
      pipeline: pipeline that was evaluated.
      evaluation: result of the evaluation.
      title: headline of the page.
      source: folder of the run, whose loss curves are shown, or of a pipeline: anything that `dit_video.load` reads.
      config: resolved config, shown as JSON; by default the pipeline's.
      minutes: duration of the whole run.
    """
    counts, sampling = measured.metrics["parameters"], measured.metrics["sampling"]
    summary = (
        f"{sum(counts.values()) / 1e6:.2f} million parameters, created by: "
        f"{pipeline.config.made_by.get('command', '?')} (seed {pipeline.config.made_by.get('seed', '?')}). "
        f"Samples: {sampling['steps']} steps of {sampling['sampler']}, "
        f"guidance {_guidance(sampling['guidance'])}, one sample per prompt, not selected."
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
    """Write the report of a run that trains only an autoencoder."""
    experiment = run.experiment
    count = measured.metrics["parameters"]["autoencoder"]
    report = Report(
        title=f"{experiment.name}: the autoencoder",
        summary=f"{count / 1e6:.2f} million parameters, created by: {run.command} (seed {experiment.seed}).",
        figures=_figures(measured.metrics, None),
        reconstructions=_reconstructions(measured),
        charts=_charts(run.folder),
        metrics=measured.metrics,
        config=config_json.to_json(experiment),
    )
    write_report(path, report)


def _guidance(scales: float | Sequence[float]) -> str:
    """Return the guidance scale as text, or those of two experts."""
    return " and ".join(f"{scale:g}" for scale in (scales if isinstance(scales, Sequence) else (scales,)))


def _reconstructions(measured: Measured) -> tuple[Reconstruction, ...]:
    return tuple(
        Reconstruction(
            original=item.original,
            decoded=item.decoded,
            psnr=item.psnr,
            ssim=item.ssim,
            name=item.name,
            linear=item.linear,
            linear_psnr=item.linear_psnr,
        )
        for item in measured.reconstructions[:_SHOWN]
    )


def _figures(metrics: Mapping[str, Any], minutes: float | None) -> tuple[Figure, ...]:
    figures = []
    if prompt_following := metrics.get("prompt_following"):
        for name in ("colour", "direction", "shape"):
            rate, unseen = prompt_following["all"][name], prompt_following["never_seen"][name]
            note = (
                f"95 % interval {rate['low']:.0%} to {rate['high']:.0%}; "
                f"combinations not in training {unseen['rate']:.0%}"
            )
            label, value = f"{name} as prompted", f"{rate['rate']:.1%}"
            figures.append(Figure(label=label, value=value, note=note, share=rate["rate"]))
        if (start_spread := prompt_following["start_spread"]["lowest_ratio"]) is not None:
            note = "spread of start positions relative to the data's: lowest of all directions and axes"
            figures.append(Figure(label="variety", value=f"{start_spread:.0%}", note=note))
    if quality := metrics.get("reconstruction"):
        note = f"SSIM {quality['ssim']:.3f}, held-out clips"
        if "linear_psnr" in quality:
            note += f"; the best linear autoencoder: {quality['linear_psnr']:.1f} dB"
        figures.append(Figure(label="reconstruction", value=f"{quality['psnr']:.1f} dB", note=note))
    if minutes is not None:
        figures.append(Figure(label="whole run", value=f"{minutes:.1f} min", note="from start to this page"))
    return tuple(figures)


def _samples(measured: Measured) -> tuple[Sample, ...]:
    """Return all samples, with the judgement of their attributes if there is one."""
    samples = [
        Sample(clip=item.clip, prompt=item.entry["prompt"], seen=seen, note=f"seed {item.entry['seed']}")
        for item, seen in zip(measured.samples, measured.seen, strict=True)
    ]
    if not measured.verdicts:
        return tuple(samples)
    return tuple(
        replace(sample, verdict=_answers(result)) for sample, result in zip(samples, measured.verdicts, strict=True)
    )


def _answers(result: Result) -> dict[str, bool]:
    """Return for each attribute of the prompt whether the sample has it."""
    answers = asdict(score(result.description, result.verdict))
    return {name: answer for name, answer in answers.items() if answer is not None}


def _charts(folder: Path) -> tuple[Chart, ...]:
    charts = []
    for name, title in (("autoencoder", "Autoencoder"), ("denoiser", "Denoiser")):
        path = folder / name / "metrics.jsonl"
        if path.is_file() and (entries := read(path)):
            steps = tuple(entry["step"] for entry in entries)
            curve = Curve(name="loss", steps=steps, values=tuple(entry["loss"] for entry in entries))
            charts.append(Chart(title=title, curves=(curve,), note="training loss per step"))
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
