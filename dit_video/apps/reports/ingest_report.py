"""Page of an ingested data set, `REPORT.html`: the outcome for every file, and what the clips are like."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from dit_video.apps.reports.elements import embed_clip, format_value, render_json, render_template
from dit_video.apps.reports.report import Figure
from dit_video.core import rng
from dit_video.core.errors import UserError
from dit_video.core.storage import StoragePath, StoragePathLike, write_text
from dit_video.curation.statistics import compute_caption_statistics, make_clip_histograms
from dit_video.data.clips import ClipInfo, ClipSource
from dit_video.data.ingest.report import IngestReport
from dit_video.tokens import Grid
from dit_video.video import Clip, decode

PAGE = "REPORT.html"

_MAX_CLIPS = 24
"""Number of clips on the page."""
_SHORT_SIDE, _MAX_LONG_SIDE = 144, 320
"""Target length of a picture's shorter side, and maximum length of the longer side, in pixels."""
_MAX_BARS = 12
"""Maximum number of bars of a chart; the last one sums up the rest."""


def write_ingest_report(folder: StoragePathLike) -> StoragePath:
    """Write the page of the data set in `folder` into it, as one self-contained file without scripts.

    The pictures are a sample that depends only on the clips: the same data set gives the same bytes.

    Returns:
      The page's path.

    Raises:
      MissingError, UserError: if the folder holds no ingested data set.
    """
    source = ClipSource(folder)
    path = source.folders[0] / PAGE
    page = render(IngestReport.read(source.folders[0]), source)
    write_text(path, page)
    return path


def render(report: IngestReport, source: ClipSource) -> Markup:
    """Return the whole page as HTML."""
    captions = compute_caption_statistics(source.column("captions"))
    unused = {"quarantined": report.quarantined, "dropped": report.dropped, "rejected": report.rejected}
    return render_template(
        "ingest_report.html.jinja",
        report=report,
        title=f"{_format_count(report.usable, 'clip')} from {_format_count(report.files, 'file')}",
        summary=_format_summary(report),
        figures=_make_figures(report),
        outcomes={
            "used": ("used", report.usable_files),
            "quarantined": ("cannot be decoded", len(report.quarantined)),
            "dropped": ("dropped by the screening", len(report.dropped_files)),
            "rejected": ("not valid clips", len(report.rejected)),
        },
        clips=list(_sample_clips(source)),
        histograms=make_clip_histograms(source),
        captions=captions,
        caption_counts=_count_captions(captions),
        unused={kind: pairs for kind, pairs in unused.items() if pairs},
        unlisted=[(name, "") for name in report.unlisted],
        short_side=_SHORT_SIDE,
        max_bars=_MAX_BARS,
        make_bars=_make_bars,
        embed=embed_clip,
        format_count=_format_count,
        format_time=_format_time,
        format_value=format_value,
        render_json=render_json,
    )


def _format_count(number: int, noun: str) -> str:
    return f"{format_value(number)} {noun}{'' if number == 1 else 's'}"


def _format_summary(report: IngestReport) -> str:
    splits = ", ".join(f"{format_value(count)} {split}" for split, count in report.splits.items())
    methods = {"whole": "are whole files", "copy": "were cut without encoding", "encode": "were re-encoded"}
    counts = [
        f"{_format_count(report.methods[key], 'clip')} {text}" for key, text in methods.items() if key in report.methods
    ]
    storage = ", ".join(counts)
    return (
        f"Format: {report.format}. Splits: {splits}. {storage}. Sizes are as displayed, upright with square pixels. "
        "The outcome for every file is below."
    )


def _make_figures(report: IngestReport) -> list[Figure]:
    captioned, unused = report.usable - report.uncaptioned, report.files - report.usable_files
    mean_time = _format_time(report.seconds / max(report.usable, 1))
    mean_bytes = _format_bytes(report.bytes // max(report.usable, 1))
    return [
        Figure(label="Clips", value=format_value(report.usable), note=f"{format_value(report.frames)} frames"),
        Figure(label="Duration", value=_format_time(report.seconds), note=f"{mean_time} on average"),
        Figure(label="Bytes", value=_format_bytes(report.bytes), note=f"{mean_bytes} per clip"),
        _make_share("Files used", report.usable_files, report.files, note=f"{format_value(unused)} not used"),
        _make_share("Captioned", captioned, report.usable, note=f"{format_value(report.uncaptioned)} without"),
    ]


def _make_share(label: str, part: int, whole: int, *, note: str) -> Figure:
    """Return a percentage, rounded down to one decimal, so that only a complete part gives 100 %."""
    if not whole:
        return Figure(label=label, value="–", note=note)
    percent = math.floor(1000 * part / whole) / 10 if part < whole else 100
    return Figure(label=label, value=f"{percent:g} %", note=note, share=part / whole)


def _format_time(seconds: float | int) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.3g} h"
    return f"{seconds / 60:.3g} min" if seconds >= 120 else f"{seconds:.3g} s"


def _format_bytes(count: float | int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count = count / 1000
    return f"{count:.3g} TB"


def _sample_clips(source: ClipSource) -> Iterator[tuple[ClipInfo, Clip]]:
    """Yield a sample of clips with their middle frames, in the order of the data set."""
    total = len(source)
    indices = rng.make_generator(0, "report pictures").choice(total, min(_MAX_CLIPS, total), replace=False)
    for index in sorted(indices.tolist()):
        info = source.infos[index]
        scale = min(_SHORT_SIDE / min(info.height, info.width), _MAX_LONG_SIDE / max(info.height, info.width))
        size = Grid(1, max(1, round(info.height * scale)), max(1, round(info.width * scale)))
        try:
            yield info, decode(source[index], size=size, start=info.seconds / 2)
        except UserError:
            continue  # the page shows the other clips; decoding errors are reported by ingest


def _make_bars(counts: Mapping[str | int, int]) -> list[tuple[str | int, int, float]]:
    """Return name, count and length in percent of each bar of a chart, in the order of `counts`."""
    bars: list[tuple[str | int, int]] = list(counts.items())
    if len(bars) > _MAX_BARS:
        rest = sum(count for _, count in bars[_MAX_BARS - 1 :])
        bars = [*bars[: _MAX_BARS - 1], (f"{format_value(len(bars) - _MAX_BARS + 1)} others", rest)]
    largest = max((count for _, count in bars), default=1) or 1
    return [(name, count, 100 * count / largest) for name, count in bars]


def _count_captions(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of the captions' counts; empty without captions."""
    if not statistics.get("captions"):
        return {}
    counts = {
        "captions": statistics["captions"],
        "distinct captions": statistics["distinct"],
        "distinct words": statistics["vocabulary"],
    }
    for name in ("words", "characters"):
        values = statistics[name]
        counts[f"{name} per caption, median"] = values["median"]
        counts[f"{name} per caption, range"] = [values["least"], values["most"]]
    return counts
