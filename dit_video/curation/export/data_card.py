"""The data card of an export: README.md with the fields that Hugging Face reads, statistics and histograms.

Source: huggingface.co/docs/hub/datasets-cards
"""

import json

import numpy as np

from dit_video.curation.export.columns import CAPTIONS
from dit_video.curation.export.contents import ExportContents, WrittenFiles
from dit_video.curation.histograms import Histogram, make_histogram

CARD = "README.md"
_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)
_UNSHOWN = {"id", "name", "source", "source_sha256", "payload", "hash", "start_us"}
_MAX_LABELS = 6


def make_data_card(contents: ExportContents, format: str, files: WrittenFiles) -> str:
    """Return the text of a data card.

    Args:
      contents: the clips.
      format: name of the format.
      files: what was written.
    """
    count = len(contents)
    size = next((name for limit, name in _SIZES if count < limit), "n>10M")
    seconds = sum(value or 0.0 for value in contents.read_column("seconds"))
    data_files = [
        f"  - split: {json.dumps(split)}\n    path: {json.dumps(names)}" for split, names in files.patterns.items()
    ]
    header = [
        f"pretty_name: {json.dumps(contents.title, ensure_ascii=False)}",
        f"license: {json.dumps(contents.license)}",
        "task_categories:",
        "- text-to-video",
        "tags:",
        "- video",
        "- dit_video",
        "size_categories:",
        f"- {size}",
        "configs:",
        "- config_name: default",
        "  data_files:",
        *data_files,
        *([f"dataset_info: {json.dumps({'features': files.features})}"] if files.features else []),
    ]
    splits = contents.read_column("split")
    tables = [
        "| split | clips |",
        "|---|---:|",
        *(f"| {_escape(name)} | {splits.count(name):,} |" for name in contents.splits),
    ]
    rows = [_format_row(each) for each in _make_histograms(contents)]
    charts = ["| column | values | missing | distribution | |", "|---|---:|---:|---|---|", *rows]
    text = [
        f"# {_escape(contents.title)}",
        f"{count:,} clips, {seconds / 3600:,.2f} hours, as {format}. Written by dit_video from the data set of version "
        f"`{contents.clips.table.version}`.",
        f"License: {_escape(contents.license)}",
        "## Splits",
        "\n".join(tables),
        "## Columns",
        "\n".join(charts),
    ]
    return "---\n" + "\n".join(header) + "\n---\n\n" + "\n\n".join(text) + "\n"


def _make_histograms(contents: ExportContents) -> list[Histogram]:
    names = [name for name in contents.columns if name not in _UNSHOWN]
    made = [make_histogram(name, contents.take(name, contents.rows)) for name in names]
    captions = make_histogram(CAPTIONS, np.array([len(texts) for texts in contents.iter_captions()]))
    return [each for each in (*made, captions) if each.number]


def _format_row(histogram: Histogram) -> str:
    if histogram.quantiles:
        labels = {0.05: "5 %", 0.5: "50 %", 0.95: "95 %"}
        note = ", ".join(f"{labels[share]}: {value:.4g}" for share, value in histogram.quantiles if share in labels)
    else:
        note = ", ".join(f"{_escape(each.label[:40])} {each.number:,}" for each in histogram.bins[:_MAX_LABELS])
    bars = f"`{histogram.bars}`" if histogram.quantiles else ""
    return f"| {_escape(histogram.name)} | {histogram.number:,} | {histogram.nulls:,} | {bars} | {note} |"


def _escape(text: str) -> str:
    """Return text in which Markdown and HTML mean nothing."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{letter}" if letter in "\\`*[]|#!" else letter for letter in line)
