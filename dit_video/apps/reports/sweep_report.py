"""Page of a sweep: quality against cost for every guidance scale."""

from pathlib import Path

from dit_video.apps.reports.contents import Chart, Curve, Report
from dit_video.apps.reports.report import write_report
from dit_video.evaluation.comparison import format_value
from dit_video.evaluation.sweep import Sweep


def write_sweep_report(path: str | Path, sweep: Sweep, *, title: str) -> None:
    """Write the page."""
    table = {}
    for number, point in enumerate(sweep.points):
        values = {
            about.label: format_value(about, sweep.comparison.values[name][number])
            for name, about in sweep.comparison.descriptions.items()
        }
        table[f"{point.steps} steps, guidance {point.guidance:g}"] = values | {"seconds": f"{point.seconds:.1f}"}
    report = Report(
        title=title,
        summary="Cost is the number of the denoiser's evaluations for a sample of a solver with one evaluation a step.",
        charts=_make_charts(sweep),
        charts_title="Quality and cost",
        metrics={"points": table},
    )
    write_report(path, report)


def _make_charts(sweep: Sweep) -> tuple[Chart, ...]:
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
