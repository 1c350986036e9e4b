"""Page of an ingested data set, `REPORT.html`: the outcome for every file, and what the clips are like."""

import importlib.resources
import math
from collections.abc import Iterator, Mapping, Sequence

from dit_video.core import rng
from dit_video.core.errors import UserError
from dit_video.core.storage import StoragePath, StoragePathLike, write_text
from dit_video.data.clips import ClipInfo, ClipSource
from dit_video.data.ingest import IngestReport
from dit_video.reports import clips
from dit_video.reports.markup import Markup, element, join
from dit_video.reports.tables import format_value, render_json
from dit_video.tokens import Grid
from dit_video.video import Clip, decode

PAGE = "REPORT.html"

_MAX_CLIPS = 24
"""Number of clips on the page."""
_SHORT_SIDE, _MAX_LONG_SIDE = 144, 320
"""Target length of a picture's shorter side, and maximum length of the longer side, in pixels."""
_MAX_BARS = 12
"""Maximum number of bars of a chart; the last one sums up the rest."""
_MAX_NAMES = 200
"""Maximum number of names in a list; `report.json` has all."""
_MAX_CAPTION_CHARACTERS = 140
"""Maximum number of characters of a caption."""

_STYLE = Markup("""
.bars { width: 100%; font-size: 0.86rem; }
.bars th { width: 1%; color: var(--text); max-width: 16rem; overflow: hidden; text-overflow: ellipsis; }
.bars td { border-bottom: 0; padding-top: 0.22rem; padding-bottom: 0.22rem; }
.bars th { border-bottom: 0; padding-top: 0.22rem; padding-bottom: 0.22rem; }
.bars td.number { width: 1%; text-align: right; color: var(--muted); padding-right: 0; }
.bar { display: block; height: 0.75rem; border-radius: 3px; background: var(--c0); min-width: 2px; }
.outcome { display: flex; height: 1.1rem; border-radius: 6px; overflow: hidden; margin: 0 0 0.9rem; gap: 2px; }
.outcome span { min-width: 3px; }
.used { background: var(--good); } .quarantined { background: var(--bad); }
.dropped { background: var(--c1); } .rejected { background: var(--c5); }
.outcomes { list-style: none; display: flex; flex-wrap: wrap; gap: 0.3rem 1.6rem; margin: 0; padding: 0; }
.outcomes i { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 2px; margin-right: 0.45em; }
.names { font-size: 0.84rem; max-height: 24rem; overflow: auto; padding-left: 1.2rem; overflow-wrap: anywhere; }
.names span { color: var(--muted); }
.panel h3 .count { float: right; }
""")

_OUTCOMES = {
    "used": "used",
    "quarantined": "cannot be decoded",
    "dropped": "dropped by the screening",
    "rejected": "not valid clips",
}


def write_ingest_report(folder: StoragePathLike) -> StoragePath:
    """Write the page of the data set in `folder` into it, as one self-contained file without scripts.

    The pictures are a sample that depends only on the clips: the same data set gives the same bytes.

    Returns:
      The page's path.

    Raises:
      MissingError, UserError: the folder holds no ingested data set.
    """
    source = ClipSource(folder)
    path = source.folders[0] / PAGE
    page = render(IngestReport.read(source.folders[0]), source)
    write_text(path, page)
    return path


def render(report: IngestReport, source: ClipSource) -> Markup:
    """Return the whole page as HTML."""
    title = f"{_format_count(report.usable, 'clip')} from {_format_count(report.files, 'file')}"
    sections = [
        section
        for section in (
            _render_files(report),
            _render_clips(source),
            _render_charts(report),
            _render_captions(report),
            _render_unused(report),
            ("settings", "Settings", render_json(dict(report.settings))),
        )
        if section[2]
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element(
            "style", Markup(importlib.resources.files("dit_video.reports").joinpath("page.css").read_text("utf-8"))
        ),
        element("style", _STYLE),
    )
    links = [element("a", name, href=f"#{anchor}") for anchor, name, _ in sections]
    header = element(
        "header", element("h1", title), element("p", _format_summary(report), class_="summary"), _render_tiles(report)
    )
    body = element(
        "body",
        element("nav", element("div", *links, class_="links"), aria_label="Page"),
        element(
            "main",
            header,
            *(element("section", element("h2", name), content, id=anchor) for anchor, name, content in sections),
        ),
    )
    return join(Markup("<!doctype html>\n"), element("html", head, body, lang="en"), Markup("\n"))


IngestSection = tuple[str, str, Markup]
"""Anchor, name and content of a section, which is not shown without content."""


def _format_count(number: int, noun: str) -> str:
    return f"{format_value(number)} {noun}{'' if number == 1 else 's'}"


