"""Page of an evaluation by a protocol: table, samples, best and worst ones by metric, real clips beside."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_video.apps.reports.elements import Chart, Curve, join_side_by_side
from dit_video.apps.reports.report import Figure, Reconstruction, Report, Sample, write_report
from dit_video.core.errors import DecodeError, UserError
from dit_video.core.registry import get_class_name
from dit_video.evaluation.clip_set import ClipSet
from dit_video.evaluation.collection import MetricResult
from dit_video.evaluation.measure import EvaluationResult
from dit_video.evaluation.metrics.likelihood import LOSS_PREFIX, LossByTime
from dit_video.evaluation.metrics.metric import MetricDescription
from dit_video.evaluation.protocol import EvaluationProtocol
from dit_video.video import Clip

_SAMPLES, _EXTREMES, _RECONSTRUCTIONS = 8, 2, 6
"""Numbers of samples, of best and worst samples by each metric, and of reconstructions on the page."""


def write_evaluation_report(path: str | Path, result: EvaluationResult, *, title: str) -> None:
    """Write the page of a result to an HTML file."""
    record, protocol, real_clips = result.record, result.protocol, result.real_clips
    reader = _Reader(result.samples, protocol)
    tables = {
        "results": make_result_table(result.results),
        "not computed": result.skipped,
        "excluded clips": record["excluded"],
    }
    measured = f"{record['samples']} clips of {result.samples.location}"
    if not record["samples"] and real_clips is not None:
        measured = f"{record['real_clips']} clips of {real_clips.location}, no samples"
    are_pairs = protocol.is_reconstruction
    report = Report(
        title=title,
        summary=f"Protocol {protocol.name}, {measured}.",
        figures=make_headline_figures(result.results),
        samples=() if are_pairs else _make_samples(reader, result, real_clips),
        reconstructions=_make_reconstructions(reader, result, real_clips) if are_pairs else (),
        charts=_make_charts(result),
        charts_title="Loss by time",
        metrics={name: table for name, table in tables.items() if table},
        config=record["protocol"],
    )
    write_report(path, report)


class _Reader:
    """Clips of a set as the protocol samples them, by number or name."""

    def __init__(self, clips: ClipSet, protocol: EvaluationProtocol):
        self.clips, self.protocol = clips, protocol
        self.numbers = {name: number for number, name in enumerate(clips.names)}

    def read(self, number: int) -> Clip | None:
        sampling = self.protocol.clips
        try:
            clip = self.clips.read(number, sampling.fps)
            return sampling.sample(clip, seed=self.protocol.seed, number=number)
        except (DecodeError, UserError, OSError):
            return None  # it is named among the excluded clips


def _make_samples(reader: _Reader, result: EvaluationResult, real_clips: ClipSet | None) -> tuple[Sample, ...]:
    """Return the first samples, then the best and worst by metric, then clips of the data."""
    remarks: dict[str, str] = dict.fromkeys(list(result.record["examples"])[:_SAMPLES], "")
    for name, _, about in _list_extremes(result, result.record["examples"]):
        remarks[name] = " · ".join(filter(None, (remarks.get(name, ""), about)))
    samples = []
    for name, remark in remarks.items():
        if (clip := reader.read(reader.numbers[name])) is not None:
            values = result.record["examples"].get(name, {})
            verdict = {
                result.results[key].description.label: value
                for key, value in values.items()
                if isinstance(value, bool) and result.results[key].description.is_higher_better
            }
            prompt = clip.caption or name
            group = "Best and worst" if remark else "Samples"
            samples.append(Sample(clip=clip, prompt=prompt, note=remark or name, verdict=verdict, group=group))
    if real_clips is not None:
        real = _Reader(real_clips, reader.protocol)
        samples += _make_nearest(reader, real, result)
        samples += _make_real_samples(real, result)
    return tuple(samples)


def _make_real_samples(real: "_Reader", result: EvaluationResult) -> list[Sample]:
    """Return the first clips of the data, then the best and worst of those that have values of their own."""
    remarks: dict[str, str] = dict.fromkeys(real.clips.names[:_SAMPLES], "")
    for name, _, about in _list_extremes(result, result.record["clips"]):
        remarks[name] = " · ".join(filter(None, (remarks.get(name, ""), about)))
    samples = []
    for name, remark in remarks.items():
        if (clip := real.read(real.numbers[name])) is not None:
            samples.append(Sample(clip=clip, prompt=clip.caption or name, note=remark, group="Clips of the data"))
    return samples


def _make_charts(result: EvaluationResult) -> tuple[Chart, ...]:
    """Return the chart of the denoiser's loss by time, with the bounds of its intervals, if it was measured."""
    losses = {
        float(name.removeprefix(LOSS_PREFIX)): each.estimate
        for name, each in result.results.items()
        if each.metric == get_class_name(LossByTime) and name.startswith(LOSS_PREFIX)
    }
    known = {time: each for time, each in losses.items() if each.value is not None}
    if not known:
        return ()
    curves = [Curve(name="mean", steps=tuple(known), values=tuple(each.value or 0.0 for each in known.values()))]
    if all(each.interval is not None for each in known.values()):
        for number, name in enumerate(("lower bound", "upper bound")):
            bounds = tuple(each.interval[number] for each in known.values() if each.interval is not None)
            curves.append(Curve(name=name, steps=tuple(known), values=bounds))
    note = "with its 95 % interval; time 0 is data, 1 is noise"
    return (Chart(title="denoising loss", curves=tuple(curves), note=note, axis="time"),)


