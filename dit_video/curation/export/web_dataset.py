"""WebDataset: tars of clips, each with its first caption as .txt, and all captions and columns as .json.

Source: github.com/webdataset/webdataset, "The WebDataset format"
"""

import io
import json
import posixpath
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dit_video.curation.export.columns import is_list
from dit_video.curation.export.contents import RESERVED, ExportContents, ExportedClip, PathRegister, WrittenFiles
from dit_video.data.ingest.formats.types import IMAGES

MAX_TAR_BYTES = 1 << 30
INDEX = "index.jsonl"
"""List of all clips, with the tar and the key of each."""


def write_web_dataset(contents: ExportContents, folder: Path) -> WrittenFiles:
    """Write the tars `SPLIT/00000.tar`, …, and a list of all clips; return the patterns of them.

    A clip's key is its path, with dots as underscores: a key ends at the first dot.

    Raises:
      UserError: two clips would have the same key.
    """
    keys = PathRegister()
    tars: dict[str, _TarWriter] = {}
    suffixes: set[str] = set()
    try:
        with (folder / INDEX).open("w", encoding="utf-8") as index:
            for clip in contents:
                stem, suffix = posixpath.splitext(clip.path)
                key = posixpath.join(posixpath.dirname(stem), posixpath.basename(stem).replace(".", "_"))
                keys.add(f"{clip.split}/{key}", clip.name)
                suffixes.add(suffix)
                writer = tars.setdefault(clip.split, _TarWriter(folder, clip.split))
                values = {"captions": list(clip.captions), **clip.values}
                place = writer.add(key, suffix, clip, values)
                index.write(json.dumps({"file_name": f"{place}/{key}{suffix}", **values}, ensure_ascii=False) + "\n")
    finally:
        for writer in tars.values():
            writer.close()
    patterns = {split: [f"{split}/*.tar"] for split in tars}
    return WrittenFiles(patterns, _make_features(contents, sorted(suffixes)))


def _make_features(contents: ExportContents, suffixes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the types of a clip's files; Hugging Face's reader would guess them by the first clips."""
    types = contents.clips.table.types
    columns = [
        {"name": f"{name}_column" if name in RESERVED else name, **_find_feature(types[name])}
        for name in contents.columns
    ]
    return [
        *({"name": name, "dtype": "string"} for name in ("__key__", "__url__", "txt")),
        {"name": "json", "struct": [{"name": "captions", "list": "string"}, *columns]},
        *({"name": name[1:], "dtype": "image" if name in IMAGES else "video"} for name in suffixes),
    ]


def _find_feature(type: pa.DataType) -> dict[str, str]:
    if is_list(type):
        return {"list": _find_feature(type.value_type)["dtype"]}
    if pa.types.is_boolean(type):
        return {"dtype": "bool"}
    is_number = pa.types.is_floating(type) or (pa.types.is_integer(type) and type != pa.uint64())
    return {
        "dtype": {"halffloat": "float16", "float": "float32", "double": "float64"}.get(str(type), str(type))
        if is_number
        else "string"
    }


class _TarWriter:
    """The tars of a split, of which a new one is begun when one is full."""

    def __init__(self, folder: Path, split: str):
        self._folder, self._split, self._number, self._bytes = folder, split, -1, MAX_TAR_BYTES
        self._tar: tarfile.TarFile | None = None

    def add(self, key: str, suffix: str, clip: ExportedClip, values: dict) -> str:
        """Add a clip, and return the path of the tar."""
        if self._bytes >= MAX_TAR_BYTES:
            self.close()
            self._number, self._bytes = self._number + 1, 0
            path = self._folder / self._split / f"{self._number:05d}.tar"
            path.parent.mkdir(exist_ok=True)
            self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115  # closed by `close`
        text = clip.captions[0] if clip.captions else ""
        document = json.dumps(values, ensure_ascii=False)
        for end, content in ((suffix, clip.content), (".txt", text.encode()), (".json", document.encode())):
            entry = tarfile.TarInfo(f"{key}{end}")  # without a time or an owner: equal clips give equal tars
            entry.size = len(content)
            assert self._tar is not None
            self._tar.addfile(entry, io.BytesIO(content))
            self._bytes += len(content)
        return f"{self._split}/{self._number:05d}.tar"

    def close(self) -> None:
        """Complete the tar."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None
