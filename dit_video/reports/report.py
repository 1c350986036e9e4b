"""Report page: sections from top to bottom, in one file."""

import importlib.resources
import os
from collections.abc import Iterator, Sequence

from dit_video.core import files
from dit_video.reports import clips
from dit_video.reports.charts import draw_line_chart
from dit_video.reports.contents import Chart, Command, Figure, Reconstruction, Report, Sample
from dit_video.reports.markup import Markup, element, join
from dit_video.reports.tables import render_json, render_metrics


def write_report(path: str | os.PathLike, report: Report) -> None:
    """Write `report` as one self-contained HTML file, atomically: without network, with clips, style and script inside.

    Tiny clips are embedded losslessly as animated PNG, larger ones as MP4 (see `clips.embed`).
    """
    files.write_text(path, render(report))


def render(report: Report) -> Markup:
    """Return the whole page as HTML."""
    sections = [
        section
        for section in (
            _render_samples(report.samples),
            _render_reconstructions(report.reconstructions),
            _render_charts(report.charts),
            _make_section("metrics", "Metrics", render_metrics(report.metrics)) if report.metrics else None,
            _render_commands(report.commands),
            _render_config(report),
        )
        if section is not None
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", report.title),
        element("style", _read_asset("page.css")),
    )
    header = element(
        "header",
        element("h1", report.title),
        element("p", report.summary, class_="summary") if report.summary else None,
        _render_figures(report.figures),
    )
    body = element(
        "body",
        _render_navigation(report, sections),
        element("main", header, *(content for _, _, content in sections)),
        element("script", _read_asset("page.js")),
    )
    return join(Markup("<!doctype html>\n"), element("html", head, body, lang="en"), Markup("\n"))


Section = tuple[str, str, Markup]
"""Anchor, name in the navigation, and content of a section."""


def _make_section(anchor: str, title: str, *children: str | None, count: str = "") -> Section:
    heading = element("h2", title, element("span", count, class_="count") if count else None)
    return anchor, title, element("section", heading, *children, id=anchor)


def _render_navigation(report: Report, sections: Sequence[Section]) -> Markup:
    links = [element("a", title, href=f"#{anchor}") for anchor, title, _ in sections]
    moving = bool(report.samples or report.reconstructions)
    pause = element("button", "Pause", type="button", id="pause", aria_pressed="false") if moving else None
    theme = element("button", "◐", type="button", id="theme", title="Light or dark", aria_label="Light or dark")
    return element(
        "nav", element("div", *links, class_="links"), element("div", pause, theme, class_="tools"), aria_label="Page"
    )


def _render_figures(figures: Sequence[Figure]) -> Markup | None:
    if not figures:
        return None
    tiles = []
    for figure in figures:
        bar = None
        if figure.share is not None:
            filled = element("span", style=f"width:{100 * min(max(figure.share, 0.0), 1.0):.1f}%")
            bar = element("span", filled, class_="share", aria_hidden="true")
        note = element("span", figure.note, class_="note") if figure.note else None
        value = element("dd", element("span", figure.value, class_="value"), bar, note)
        tiles.append(element("div", element("dt", figure.label), value, class_="tile"))
    return element("dl", *tiles, class_="figures")


def _render_samples(samples: Sequence[Sample]) -> Section | None:
    if not samples:
        return None
    scale = clips.compute_common_scale([sample.clip for sample in samples])
    groups = []
    for frames, group in _group_by_length(samples):
        name = "Images" if frames == 1 else f"{frames} frames"
        duration = "" if frames == 1 else f" · {_format_durations(group)}"
        heading = element("h3", name, element("span", f"{len(group)}{duration}", class_="count"))
        cards = [_render_card(sample, scale) for sample in group]
        groups.append(element("div", heading, element("div", *cards, class_="grid"), class_="group"))
    return _make_section("samples", "Samples", _render_filters(samples), *groups, count=str(len(samples)))


def _group_by_length(samples: Sequence[Sample]) -> Iterator[tuple[int, list[Sample]]]:
    """Yield (number of frames, samples), longest first; samples are sorted by size, else in the given order."""
    for frames in sorted({len(sample.clip.frames) for sample in samples}, reverse=True):
        group = [sample for sample in samples if len(sample.clip.frames) == frames]
        yield frames, sorted(group, key=lambda sample: (sample.clip.height, sample.clip.width))


def _format_durations(samples: Sequence[Sample]) -> str:
    durations = sorted({f"{sample.clip.duration:.2g} s" for sample in samples})
    return durations[0] if len(durations) == 1 else f"{durations[0]} to {durations[-1]}"


def _render_filters(samples: Sequence[Sample]) -> Markup | None:
    """Return buttons that show a subset of the samples, if there are subsets."""
    unseen = sum(sample.seen is False for sample in samples)
    wrong = sum(not all(sample.verdict.values()) for sample in samples)
    choices = [("all", "All", len(samples))]
    choices += [("unseen", "Not in training", unseen)] if unseen else []
    choices += [("wrong", "Prompt not followed", wrong)] if wrong else []
    if len(choices) == 1:
        return None
    buttons = [
        element(
            "button",
            label,
            element("span", str(count), class_="count"),
            type="button",
            data_filter=name,
            aria_pressed="true" if name == "all" else "false",
        )
        for name, label, count in choices
    ]
    return element("div", *buttons, class_="filters", role="group", aria_label="Filter samples")


