"""Values of metrics as text, as figures and as a table of a page."""

from collections.abc import Mapping
from typing import Any

from dit_video.apps.reports.contents import Figure
from dit_video.evaluation.collection import MetricResult


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
