"""MSR-VTT: its annotations in JSON, with 20 captions a clip, and its official splits.

    train_val_videodatainfo.json, test_videodatainfo.json (2016), or both in one, such as MSRVTT_data.json
        {"videos": [{"video_id": "video0", "split": "train" | "validate" | "test", …}, …],
         "sentences": [{"video_id": "video0", "caption": "…", …}, …], …}
    TrainValVideo/video0.mp4 …, TestVideo/video7010.mp4 …, or videos/all/video0.mp4 …

Where the files lie inside the source doesn't matter. Clips that the annotations name and nobody has (parts of the data
set are passed around, and videos vanish) are rejected, and so is an entry that lacks what it must say, by its number.

Source: Xu et al., "MSR-VTT: A Large Video Description Dataset for Bridging Video and Language", CVPR 2016
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit_video.core.errors import MissingError, UserError
from dit_video.data.ingest.formats import captions
from dit_video.data.ingest.formats.listed import VIDEOS, Listed, Listing, Rejected, Unusable, finished, quoted
from dit_video.data.ingest.formats.scan import Scan, suffix_of

ANNOTATIONS = re.compile(r"(?i)(?:.*videodatainfo.*|msr[-_]?vtt[^/]*)\.json")
_SPLITS = {"train": "train", "validate": "validation", "val": "validation", "validation": "validation", "test": "test"}


def annotations(scan: Scan) -> list[str]:
    """The files that are named as MSR-VTT's annotations are, unless a clip of the same name lies beside them."""
    named = [name for name in scan.files if ANNOTATIONS.fullmatch(name.rsplit("/", 1)[-1])]
    if not named:
        return []
    stems = {os.path.splitext(name)[0] for name in scan.media}
    return [name for name in named if os.path.splitext(name)[0] not in stems]


def list_msrvtt(scan: Scan) -> Listing:
    """The clips that the annotations name, in their order.

    Raises:
      MissingError: no annotations.
      UserError: no clip; annotations in another format.
    """
    paths = [scan.source / name for name in annotations(scan)]
    if not paths:
        raise MissingError(
            f"{scan.source} holds no annotations of MSR-VTT; put train_val_videodatainfo.json and "
            "test_videodatainfo.json, or MSRVTT_data.json, there"
        )
    files, rejected = _videos(scan)
    splits: dict[str, str] = {}
    sentences: dict[str, list[str]] = {}
    for path in paths:
        rejected += _read(path, splits, sentences)
    clips: list[Listed] = []
    for video, split in splits.items():
        try:
            if video not in files:
                raise Unusable("the annotations name it, but it is not there")
            clips.append(scan.listed(files[video], captions.tidy(sentences.get(video, ())), split))
        except Unusable as error:
            rejected.append((files.get(video, video), str(error)))
    rejected += [(video, "has sentences, but is not among the videos") for video in sentences if video not in splits]
    listed = {files[video] for video in splits if video in files}
    refused = {name for name, _ in rejected}
    unlisted = [name for name in scan.media if name not in listed | refused]
    return finished(scan.source, "msrvtt", clips, unlisted=unlisted, rejected=[*rejected, *scan.rejected])


def _videos(scan: Scan) -> tuple[dict[str, str], list[Rejected]]:
    """The videos' names by id, and those whose id was taken."""
    files: dict[str, str] = {}
    rejected: list[Rejected] = []
    for name in scan.files:
        if suffix_of(name) in VIDEOS:
            first = files.setdefault(os.path.splitext(name.rsplit("/", 1)[-1])[0], name)
            if first != name:
                rejected.append((name, f"is the same clip of MSR-VTT as {quoted(first)}"))
    return files, rejected


def _read(path: Path, splits: dict[str, str], sentences: dict[str, list[str]]) -> list[Rejected]:
    """Add one file of annotations; returns its entries that cannot be used."""
    try:
        # A byte that is not UTF-8 is found in the caption that holds it.
        content: Any = json.loads(path.read_bytes().decode("utf-8-sig", "surrogateescape"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); get it anew") from error
    rejected: list[Rejected] = []
    for where, video in _entries(path, content, "videos", ("video_id", "split"), rejected):
        name, split = video["video_id"], _SPLITS.get(video["split"])
        if split is None:
            rejected.append((where, f"has the split {quoted(video['split'])}; it must be train, validate or test"))
        elif splits.setdefault(name, split) != split:
            rejected.append((where, f"has {quoted(name)} for {split}, which was named already for {splits[name]}"))
    for _, sentence in _entries(path, content, "sentences", ("video_id", "caption"), rejected):
        sentences.setdefault(sentence["video_id"], []).append(sentence["caption"])
    return rejected


def _entries(
    path: Path, content: Any, part: str, fields: tuple[str, ...], rejected: list[Rejected]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of a list of the annotations that have these fields, as text, each with its place; others are
    rejected."""
    entries = content.get(part) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(
            f"{path} has no list {part!r}; take MSR-VTT's own files, which have 'videos' and 'sentences', such as "
            "train_val_videodatainfo.json"
        )
    for at, entry in enumerate(entries):
        where = f"{path.name}, {part}[{at}]"
        absent = [field for field in fields if not isinstance(entry, dict) or not isinstance(entry.get(field), str)]
        if absent:
            rejected.append((where, f"has no text {absent[0]!r}"))
        else:
            yield where, entry
