"""Report page: sections from top to bottom, in one file."""

import os
from collections.abc import Iterator, Sequence

from markupsafe import Markup

from dit_video.apps.reports import clips
from dit_video.apps.reports.charts import draw_line_chart
from dit_video.apps.reports.contents import Report, Sample
from dit_video.apps.reports.run_times import render_run_times
from dit_video.apps.reports.tables import render_json, render_metrics
from dit_video.apps.reports.template import render_template
from dit_video.core import files


def write_report(path: str | os.PathLike, report: Report) -> None:
    """Write `report` as one self-contained HTML file, atomically: without network, with clips, style and script inside.

    Tiny clips are embedded losslessly as animated PNG, larger ones as MP4 (see `clips.embed`).
    """
    files.write_text(path, render(report))


def render(report: Report) -> Markup:
    """Return the whole page as HTML."""
    compared = [(item.original, item.decoded, item.linear) for item in report.reconstructions]
    return render_template(
        "report.html.jinja",
        report=report,
        sample_groups=_group_by_length(report.samples),
        filters=_list_filters(report.samples),
        joined_clips=[clips.join_side_by_side(*(clip for clip in group if clip is not None)) for group in compared],
        compute_common_scale=clips.compute_common_scale,
        embed=clips.embed,
        draw_line_chart=draw_line_chart,
        render_run_times=render_run_times,
        render_metrics=render_metrics,
        render_json=render_json,
    )


def _group_by_length(samples: Sequence[Sample]) -> Iterator[tuple[str, str, list[Sample]]]:
    """Yield (name, count, samples) by group and length, longest first; samples are sorted by size, else in order."""
    keys = dict.fromkeys((sample.group, len(sample.clip.frames)) for sample in samples)
    groups = list(dict.fromkeys(name for name, _ in keys))
    for name, frames in sorted(keys, key=lambda key: (groups.index(key[0]), -key[1])):
        group = [sample for sample in samples if (sample.group, len(sample.clip.frames)) == (name, frames)]
        group.sort(key=lambda sample: (sample.clip.height, sample.clip.width))
        length, count = ("images", "") if frames == 1 else (f"{frames} frames", f" · {_format_durations(group)}")
        title = f"{name}, {length}" if name else length[0].upper() + length[1:]
        yield title, f"{len(group)}{count}", group


def _format_durations(samples: Sequence[Sample]) -> str:
    durations = sorted({f"{sample.clip.duration:.2g} s" for sample in samples})
    return durations[0] if len(durations) == 1 else f"{durations[0]} to {durations[-1]}"


def _list_filters(samples: Sequence[Sample]) -> list[tuple[str, str, int]]:
    """Return name, label and size of the subsets of samples that can be shown: all, and those that are not empty."""
    unseen = sum(sample.seen is False for sample in samples)
    wrong = sum(not all(sample.verdict.values()) for sample in samples)
    subsets = [("unseen", "Not in training", unseen), ("wrong", "Judged wrong", wrong)]
    return [("all", "All", len(samples)), *(subset for subset in subsets if subset[2])]