def _format_summary(report: IngestReport) -> str:
    splits = ", ".join(f"{format_value(count)} {split}" for split, count in report.splits.items())
    storage = "All files keep their original bytes"
    if report.reencoded:
        sizes = f"{_format_bytes(report.reencoded_from)} became {_format_bytes(report.reencoded_to)}"
        storage = (
            f"{_format_count(report.reencoded, 'file')} of {format_value(report.usable_files)} re-encoded on "
            f"request: {sizes}"
        )
    return (
        f"Format: {report.format}. Splits: {splits}. {storage}. Sizes are as displayed, upright with square pixels. "
        "The outcome for every file is below."
    )


def _render_tiles(report: IngestReport) -> Markup:
    captioned = report.usable - report.uncaptioned
    unused = report.files - report.usable_files
    figures = [
        ("Clips", format_value(report.usable), f"{format_value(report.frames)} frames", None),
        (
            "Duration",
            _format_time(report.seconds),
            f"{_format_time(report.seconds / max(report.usable, 1))} on average",
            None,
        ),
        (
            "Bytes",
            _format_bytes(report.bytes),
            f"{_format_bytes(report.bytes // max(report.usable_files, 1))} per file",
            None,
        ),
        (
            "Files used",
            _format_percent(report.usable_files, report.files),
            f"{format_value(unused)} not used",
            report.files - unused,
        ),
        (
            "Captioned",
            _format_percent(captioned, report.usable),
            f"{format_value(report.uncaptioned)} without",
            captioned,
        ),
    ]
    totals = (None, None, None, report.files, report.usable)
    tiles = []
    for (label, value, note, part), total in zip(figures, totals, strict=True):
        bar = None
        if part is not None and total:
            bar_fill = element("span", style=f"width:{100 * part / total:.1f}%")
            bar = element("span", bar_fill, class_="share", aria_hidden="true")
        definition = element("dd", element("span", value, class_="value"), bar, element("span", note, class_="note"))
        tiles.append(element("div", element("dt", label), definition, class_="tile"))
    return element("dl", *tiles, class_="figures")


def _format_percent(part: int, whole: int) -> str:
    """Return the percentage rounded down to one decimal, so that only a complete part gives 100 %."""
    return f"{math.floor(1000 * part / whole) / 10 if part < whole else 100:g} %" if whole else "–"


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


def _render_files(report: IngestReport) -> IngestSection:
    counts = dict(
        zip(
            _OUTCOMES,
            (report.usable_files, len(report.quarantined), len(report.dropped_files), len(report.rejected)),
            strict=True,
        )
    )
    bars = [
        element("span", class_=kind, style=f"flex-grow:{count}", title=_OUTCOMES[kind])
        for kind, count in counts.items()
        if count
    ]
    legend = [
        element("li", element("i", class_=kind), element("b", format_value(count)), f" {_OUTCOMES[kind]}")
        for kind, count in counts.items()
    ]
    notes = []
    if report.passing:
        explanation = "failed for a transient reason; run the same command with --retry to try again."
        notes.append(element("p", f"{_format_count(len(report.passing), 'file')} {explanation}", class_="muted"))
    if report.unlisted:
        explanation = "in the source, but not in its list."
        notes.append(element("p", f"{_format_count(len(report.unlisted), 'more file')} {explanation}", class_="muted"))
    content = element("div", element("div", *bars, class_="outcome"), element("ul", *legend, class_="outcomes"), *notes)
    return "files", "Files", content


def _render_clips(source: ClipSource) -> IngestSection:
    cards = [_render_card(info, picture) for info, picture in _sample_clips(source)]
    note = element("p", "A random sample; each clip is shown by its middle frame.", class_="muted")
    return "clips", "Clips", join(note, element("div", *cards, class_="grid")) if cards else Markup("")


def _sample_clips(source: ClipSource) -> Iterator[tuple[ClipInfo, Clip]]:
    """Yield a sample of clips with their middle frames, in the order of the data set."""
    total = len(source)
    indices = rng.make_generator(0, "report pictures").choice(total, min(_MAX_CLIPS, total), replace=False)
    for index in sorted(indices.tolist()):
        info = source.infos[index]
        scale = min(_SHORT_SIDE / min(info.height, info.width), _MAX_LONG_SIDE / max(info.height, info.width))
        size = Grid(1, max(1, round(info.height * scale)), max(1, round(info.width * scale)))
        try:
            yield info, decode(source[index], size=size, start=info.start + info.seconds / 2)
        except UserError:
            continue  # the page shows the other clips; decoding errors are reported by ingest


