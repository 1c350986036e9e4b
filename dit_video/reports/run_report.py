"""Report of a run, made from its files and evaluation."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dit_video.core import config_json
from dit_video.evaluation.config import ShapesEvaluation
from dit_video.evaluation.evaluate import EvaluationResult
from dit_video.evaluation.metrics.prompt_following import JudgedSample, score
from dit_video.experiment.run import Run
from dit_video.pipelines.pipeline import Pipeline
from dit_video.reports.contents import Chart, Command, Curve, Figure, Reconstruction, Report, Sample
from dit_video.reports.report import write_report
from dit_video.training.hooks.logging import read_metrics

_MAX_RECONSTRUCTIONS = 12
"""Maximum number of reconstructions on the page; the figures are computed over all."""


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
      pipeline: pipeline that was evaluated.
      evaluation: result of the evaluation.
      title: headline of the page.
      source: folder of the run, whose loss curves are shown, or of a pipeline: anything that `dit_video.load` reads.
      config: resolved config, shown as JSON; by default the pipeline's.
      minutes: duration of the whole run.
    """
    counts, sampling = evaluation.metrics["parameters"], evaluation.metrics["sampling"]
    summary = (
        f"{sum(counts.values()) / 1e6:.2f} million parameters, created by: "
        f"{pipeline.config.provenance.get('command', '?')} (seed {pipeline.config.provenance.get('seed', '?')}). "
        f"Samples: {sampling['steps']} steps of {sampling['sampler']}, "
        f"guidance {_format_guidance(sampling['guidance'])}, one sample per prompt, not selected."
    )
    report = Report(
        title=title,
        summary=summary,
        figures=_make_figures(evaluation.metrics, minutes),
        samples=_make_samples(evaluation),
        reconstructions=_make_reconstructions(evaluation),
        charts=_make_charts(source),
        metrics=evaluation.metrics,
        config=config_json.to_json(pipeline.config) if config is None else config,
        commands=_make_commands(pipeline, source),
    )
    write_report(path, report)


def write_autoencoder_report(path: str | Path, run: Run, evaluation: EvaluationResult) -> None:
    """Write the report of a run that trains only an autoencoder."""
    experiment = run.experiment
    count = evaluation.metrics["parameters"]["autoencoder"]
    report = Report(
        title=f"{experiment.name}: the autoencoder",
        summary=f"{count / 1e6:.2f} million parameters, created by: {run.command} (seed {experiment.seed}).",
        figures=_make_figures(evaluation.metrics, None),
        reconstructions=_make_reconstructions(evaluation),
        charts=_make_charts(run.folder),
        metrics=evaluation.metrics,
        config=config_json.to_json(experiment),
    )
    write_report(path, report)


def _format_guidance(scales: float | Sequence[float]) -> str:
    """Return the guidance scale as text, or those of two experts."""
    return " and ".join(f"{scale:g}" for scale in (scales if isinstance(scales, Sequence) else (scales,)))


def _make_reconstructions(evaluation: EvaluationResult) -> tuple[Reconstruction, ...]:
    return tuple(
        Reconstruction(
            original=item.original,
            decoded=item.decoded,
            psnr=item.psnr,
            ssim=item.ssim,
            name=item.name,
            linear=item.linear_decoded,
            linear_psnr=item.linear_psnr,
        )
        for item in evaluation.reconstructions[:_MAX_RECONSTRUCTIONS]
    )


def _make_figures(metrics: Mapping[str, Any], minutes: float | None) -> tuple[Figure, ...]:
    figures = []
    if prompt_following := metrics.get("prompt_following"):
        for name in ("colour", "direction", "shape"):
            rate, unseen = prompt_following["all"][name], prompt_following["never_seen"][name]
            interval = f"95 % interval {rate['low']:.0%} to {rate['high']:.0%}"
            note = f"{interval}; combinations not in training {unseen['rate']:.0%}"
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


def _make_samples(evaluation: EvaluationResult) -> tuple[Sample, ...]:
    """Return all samples, with the judgement of their attributes if there is one."""
    samples, is_seen = evaluation.samples, evaluation.is_trained_caption
    verdicts = [_get_answers(result) for result in evaluation.judgements] or [{}] * len(samples)
    return tuple(
        Sample(clip=clip, prompt=entry["prompt"], seen=seen, note=f"seed {entry['seed']}", verdict=verdict)
        for (entry, clip), seen, verdict in zip(samples, is_seen, verdicts, strict=True)
    )


def _get_answers(result: JudgedSample) -> dict[str, bool]:
    """Return for each attribute of the prompt whether the sample has it."""
    answers = asdict(score(result.description, result.judgement))
    return {name: answer for name, answer in answers.items() if answer is not None}


def _make_charts(folder: Path) -> tuple[Chart, ...]:
    charts = []
    for name, title in (("autoencoder", "Autoencoder"), ("denoiser", "Denoiser")):
        path = folder / name / "metrics.jsonl"
        if path.is_file() and (entries := read_metrics(path)):
            steps = tuple(entry["step"] for entry in entries)
            curve = Curve(name="loss", steps=steps, values=tuple(entry["loss"] for entry in entries))
            charts.append(Chart(title=title, curves=(curve,), note="training loss per step"))
    return tuple(charts)


def _make_commands(pipeline: Pipeline, source: Path) -> tuple[Command, ...]:
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
