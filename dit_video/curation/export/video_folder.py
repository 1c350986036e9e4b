"""Hugging Face's VideoFolder: clips as files, with a metadata.parquet in the folder of each split.

Source: huggingface.co/docs/datasets/video_load#videofolder. Its other lists, CSV and JSON, have no types: lists of
splits of which one has no value in some column would disagree.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dit_video.curation.export.contents import RESERVED, ExportContents, PathRegister, WrittenFiles
from dit_video.data.ingest.formats.types import SPLITS, find_split

METADATA = "metadata.parquet"


def write_video_folder(contents: ExportContents, folder: Path) -> WrittenFiles:
    """Write the clips and their metadata, and return the patterns of them.

    The names of clips that are all in the split `train`, or that begin with the folder of their split, are unchanged;
    otherwise a folder for each split is put in front.

    Raises:
      UserError: two clips would have the same path.
    """
    place = _choose_folders(contents)
    register, patterns = PathRegister(), dict[str, set[str]]()
    lists: dict[str, list[tuple[int, str, tuple[str, ...]]]] = {}
    for clip in contents:
        root, path = place(clip.path, clip.split)
        register.add(f"{root}{path}", clip.name)
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