def _make_nearest(reader: _Reader, real: _Reader, result: EvaluationResult) -> list[Sample]:
    """Return samples with the nearest clips of the data on their right: memorised ones first."""
    nearest: Mapping[str, str] = result.record["nearest"]
    order = sorted(nearest, key=lambda name: not result.record["examples"].get(name, {}).get("memorised"))
    samples = []
    for name in order[:_SAMPLES]:
        sample, other = reader.read(reader.numbers[name]), real.read(real.numbers[nearest[name]])
        if sample is not None and other is not None:
            note = f"{name}, on its right {nearest[name]}"
            group = "Samples and the nearest clips of the data"
            samples.append(Sample(clip=_join(sample, other), prompt=sample.caption or name, note=note, group=group))
    return samples


def _join(first: Clip, second: Clip) -> Clip:
    """Return both clips next to each other, as long as the shorter one."""
    frames, height = min(len(first.frames), len(second.frames)), max(first.height, second.height)
    padded = [
        replace(each, frames=np.pad(each.frames[:frames], ((0, 0), (0, height - each.height), (0, 0), (0, 0))))
        for each in (first, second)
    ]
    return join_side_by_side(*padded)[0]


def _list_extremes(result: EvaluationResult, examples: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, float, str]]:
    """Return the best and worst examples by each metric of single ones: names, values and remarks."""
    extremes = []
    for metric, (_, about, _) in result.results.items():
        values = {
            name: float(row[metric])
            for name, row in examples.items()
            if metric in row and not isinstance(row[metric], bool)
        }
        if about.is_higher_better is None or len(values) < 2 * _EXTREMES:
            continue
        order = sorted(values, key=lambda name: values[name], reverse=about.is_higher_better)
        for word, names in (("best", order[:_EXTREMES]), ("worst", order[-_EXTREMES:])):
            extremes += [(name, values[name], _describe(word, about, values[name])) for name in names]
    return extremes


def _describe(word: str, about: MetricDescription, value: float) -> str:
    return f"{word} {about.label}: {about.format_value(value)}"


def _make_reconstructions(
    reader: _Reader, result: EvaluationResult, originals: ClipSet | None
) -> tuple[Reconstruction, ...]:
    """Return the first clips, and the best and worst by each metric, with their reconstructions."""
    assert originals is not None  # reconstructions are of clips of the data
    real = _Reader(originals, reader.protocol)
    extremes = {name: about for name, _, about in _list_extremes(result, result.record["examples"])}
    names = dict.fromkeys([*list(result.record["examples"])[:_RECONSTRUCTIONS], *extremes])
    pairs: list[Reconstruction] = []
    for name in names:
        number = reader.numbers[name]
        original, decoded = real.read(real.numbers.get(name, number)), reader.read(number)
        if original is None or decoded is None:
            continue
        values = format_values(result.record["examples"].get(name, {}), result.results)
        label = f"{name} · {extremes[name]}" if name in extremes else name
        pairs.append(Reconstruction(original=original, decoded=decoded, values=values, name=label))
    return tuple(pairs)


def make_result_table(results: Mapping[str, MetricResult]) -> dict[str, dict[str, Any]]:
    """Return a row for every value of a metric."""
    return {
        name: {
            "value": None if estimate.value is None else about.format_value(estimate.value, is_precise=True),
            "95 % interval": about.format_interval(estimate, is_precise=True) or None,
            "count": estimate.count,
            "better": {True: "higher", False: "lower", None: None}[about.is_higher_better],
            "meaning": ": ".join(filter(None, (about.label, about.explanation))),
            "note": estimate.note or None,
        }
        for name, (_, about, estimate) in results.items()
    }


def make_headline_figures(results: Mapping[str, MetricResult]) -> tuple[Figure, ...]:
    """Return the headline values of metrics with their intervals and counts; shares are drawn as bars."""
    figures = []
    for _, about, estimate in results.values():
        if not about.is_headline or estimate.value is None:
            continue
        interval = f"95 % interval {about.format_interval(estimate)}" if estimate.interval else ""
        note = "; ".join(filter(None, (interval, f"{estimate.count} examples", estimate.note, about.explanation)))
        share = estimate.value if about.unit == "%" else None
        figures.append(Figure(label=about.label, value=about.format_value(estimate.value), note=note, share=share))
    return tuple(figures)


def format_values(values: Mapping[str, float], results: Mapping[str, MetricResult]) -> dict[str, str]:
    """Return the values of an example as text, by label."""
    descriptions = {name: results[name].description for name in values}
    return {descriptions[name].label: descriptions[name].format_value(value) for name, value in values.items()}
