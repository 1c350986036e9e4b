"""Listing of MSR-VTT: JSON annotations with 20 captions a clip, and the official splits.

    train_val_videodatainfo.json, test_videodatainfo.json (2016), or both in one, such as MSRVTT_data.json
        {"videos": [{"video_id": "video0", "split": "train" | "validate" | "test", …}, …],
         "sentences": [{"video_id": "video0", "caption": "…", …}, …], …}
    TrainValVideo/video0.mp4 …, TestVideo/video7010.mp4 …, or videos/all/video0.mp4 …

The files may lie anywhere inside the source. Clips that the annotations name but that do not exist are rejected
(incomplete copies of the data set circulate, and videos disappear from the web), and so is an entry that lacks a
required field, identified by its index.

Source: Xu et al., "MSR-VTT: A Large Video Description Dataset for Bridging Video and Language", CVPR 2016
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit_video.core.errors import MissingError, UserError
from dit_video.core.storage import StoragePath, read_range
from dit_video.data.ingest.formats import captions
from dit_video.data.ingest.formats.scan import FolderScan, get_suffix, index_files
from dit_video.data.ingest.formats.types import (
    VIDEOS,
    ListedClip,
    Listing,
    ListingOptions,
    Rejection,
    UnusableClipError,
    make_listing,
    reject_unusable,
)

ANNOTATIONS = re.compile(r"(?i)(?:.*videodatainfo.*|msr[-_]?vtt[^/]*)\.json")
_SPLITS = {"train": "train", "validate": "validation", "val": "validation", "validation": "validation", "test": "test"}


def find_annotations(scan: FolderScan) -> list[str]:
    """Return the files named like MSR-VTT's annotations, except JSON captions of a clip with the same name."""
    candidates = [name for name in scan.files if ANNOTATIONS.fullmatch(name.rsplit("/", 1)[-1])]
    if not candidates:
        return []
    stems = {os.path.splitext(name)[0] for name in scan.media}
    return [name for name in candidates if os.path.splitext(name)[0] not in stems]


def list_msrvtt(scan: FolderScan, options: ListingOptions) -> Listing:
    """Return the clips that the annotations name, in their order.

    Raises:
      MissingError: there are no annotations.
      UserError: there is no clip, or the annotations have another format.
    """
    paths = [scan.get_document(name) for name in find_annotations(scan)]
    if not paths:
        fix = "add train_val_videodatainfo.json and test_videodatainfo.json, or MSRVTT_data.json"
        raise MissingError(f"{scan.source} holds no annotations of MSR-VTT; {fix}")
    videos = [name for name in scan.files if get_suffix(name) in VIDEOS]
    files, rejected = index_files(videos, lambda name: Path(name).stem, "MSR-VTT")
    splits: dict[str, str] = {}
    sentences: dict[str, list[str]] = {}
    for path in paths:
        rejected += _read_annotations(path, splits, sentences)
    clips: list[ListedClip] = []
    for video, split in splits.items():
        with reject_unusable(rejected, files.get(video, video)):
            if video not in files:
                raise UnusableClipError("the annotations name it, but it is not there")
            clips.append(scan.make_clip(files[video], captions.clean_captions(sentences.get(video, ())), split))
    rejected += [(video, "has sentences, but is not among the videos") for video in sentences if video not in splits]
    listed_names = {files[video] for video in splits if video in files}
    rejected_names = {name for name, _ in rejected}
    unlisted = [name for name in scan.media if name not in listed_names | rejected_names]
    return make_listing(scan.source, "msrvtt", clips, unlisted=unlisted, rejected=[*rejected, *scan.rejected])


def _read_annotations(path: StoragePath, splits: dict[str, str], sentences: dict[str, list[str]]) -> list[Rejection]:
    """Add one annotation file to `splits` and `sentences`; return the entries that cannot be used."""
    try:
        # Bytes that are not UTF-8 become surrogates here, so that only the caption with them is rejected later.
        content: Any = json.loads(read_range(path).decode("utf-8-sig", "surrogateescape"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); download it again") from error
    rejected: list[Rejection] = []
    for location, video in _read_entries(path, content, "videos", ("video_id", "split"), rejected):
        name, split = video["video_id"], _SPLITS.get(video["split"])
        if split is None:
            rejected.append((location, f"has the split {video['split']!r}; it must be train, validate or test"))
        elif splits.setdefault(name, split) != split:
            rejected.append((location, f"has {name!r} for {split}, which was named already for {splits[name]}"))
    for _, sentence in _read_entries(path, content, "sentences", ("video_id", "caption"), rejected):
        sentences.setdefault(sentence["video_id"], []).append(sentence["caption"])
    return rejected


def _read_entries(
    path: StoragePath, content: Any, list_name: str, fields: tuple[str, ...], rejected: list[Rejection]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (location, entry) of the entries that have all `fields` as strings, and reject the others."""
    entries = content.get(list_name) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        fix = "use MSR-VTT's own files, which have 'videos' and 'sentences', such as train_val_videodatainfo.json"
        raise UserError(f"{path} has no list {list_name!r}; {fix}")
    for index, entry in enumerate(entries):
        location = f"{path.name}, {list_name}[{index}]"
        missing = [field for field in fields if not isinstance(entry, dict) or not isinstance(entry.get(field), str)]
        if missing:
            rejected.append((location, f"has no text {missing[0]!r}"))
        else:
            yield location, entry
