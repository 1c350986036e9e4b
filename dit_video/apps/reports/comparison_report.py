"""Pages that compare evaluations: of several systems or steps, and of the points of a sweep."""

from pathlib import Path

from dit_video.apps.reports.elements import Chart, Curve
from dit_video.apps.reports.report import Report, write_report
from dit_video.evaluation.comparison import Comparison
from dit_video.evaluation.sweep import Sweep


def write_comparison_report(path: str | Path, comparison: Comparison) -> None:
    """Write the page."""
    table: dict[str, dict[str, str | None]] = {}
    for name, about in comparison.descriptions.items():
        best = comparison.find_best(name)
        cells = zip(comparison.names, comparison.values[name], strict=True)
        row: dict[str, str | None] = {
            system: about.format_estimate(each) + (" (best)" if number in best else "")
            for number, (system, each) in enumerate(cells)
        }
        table[about.label] = row | {"better": {True: "higher", False: "lower", None: None}[about.is_higher_better]}
    left_out = f" Not of all: {', '.join(comparison.left_out)}." if comparison.left_out else ""
    report = Report(
        title=f"Comparison of {len(comparison.names)} evaluations",
        summary=f"By one protocol. Best: no other value is better beyond both 95 % intervals.{left_out}",
        charts=_make_step_charts(comparison),
        metrics={"values": table},
    )
    write_report(path, report)


def _make_step_charts(comparison: Comparison) -> tuple[Chart, ...]:
    """Return a curve over steps for every headline value, if the evaluations are of several steps."""
    if comparison.steps is None:
        return ()
    charts = []
    for name, about in comparison.descriptions.items():
        points = [
            (step, each.value)
            for step, each in sorted(zip(comparison.steps, comparison.values[name], strict=True))
            if each.value is not None
        ]
        if about.is_headline and len(points) > 1:
            steps, values = zip(*points, strict=True)
            curve = Curve(name=about.label, steps=steps, values=values)
            charts.append(Chart(title=about.label, curves=(curve,), note=f"{about.explanation}, by training step"))
    return tuple(charts)


def write_sweep_report(path: str | Path, sweep: Sweep, *, title: str) -> None:
    """Write the page."""
    table = {}
    for number, point in enumerate(sweep.points):
        values = {
            about.label: about.format_estimate(sweep.comparison.values[name][number])
            for name, about in sweep.comparison.descriptions.items()
        }
        seconds = "unknown" if point.seconds is None else f"{point.seconds:.1f}"
        table[f"{point.steps} steps, guidance {point.guidance:g}"] = values | {"seconds": seconds}
    report = Report(
        title=title,
        summary="Cost is the number of the denoiser's evaluations for a sample of a solver with one evaluation a step.",
        charts=_make_cost_charts(sweep),
        charts_title="Quality and cost",
        metrics={"points": table},
    )
    write_report(path, report)


def _make_cost_charts(sweep: Sweep) -> tuple[Chart, ...]:
    charts = []
    for name, about in sweep.comparison.descriptions.items():
        if not about.is_headline:
            continue
        curves = []
        for scale in dict.fromkeys(point.guidance for point in sweep.points):
            known = sorted(
                (point.steps * (1 if scale == 1 else 2), each.value)
                for point, each in zip(sweep.points, sweep.comparison.values[name], strict=True)
                if point.guidance == scale and each.value is not None
            )
            if known:
                costs, values = zip(*known, strict=True)
                curves.append(Curve(name=f"guidance {scale:g}", steps=costs, values=values))
        better = {True: "higher is better", False: "lower is better", None: ""}[about.is_higher_better]
        note = ", ".join(filter(None, ("by the denoiser's evaluations for a sample", better)))
        charts.append(Chart(title=about.label, curves=tuple(curves), note=note, axis="evaluations"))
    return tuple(charts)
