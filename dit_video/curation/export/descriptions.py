"""Descriptions of an export: a data card for Hugging Face, and Croissant, the vocabulary of data sets in JSON-LD.

Sources: huggingface.co/docs/hub/datasets-cards; docs.mlcommons.org/croissant/docs/croissant-spec.html, version 1.0
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dit_video.curation.export.contents import CAPTIONS, RESERVED, ExportContents, WrittenFiles
from dit_video.curation.statistics import Histogram, make_histogram

CROISSANT = "croissant.json"
_TERMS = (
    *("citeAs", "column", "equivalentProperty", "extract", "field", "fileProperty", "fileObject", "fileSet", "format"),
    *("includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex"),
    *("repeated", "replace", "samplingRate", "separator", "source", "subField", "transform"),
)
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{term: f"cr:{term}" for term in _TERMS},
}
_ENCODINGS = {
    ".jsonl": "application/jsonlines",
    ".csv": "text/csv",
    ".tar": "application/x-tar",
    ".parquet": "application/x-parquet",
}


def make_croissant(contents: ExportContents, folder: Path, *, texts: Sequence[str]) -> dict[str, Any]:
    """Return the description of what was written into a folder.

    Args:
      contents: The clips.
      folder: Folder of the export.
      texts: Names of the columns of captions in its lists.
    """
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lists = [path for path in paths if Path(path).name in ("metadata.parquet", "metadata.csv", "index.jsonl")]
    suffixes = sorted({Path(path).suffix for path in paths if path not in lists})
    path_column = "path" if lists[0].endswith(".csv") else "file_name"
    names = [path_column, *texts, *(f"{name}_column" if name in RESERVED else name for name in contents.columns)]
    types = contents.clips.table.types
    encoding = _ENCODINGS.get(suffixes[0], "video/mp4") if len(suffixes) == 1 else "application/octet-stream"
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": contents.title,
        "description": f"{len(contents):,} clips with captions and measures, written by dit_video.",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "license": contents.license,
        "version": contents.clips.table.version,
        "url": "https://huggingface.co/datasets",
        "distribution": [
            _make_file_set("lists", lists, _ENCODINGS[Path(lists[0]).suffix]),
            _make_file_set("clips", [f"**/*{suffix}" for suffix in suffixes], encoding),
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "records",
                "name": "records",
                "field": [_make_field(name, types.get(name.removesuffix("_column"))) for name in names],
            }
        ],
    }


def _make_file_set(name: str, includes: Sequence[str], encoding: str) -> dict[str, Any]:
    return {"@type": "cr:FileSet", "@id": name, "name": name, "encodingFormat": encoding, "includes": list(includes)}


def _make_field(name: str, type: pa.DataType | None) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"records/{name}",
        "name": name,
        "dataType": _find_data_type(type),
        "source": {"fileSet": {"@id": "lists"}, "extract": {"column": name}},
    }


def _find_data_type(type: pa.DataType | None) -> str:
    if type is None:
        return "sc:Text"
    if pa.types.is_boolean(type):
        return "sc:Boolean"
    if pa.types.is_floating(type):
        return "sc:Float"
    return "sc:Integer" if pa.types.is_integer(type) and type != pa.uint64() else "sc:Text"


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
      contents: The clips.
      format: Name of the format.
      files: What was written.
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
