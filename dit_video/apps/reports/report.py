"""Contents of a report, and its page: sections from top to bottom, in one file."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from dit_video.apps.reports.elements import (
    Chart,
    compute_common_scale,
    draw_line_chart,
    embed_clip,
    join_side_by_side,
    render_json,
    render_metrics,
    render_template,
)
from dit_video.apps.reports.run_times import render_run_times
from dit_video.core import files
from dit_video.core.errors import UserError
from dit_video.training.goodput import RunTimes
from dit_video.training.program_report import ProgramReport
from dit_video.video import Clip


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A headline figure."""

    label: str
    """Name of the figure."""
    value: str
    """Formatted value with its unit: `98 %`."""
    note: str = ""
    """Additional information, such as an interval or the number of clips."""
    share: int | float | None = None
    """Figure as a share of its best value, 0..1, drawn as a bar; values outside are clipped."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A generated clip."""

    clip: Clip
    """Clip that was generated."""
    prompt: str | None = None
    """Prompt of the sample; by default the clip's caption."""
    seen: bool | None = None
    """True if the prompt occurred in training; None if that does not apply."""
    verdict: Mapping[str, bool] = field(default_factory=dict)
    """Judgement of each attribute, `{"colour": True}`; empty without a judge."""
    note: str = ""
    """Line of small print, such as the seed."""
    group: str = ""
    """Heading under which the page shows the sample, with others of its length."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """A clip and its reconstruction by the autoencoder.

    Raises:
      UserError: If the two differ in size.
    """

    original: Clip
    """Clip that was encoded."""
    decoded: Clip
    """Reconstruction by the autoencoder."""
    values: Mapping[str, str] = field(default_factory=dict)
    """Values of metrics as text, by label: `{"PSNR": "31.2 dB"}`."""
    name: str = ""
    """Name of the clip; by default the original's caption."""
    linear: Clip | None = None
    """Reconstruction by the best linear autoencoder with as many latent values."""

    def __post_init__(self) -> None:
        for reconstruction in (self.decoded, self.linear):
            if reconstruction is not None and self.original.frames.shape != reconstruction.frames.shape:
                raise UserError(
                    f"a reconstruction of shape {reconstruction.frames.shape} differs from its original's, "
                    f"{self.original.frames.shape} [T H W 3]; compare clips before resizing them"
                )


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command that the reader may copy."""

    text: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that `write_report` shows, from top to bottom; empty parts have no section."""

    title: str
    summary: str = ""
    figures: tuple[Figure, ...] = ()
    samples: tuple[Sample, ...] = ()
    reconstructions: tuple[Reconstruction, ...] = ()
    charts: tuple[Chart, ...] = ()
    charts_title: str = "Training"
    """Heading of the charts."""
    times: RunTimes = field(default_factory=RunTimes)
    """Where the time of the run went."""
    programs: Mapping[str, ProgramReport] = field(default_factory=dict)
    """What each training ran, by its title."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Nested metrics; the leaves are numbers, strings, booleans, `None` or sequences of them."""
    config: Any = None
    """JSON value of the experiment's config, from `config_json.to_json`."""
    commands: tuple[Command, ...] = ()


def write_report(path: str | os.PathLike, report: Report) -> None:
    """Write `report` as one self-contained HTML file, atomically: without network, with clips, style and script inside.

    Tiny clips are embedded losslessly as animated PNG, larger ones as MP4 (see `elements.embed_clip`).
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
        joined_clips=[join_side_by_side(*(clip for clip in group if clip is not None)) for group in compared],
        compute_common_scale=compute_common_scale,
        embed=embed_clip,
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