def _render_card(sample: Sample, scale: int | float) -> Markup:
    prompt = sample.clip.caption if sample.prompt is None else sample.prompt
    is_correct = all(sample.verdict.values())
    badge = element("span", "not in training", class_="badge", title="No training clip has this prompt")
    verdict = [
        element(
            "li",
            element("span", attribute),
            class_="yes" if is_right else "no",
            aria_label=_format_answer(attribute, is_right),
        )
        for attribute, is_right in sample.verdict.items()
    ]
    details = f"{sample.clip.height}×{sample.clip.width}" + (f" · {sample.note}" if sample.note else "")
    return element(
        "figure",
        element(
            "div",
            clips.embed(sample.clip, prompt, scale=scale),
            badge if sample.seen is False else None,
            class_="frame",
        ),
        element(
            "figcaption",
            element("span", prompt, class_="prompt"),
            element("ul", *verdict, class_="verdict") if verdict else None,
            element("span", details, class_="small"),
        ),
        class_="card",
        style=f"--w:{round(sample.clip.width * scale)}px",
        data_unseen=sample.seen is False,
        data_wrong=not is_correct,
    )


def _format_answer(attribute: str, good: bool) -> str:
    return f"{attribute}: {'as prompted' if good else 'not as prompted'}"


def _render_reconstructions(items: Sequence[Reconstruction]) -> Section | None:
    if not items:
        return None
    compared = [[item.original, item.decoded, *([] if item.linear is None else [item.linear])] for item in items]
    pairs = [clips.join_side_by_side(*clip_group) for clip_group in compared]
    scale = clips.compute_common_scale([pair for pair, _ in pairs])
    cards = []
    for item, (pair, gaps) in zip(items, pairs, strict=True):
        name = item.name or item.original.caption
        label = f"{name}: original and reconstruction".removeprefix(": ")
        gap_elements = [
            element("span", class_="gap", style=f"left:{100 * start:.2f}%;right:{100 - 100 * stop:.2f}%")
            for start, stop in gaps
        ]
        quality = [element("b", _format_decibels(item.psnr)), " dB PSNR"]
        quality += [" · ", element("b", f"{item.ssim:.3f}"), " SSIM"] if item.ssim is not None else []
        quality += [" · linear ", _format_decibels(item.linear_psnr), " dB"] if item.linear_psnr is not None else []
        height, width = item.original.height, item.original.width
        cards.append(
            element(
                "figure",
                element("div", clips.embed(pair, label, scale=scale), *gap_elements, class_="frame"),
                element(
                    "figcaption",
                    element("span", name, class_="prompt") if name else None,
                    element("span", *quality, class_="quality"),
                    element("span", f"{len(pair.frames)}×{height}×{width}", class_="small"),
                ),
                class_="card",
                style=f"--w:{round(pair.width * scale)}px",
            )
        )
    text = "Left: the original. Right: the autoencoder's reconstruction."
    if any(item.linear is not None for item in items):
        text = "From left to right: the original, the autoencoder's reconstruction, and the best linear autoencoder's."
    note = element("p", text, class_="muted")
    return _make_section(
        "reconstructions", "Reconstructions", note, element("div", *cards, class_="grid"), count=str(len(items))
    )


def _format_decibels(value: int | float) -> str:
    return "∞" if value == float("inf") else f"{value:.1f}"


def _render_charts(charts: Sequence[Chart]) -> Section | None:
    if not charts:
        return None
    panels = [
        element(
            "figure",
            element("h3", chart.title),
            draw_line_chart(chart.title, [(curve.name, curve.steps, curve.values) for curve in chart.curves]),
            element("figcaption", chart.note, class_="muted") if chart.note else None,
            class_="panel",
        )
        for chart in charts
    ]
    return _make_section("curves", "Training", element("div", *panels, class_="panels"))


def _render_commands(commands: Sequence[Command]) -> Section | None:
    if not commands:
        return None
    blocks = [
        element(
            "div",
            element("p", command.note) if command.note else None,
            element(
                "div",
                element("pre", element("code", command.text), tabindex="0"),
                element("button", "Copy", type="button", class_="copy"),
                class_="command",
            ),
        )
        for command in commands
    ]
    return _make_section("commands", "Generate more samples", *blocks)


def _render_config(report: Report) -> Section | None:
    if report.config is None:
        return None
    details = element("details", element("summary", "Resolved config of this run"), render_json(report.config))
    return _make_section("config", "Config", details)


def _read_asset(name: str) -> Markup:
    return Markup(importlib.resources.files("dit_video.reports").joinpath(name).read_text(encoding="utf-8"))
