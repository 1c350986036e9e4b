"""Hugging Face's VideoFolder: clips as files, with a metadata.jsonl in the folder of each split.

Source: huggingface.co/docs/datasets/video_load#videofolder
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from dit_video.curation.export.contents import ExportContents, PathRegister
from dit_video.data.ingest.formats.types import SPLITS, find_split

METADATA = "metadata.jsonl"


def write_video_folder(contents: ExportContents, folder: Path) -> dict[str, list[str]]:
    """Write the clips and their metadata, and return the patterns of each split's files.

    The names of clips that are all in the split `train`, or that begin with the folder of their split, are unchanged;
    otherwise a folder for each split is put in front.

    Raises:
      UserError: two clips would have the same path.
    """
    place = _choose_folders(contents)
    register, patterns = PathRegister(), dict[str, set[str]]()
    with ExitStack() as stack:
        lists: dict[str, TextIO] = {}
        for clip in contents:
            root, path = place(clip.path, clip.split)
            register.add(f"{root}{path}", clip.name)
            target = folder / root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(clip.content)
            if root not in lists:
                lists[root] = stack.enter_context((folder / root / METADATA).open("w", encoding="utf-8"))
            text = clip.captions[0] if clip.captions else ""
            values = {"file_name": path, "text": text, "captions": list(clip.captions), **clip.values}
            lists[root].write(json.dumps(values, ensure_ascii=False) + "\n")
            patterns.setdefault(clip.split, set()).add(f"{root}**")
    return {split: sorted(names) for split, names in patterns.items()}


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
