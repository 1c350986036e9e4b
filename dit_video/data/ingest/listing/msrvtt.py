"""MSR-VTT: its annotations in JSON, with 20 captions a clip, and its official splits.

    train_val_videodatainfo.json, test_videodatainfo.json (2016), or both in one, such as MSRVTT_data.json
        {"videos": [{"video_id": "video0", "split": "train" | "validate" | "test", …}, …],
         "sentences": [{"video_id": "video0", "caption": "…", …}, …], …}
    TrainValVideo/video0.mp4 …, TestVideo/video7010.mp4 …, or videos/all/video0.mp4 …

Where the files lie inside the source doesn't matter. Clips that the annotations name and nobody has (parts of the data
set are passed around, and videos vanish) are rejected, not an error: the annotations aren't the user's to mend.

Source: Xu et al., "MSR-VTT: A Large Video Description Dataset for Bridging Video and Language", CVPR 2016
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from dit_video.data.ingest.listing import captions
from dit_video.data.ingest.listing.listed import VIDEOS, Listed, Listing, Unusable, finished
from dit_video.data.ingest.listing.scan import Scan, suffix_of
from dit_video.errors import MissingError, UserError

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
      UserError: annotations in another format, or that contradict each other.
    """
    paths = [scan.source / name for name in annotations(scan)]
    if not paths:
        raise MissingError(
            f"{scan.source} holds no annotations of MSR-VTT; put train_val_videodatainfo.json and "
            "test_videodatainfo.json, or MSRVTT_data.json, there"
        )
    splits: dict[str, str] = {}
    sentences: dict[str, list[str]] = {}
    for path in paths:
        _read(path, splits, sentences)
    files, rejected = _videos(scan)
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


def _videos(scan: Scan) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The videos' names by id, and those whose id was taken."""
    files: dict[str, str] = {}
    rejected = []
    for name in scan.files:
        if suffix_of(name) in VIDEOS:
            first = files.setdefault(os.path.splitext(name.rsplit("/", 1)[-1])[0], name)
            if first != name:
                rejected.append((name, f"is the same clip of MSR-VTT as {first}"))
    return files, rejected


def _read(path: Path, splits: dict[str, str], sentences: dict[str, list[str]]) -> None:
    """Add one file of annotations."""
    try:
        content: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); get it anew") from error
    if not isinstance(content, dict):
        content = {}
    for video in _entries(path, content, "videos", ("video_id", "split")):
        name, split = video["video_id"], _SPLITS.get(video["split"])
        if split is None:
            raise UserError(f"{path}: the split of {name} is {video['split']!r}; it must be train, validate or test")
        if splits.setdefault(name, split) != split:
            raise UserError(f"{path} has {name} for {split}, another file has it for {splits[name]}; keep one of them")
    for sentence in _entries(path, content, "sentences", ("video_id", "caption")):
        sentences.setdefault(sentence["video_id"], []).append(sentence["caption"])


def _entries(path: Path, content: dict[str, Any], part: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    entries = content.get(part)
    if not isinstance(entries, list):
        raise UserError(
            f"{path} has no list {part!r}; take MSR-VTT's own files, which have 'videos' and 'sentences', such as "
            "train_val_videodatainfo.json"
        )
    for at, entry in enumerate(entries):
        for field in fields:
            if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
                raise UserError(f"{path}: {part}[{at}] has no text {field!r}; get the file anew")
    return entries
