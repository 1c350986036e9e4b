"""Charts of a training's log: losses, loss by diffusion time, throughput, evaluations and all other values."""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from markupsafe import Markup

from dit_video.apps.reports.elements import Chart, Curve, draw_line_chart
from dit_video.apps.run_page.run_files import Entry
from dit_video.apps.run_page.run_state import TrainingState

_TIMES = re.compile(r"(validation_)?loss_t([0-9.]+)-([0-9.]+)")
"""Name of the loss in an interval of diffusion times."""
_THROUGHPUT = {
    "tokens_per_second": ("Tokens per second", 1.0, "without padding"),
    "steps_per_second": ("Steps per second", 1.0, "without compilation of the first step, saving and monitoring"),
    "mfu": ("Model FLOPs utilization, %", 100.0, "share of the devices' peak"),
    "data_wait": ("Waiting for data, %", 100.0, "share of the steps' time, an upper bound"),
}
"""Title, scale and note of the charts of throughput, by the name of the value."""
_OWN_CHARTS = ("loss", "validation_loss", "step_seconds", "model_flops_per_second", "evaluation_step")
"""Names of values that the page shows otherwise."""
_MAX_OTHERS = 40
"""Maximum number of charts of other values."""
_MAX_POINTS = 1500
"""Number of points of a curve from which neighbouring ones are averaged, as a chart cannot show more."""
_PROFILE_ENTRIES = 20
"""Number of entries over which the profile over diffusion times is averaged."""


@dataclass(frozen=True, kw_only=True)
class DrawnChart:
    """A chart as an element of the page."""

    key: str
    """Text that no other chart of its training has, for the element's id."""
    title: str
    svg: Markup
    note: str = ""


def draw_losses(training: TrainingState) -> list[DrawnChart]:
    """Return charts of the loss of training and validation over steps and hours, and of the loss by diffusion time."""
    entries, names = training.entries, {"loss": "training", "validation_loss": "validation"}
    curves = _make_curves(_add_hours(entries), names, axis="hours")
    charts = [
        _draw("loss", "Loss", _make_curves(entries, names)),
        _draw("hours", "Loss over hours", curves, "since the first entry, with interruptions", axis="hours"),
    ]
    for prefix, title in (("", "Loss by diffusion time"), ("validation_", "Validation loss by diffusion time")):
        names = {name: f"{low:g} to {high:g}" for name, (low, high) in _find_intervals(entries, prefix).items()}
        note = "curves by interval of diffusion times, from 0 (data) to 1 (noise)"
        charts.append(_draw(f"{prefix}times", title, _make_curves(entries, names), note))
    charts.append(_draw_profile(entries))
    return [chart for chart in charts if chart is not None]


def draw_throughput(training: TrainingState) -> list[DrawnChart]:
    """Return charts of the speed of training."""
    charts = (
        _draw(name, title, _make_curves(training.entries, {name: title.rpartition(",")[0] or title}, scale), note)
        for name, (title, scale, note) in _THROUGHPUT.items()
    )
    return [chart for chart in charts if chart is not None]


def draw_evaluations(training: TrainingState) -> list[DrawnChart]:
    """Return a chart for each metric of the evaluations during training."""
    charts = []
    for label, pairs in training.evaluations.items():
        steps, values = zip(*pairs, strict=True)
        charts.append(_draw(f"evaluation-{label}", label, [Curve(name=label, steps=steps, values=values)]))
    return [chart for chart in charts if chart is not None]


def draw_others(training: TrainingState) -> list[DrawnChart]:
    """Return a chart for each logged value that no other chart shows."""
    names = [name for name in _list_names(training.entries) if not _is_shown(name)]
    charts = (
        _draw(f"other-{name}", name, _make_curves(training.entries, {name: name})) for name in names[:_MAX_OTHERS]
    )
    return [chart for chart in charts if chart is not None]


