"""Formats of exports: Hugging Face's VideoFolder, WebDataset, and CSV; each is a function and a line in a table."""

import csv
import io
import json
import posixpath
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dit_video.core.errors import UserError
from dit_video.core.files import atomic_path, write_json, write_text
from dit_video.curation.export.contents import (
    RESERVED,
    ExportContents,
    ExportedClip,
    PathRegister,
    WrittenFiles,
    is_list,
)
from dit_video.curation.export.descriptions import CARD, CROISSANT, make_croissant, make_data_card
from dit_video.data.ingest.formats.listing import IMAGES, SPLITS, find_split

MAX_TAR_BYTES = 1 << 30
INDEX = "index.jsonl"
"""List of all clips, with the tar and the key of each."""


def write_web_dataset(contents: ExportContents, folder: Path) -> WrittenFiles:
    """Write the tars `SPLIT/00000.tar`, …, and a list of all clips; return the patterns of them.

    A clip's key is its path without the suffix, with dots as underscores, as a key ends at the first dot; of clips with
    one key, such as a photo and its video, the later ones get a number.
    """
    keys = PathRegister()
    tars: dict[str, _TarWriter] = {}
    suffixes: set[str] = set()
    try:
        with (folder / INDEX).open("w", encoding="utf-8") as index:
            for clip in contents:
                stem, suffix = posixpath.splitext(clip.path)
                key = posixpath.join(posixpath.dirname(stem), posixpath.basename(stem).replace(".", "_"))
                key = keys.choose(f"{clip.split}/{key}").removeprefix(f"{clip.split}/")
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
    """The tars of a split; a new one is begun when one is full."""

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


METADATA = "metadata.parquet"


def write_video_folder(contents: ExportContents, folder: Path) -> WrittenFiles:
    """Write the clips and their metadata, and return the patterns of them.

    The names of clips that are all in the split `train`, or that begin with the folder of their split, are unchanged;
    otherwise a folder for each split is put in front. Of names that differ in upper and lower case alone, the later
    ones get a number.
    """
    place = _choose_folders(contents)
    register, patterns = PathRegister(), dict[str, set[str]]()
    lists: dict[str, list[tuple[int, str, tuple[str, ...]]]] = {}
    for clip in contents:
        root, path = place(clip.path, clip.split)
        path = register.choose(f"{root}{path}").removeprefix(root)
        target = folder / root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(clip.content)
        lists.setdefault(root, []).append((clip.row, path, clip.captions))
        patterns.setdefault(clip.split, set()).add(f"{root}**")
    for root, entries in lists.items():
        pq.write_table(_make_list(contents, entries), folder / root / METADATA, compression="zstd")
    return WrittenFiles({split: sorted(names) for split, names in patterns.items()})


def _make_list(contents: ExportContents, entries: list[tuple[int, str, tuple[str, ...]]]) -> pa.Table:
    rows, paths, captions = zip(*entries, strict=True)
    columns = {
        "file_name": pa.array(paths),
        "text": pa.array([texts[0] if texts else "" for texts in captions]),
        "captions": pa.array(captions, pa.list_(pa.string())),
    }
    for name in contents.columns:
        column = contents.take(name, np.array(rows))
        if column.type == pa.list_(pa.uint64()):  # hashes, which many readers cannot hold
            column = column.cast(pa.list_(pa.string()))
        columns[f"{name}_column" if name in RESERVED else name] = column
    return pa.table(columns)


def _choose_folders(contents: ExportContents) -> Callable[[str, str], tuple[str, str]]:
    """Return a function of a clip's path and split that returns the folder of its list, and the path in it."""
    pairs = list(zip(contents.read_column("name"), contents.read_column("split"), strict=True))
    if all(split == "train" == find_split(name) for name, split in pairs):
        return lambda path, split: ("", path)
    if all("/" in name and SPLITS.get(name.split("/")[0].lower()) == split for name, split in pairs):

        def keep(path: str, split: str) -> tuple[str, str]:
            root, _, rest = path.partition("/")
            return f"{root}/", rest

        return keep
    return lambda path, split: (f"{split}/", path)


TABLE = "metadata.csv"


def write_csv_table(contents: ExportContents, folder: Path) -> WrittenFiles:
    """Write the clips, and a table whose first columns are `path` and `text`; return the pattern of its file.

    A clip has a row for each of its captions, and one if it has none. Of names that differ in upper and lower case
    alone, the later ones get a number.
    """
    register, names = PathRegister(), None
    with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for clip in contents:
            path = register.choose(clip.path)
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(clip.content)
            if names is None:
                names = list(clip.values)
                writer.writerow(["path", "text", *names])
            values = [clip.values[name] for name in names]
            values = [json.dumps(each, ensure_ascii=False) if isinstance(each, list) else each for each in values]
            writer.writerows([path, text, *values] for text in clip.captions or ("",))
    return WrittenFiles({"train": [TABLE]})


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """A format of data sets."""

    title: str
    """Name as people write it."""
    write: Callable[[ExportContents, Path], WrittenFiles]
    """Function that writes the clips into an empty folder."""
    texts: tuple[str, ...]
    """Names of the columns of captions in its lists."""


EXPORT_FORMATS: dict[str, ExportFormat] = {
    "videofolder": ExportFormat(title="VideoFolder", write=write_video_folder, texts=("text", "captions")),
    "webdataset": ExportFormat(title="WebDataset", write=write_web_dataset, texts=("captions",)),
    "csv": ExportFormat(title="CSV", write=write_csv_table, texts=("text",)),
}


def export_clips(contents: ExportContents, destination: Path, format: str) -> None:
    """Write clips in a format of another project, with a data card and a description in Croissant.

    The folder is complete or absent.

    Args:
      contents: The clips.
      destination: Folder, which is created; it may exist if it is empty.
      format: Name of the format.

    Raises:
      UserError: If the format is unknown, the folder is not empty or cannot be written, or files of clips would clash.
    """
    if format not in EXPORT_FORMATS:
        raise UserError(f"to={format!r} is invalid: there is no such format. Use {', '.join(EXPORT_FORMATS)}.")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"destination={destination} is not an empty folder. Use another one, or remove it.")
    chosen = EXPORT_FORMATS[format]
    try:
        with atomic_path(destination) as folder:
            folder.mkdir()
            files = chosen.write(contents, folder)
            write_json(folder / CROISSANT, make_croissant(contents, folder, texts=chosen.texts))
            write_text(folder / CARD, make_data_card(contents, chosen.title, files))
    except OSError as error:
        fix = "Use a folder with more space, or fewer clips (--where, --splits)"
        raise UserError(f"{destination} cannot be written: {error.strerror or error}. {fix}.") from error