def _render_card(info: ClipInfo, picture: Clip) -> Markup:
    caption = (
        info.caption if len(info.caption) <= _MAX_CAPTION_CHARACTERS else info.caption[:_MAX_CAPTION_CHARACTERS] + "…"
    )
    details = f"{info.height}×{info.width}" + (
        f" · {_format_time(info.seconds + 1 / info.fps)} · {info.fps:.4g} fps" if info.frames > 1 else ""
    )
    caption_count = f" · {len(info.captions)} captions" if len(info.captions) > 1 else ""
    return element(
        "figure",
        element("div", clips.embed(picture, info.name, scale=1), class_="frame"),
        element(
            "figcaption",
            element("span", caption, class_="prompt") if caption else element("span", "no caption", class_="muted"),
            element("span", details + caption_count, class_="small"),
        ),
        class_="card",
        style=f"--w:{max(picture.width, _SHORT_SIDE)}px",
    )


def _render_charts(report: IngestReport) -> IngestSection:
    titles = {
        "shapes": "Shapes",
        "sizes": "Sizes",
        "lengths": "Lengths",
        "rates": "Rates",
        "codecs": "Codecs",
        "frames": "Frames",
    }
    panels = [
        _render_panel(title, report.histograms[name]) for name, title in titles.items() if report.histograms.get(name)
    ]
    return "sizes", "Sizes and lengths", element("div", *panels, class_="panels")


def _render_panel(title: str, counts: Mapping[str, int]) -> Markup:
    """Return a bar chart with a title; bars are in the order of `counts`."""
    kinds = element("span", f"{format_value(len(counts))} values", class_="count") if len(counts) > _MAX_BARS else None
    return element("div", element("h3", title, kinds), _render_bars(counts), class_="panel")


def _render_bars(counts: Mapping[str, int]) -> Markup:
    bars = list(counts.items())
    if len(bars) > _MAX_BARS:
        rest = sum(count for _, count in bars[_MAX_BARS - 1 :])
        bars = [*bars[: _MAX_BARS - 1], (f"{format_value(len(bars) - _MAX_BARS + 1)} others", rest)]
    largest = max((count for _, count in bars), default=1) or 1
    rows = [
        element(
            "tr",
            element("th", name, scope="row", title=name),
            element(
                "td", element("span", class_="bar", style=f"width:{100 * count / largest:.1f}%") if count else None
            ),
            element("td", format_value(count), class_="number"),
        )
        for name, count in bars
    ]
    return element("table", element("tbody", *rows), class_="bars")


def _render_captions(report: IngestReport) -> IngestSection:
    statistics = report.captions
    if not statistics.get("captions"):
        return (
            "captions",
            "Captions",
            element("p", "No clip has a caption; the clips train the unconditional model alone."),
        )
    rows = {
        "captions": statistics["captions"],
        "distinct captions": statistics["distinct"],
        "distinct words": statistics["vocabulary"],
    }
    for name in ("words", "characters"):
        values = statistics[name]
        rows[f"{name} per caption, median"] = values["median"]
        rows[f"{name} per caption, range"] = [values["least"], values["most"]]
    table = [
        element("tr", element("th", name, scope="row"), element("td", format_value(value), class_="number"))
        for name, value in rows.items()
    ]
    panels = [
        element("div", element("h3", "Counts"), element("table", element("tbody", *table)), class_="panel"),
        _render_panel("Captions per clip", {str(number): count for number, count in statistics["per_clip"]}),
        _render_panel("Most frequent words", dict(map(tuple, statistics["frequent_words"]))),
    ]
    if statistics["repeated"]:
        panels.append(_render_panel("Repeated captions", dict(map(tuple, statistics["repeated"]))))
    return "captions", "Captions", element("div", *panels, class_="panels")


def _render_unused(report: IngestReport) -> IngestSection:
    kinds: dict[str, Sequence[tuple[str, str]]] = {
        "quarantined": report.quarantined,
        "dropped": report.dropped,
        "rejected": report.rejected,
    }
    parts = []
    for kind, pairs in kinds.items():
        if pairs:
            unit = "clips" if kind == "dropped" else "files"
            heading = element(
                "h3", _OUTCOMES[kind].capitalize(), element("span", f"{len(pairs)} {unit}", class_="count")
            )
            parts.append(
                element(
                    "div", heading, _render_bars(report.reasons.get(kind, {})), _render_names(pairs), class_="panel"
                )
            )
    if report.unlisted:
        heading = element(
            "h3", "Not named in the source's list", element("span", str(len(report.unlisted)), class_="count")
        )
        parts.append(element("div", heading, _render_names([(name, "") for name in report.unlisted]), class_="panel"))
    return "left-out", "Not used", element("div", *parts, class_="panels") if parts else Markup("")


def _render_names(pairs: Sequence[tuple[str, str]]) -> Markup:
    lines = [
        element("li", name, element("span", f": {reason}") if reason else None) for name, reason in pairs[:_MAX_NAMES]
    ]
    remaining = len(pairs) - len(lines)
    note = element("p", f"… and {format_value(remaining)} more in report.json", class_="muted") if remaining else None
    return element("details", element("summary", "Names"), element("ul", *lines, class_="names"), note)