def _is_shown(name: str) -> bool:
    is_known = name.endswith("_seconds") or name.startswith("program_") or name == "step"
    return is_known or name in _OWN_CHARTS or name in _THROUGHPUT or _TIMES.fullmatch(name) is not None


def _draw(key: str, title: str, curves: Sequence[Curve], note: str = "", *, axis: str = "step") -> DrawnChart | None:
    if not curves:
        return None
    svg = draw_line_chart(Chart(title=title, curves=tuple(curves), axis=axis))
    return DrawnChart(key=key, title=title, svg=svg, note=note)


def _add_hours(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries that have a time of day, with the hours since the first of them."""
    timed = [entry for entry in entries if math.isfinite(entry.get("unix_seconds", math.nan))]
    return [{**entry, "hours": (entry["unix_seconds"] - timed[0]["unix_seconds"]) / 3600} for entry in timed]


def _make_curves(
    entries: Sequence[Entry], names: dict[str, str], scale: float = 1.0, *, axis: str = "step"
) -> list[Curve]:
    """Return the curves of the named values that any entry has, with other names, over the value `axis`."""
    curves = []
    for name, title in names.items():
        pairs = np.array([(entry[axis], entry[name]) for entry in entries if name in entry], np.float64)
        if len(pairs):
            steps, values = _average_neighbours(pairs).T.tolist()
            curves.append(Curve(name=title, steps=tuple(steps), values=tuple(scale * value for value in values)))
    return curves


def _average_neighbours(pairs: Float64[np.ndarray, "n 2"]) -> Float64[np.ndarray, "m 2"]:
    """Return at most `_MAX_POINTS` means of neighbouring pairs of step and value; NaN where no value is finite."""
    if len(pairs) <= _MAX_POINTS:
        return pairs
    starts = np.linspace(0, len(pairs), _MAX_POINTS, endpoint=False).astype(int)
    finite = np.isfinite(pairs[:, 1])
    counts = np.add.reduceat(finite.astype(np.float64), starts)
    totals = np.add.reduceat(np.where(finite, pairs[:, 1], 0.0), starts)
    steps = np.add.reduceat(pairs[:, 0], starts) / np.diff([*starts, len(pairs)])
    return np.stack([steps, np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)], axis=1)


def _list_names(entries: Iterable[Entry]) -> list[str]:
    """Return the names of all values, in the order in which they appear."""
    return list(dict.fromkeys(itertools.chain.from_iterable(entries)))


def _find_intervals(entries: Iterable[Entry], prefix: str) -> dict[str, tuple[float, float]]:
    """Return the intervals of diffusion times with a logged loss, by the name of the value, in order."""
    names = {name: match for name in _list_names(entries) if (match := _TIMES.fullmatch(name))}
    intervals = {}
    for name, match in names.items():
        try:
            low, high = float(match[2]), float(match[3])
        except ValueError:
            continue
        if (match[1] or "") == prefix and low < high:
            intervals[name] = low, high
    return dict(sorted(intervals.items(), key=lambda item: item[1]))


def _draw_profile(entries: Sequence[Entry]) -> DrawnChart | None:
    """Return a chart of the newest losses over diffusion times."""
    curves = []
    for prefix, title, count in (("", "training", _PROFILE_ENTRIES), ("validation_", "validation", 1)):
        intervals = _find_intervals(entries, prefix)
        points = []
        for name, (low, high) in intervals.items():
            finite = (entry[name] for entry in reversed(entries) if math.isfinite(entry.get(name, math.nan)))
            values = list(itertools.islice(finite, count))
            if values:
                points.append(((low + high) / 2, float(np.mean(values))))
        if len(points) > 1:
            times, means = zip(*points, strict=True)
            curves.append(Curve(name=title, steps=times, values=means))
    if not curves:
        return None
    note = f"mean of the newest {_PROFILE_ENTRIES} entries of training, and the newest validation"
    axis = "diffusion time, 0 = data, 1 = noise"
    return _draw("profile", "Newest loss over diffusion time", curves, note, axis=axis)
