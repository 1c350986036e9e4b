"""Page of a comparison of evaluations: a table, and curves over the steps of a training."""

from pathlib import Path

from dit_video.apps.reports.contents import Chart, Curve, Report
from dit_video.apps.reports.report import write_report
from dit_video.evaluation.comparison import Comparison, format_value


def write_comparison_report(path: str | Path, comparison: Comparison) -> None:
    """Write the page."""
    table: dict[str, dict[str, str | None]] = {}
    for name, about in comparison.descriptions.items():
        best = comparison.find_best(name)
        cells = zip(comparison.names, comparison.values[name], strict=True)
        row: dict[str, str | None] = {
            system: format_value(about, each) + (" (best)" if number in best else "")
            for number, (system, each) in enumerate(cells)
        }
        table[about.label] = row | {"better": {True: "higher", False: "lower", None: None}[about.is_higher_better]}
    left_out = f" Not of all: {', '.join(comparison.left_out)}." if comparison.left_out else ""
    report = Report(
        title=f"Comparison of {len(comparison.names)} evaluations",
        summary=f"By one protocol. Best: no other value is better beyond both 95 % intervals.{left_out}",
        charts=_make_charts(comparison),
        metrics={"values": table},
    )
    write_report(path, report)


def _make_charts(comparison: Comparison) -> tuple[Chart, ...]:
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
