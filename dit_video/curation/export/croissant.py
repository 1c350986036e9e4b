"""The description of an export in Croissant, the vocabulary of machine-learning data sets in JSON-LD.

Source: docs.mlcommons.org/croissant/docs/croissant-spec.html, version 1.0
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dit_video.curation.export.contents import RESERVED, ExportContents

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
      contents: the clips.
      folder: folder of the export.
      texts: names of the columns of captions in its lists.
    """
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lists = [path for path in paths if Path(path).name in ("metadata.parquet", "metadata.csv", "index.jsonl")]
    suffixes = sorted({Path(path).suffix for path in paths if path not in lists})
    path_column = "path" if lists[0].endswith(".csv") else "file_name"
    names = [path_column, *texts, *(f"{name}_column" if name in RESERVED else name for name in contents.columns)]
    types = contents.clips.table.types
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
            _make_file_set("clips", [f"**/*{suffix}" for suffix in suffixes], _find_encoding(suffixes)),
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


def _find_encoding(suffixes: Sequence[str]) -> str:
    return _ENCODINGS.get(suffixes[0], "video/mp4") if len(suffixes) == 1 else "application/octet-stream"


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
