"""Listings of data sets as they are published.

MSR-VTT: JSON annotations with 20 captions a clip, and the official splits.

    train_val_videodatainfo.json, test_videodatainfo.json (2016), or both in one, such as MSRVTT_data.json
        {"videos": [{"video_id": "video0", "split": "train" | "validate" | "test", …}, …],
         "sentences": [{"video_id": "video0", "caption": "…", …}, …], …}
    TrainValVideo/video0.mp4 …, TestVideo/video7010.mp4 …, or videos/all/video0.mp4 …

Clips that the annotations name but that do not exist are rejected (incomplete copies of the data set circulate, and
videos disappear from the web), and so is an entry that lacks a required field, identified by its index.

UCF-101: a folder for each class, and lists of training and test clips.

    UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi …       UCF101.rar
    ucfTrainTestlist/classInd.txt                               `1 ApplyEyeMakeup`
    ucfTrainTestlist/trainlist01.txt … trainlist03.txt          `ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1`
    ucfTrainTestlist/testlist01.txt … testlist03.txt            `ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi`

The files may lie anywhere inside the source, and the clips may have been converted to another container.

Sources: Xu et al., "MSR-VTT: A Large Video Description Dataset for Bridging Video and Language", CVPR 2016;
https://www.crcv.ucf.edu/data/UCF101.php; Soomro et al., arXiv 1212.0402
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit_video.core.errors import MissingError, UserError
from dit_video.core.storage import StoragePath, read_range
from dit_video.data.ingest.formats.listing import (
    VIDEOS,
    ListedClip,
    Listing,
    ListingOptions,
    Rejection,
    UnusableClipError,
    clean_captions,
    get_suffix,
    make_listing,
    reject_unusable,
)
from dit_video.data.ingest.formats.scan import FolderScan, index_files

ANNOTATIONS = re.compile(r"(?i)(?:.*videodatainfo.*|msr[-_]?vtt[^/]*)\.json")
_SPLITS = {"train": "train", "validate": "validation", "val": "validation", "validation": "validation", "test": "test"}
CLASSES = "classInd.txt"


def list_msrvtt(scan: FolderScan, options: ListingOptions) -> Listing:
    """Return the clips that the annotations name, in their order.

    Raises:
      MissingError: If there are no annotations.
      UserError: If there is no clip, or the annotations have another format.
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
            clips.append(scan.make_clip(files[video], clean_captions(sentences.get(video, ())), split))
    rejected += [(video, "has sentences, but is not among the videos") for video in sentences if video not in splits]
    listed_names = {files[video] for video in splits if video in files}
    rejected_names = {name for name, _ in rejected}
    unlisted = [name for name in scan.media if name not in listed_names | rejected_names]
    return make_listing(scan.source, "msrvtt", clips, unlisted=unlisted, rejected=[*rejected, *scan.rejected])


def list_ucf101(scan: FolderScan, options: ListingOptions) -> Listing:
    """Return the clips that the chosen train and test list name, in their order; the caption is the class name.

    Raises:
      MissingError: If a list does not exist.
      UserError: If there is no clip; a list exists twice, or cannot be read.
    """
    files, rejected = index_files(scan.media, _get_ucf101_key, "UCF-101")
    classes, class_rejected = _read_classes(scan)
    rejected += class_rejected
    clips: list[ListedClip] = []
    splits: dict[str, str] = {}
    for split in ("train", "test"):
        path = _find_file(scan, f"{split}list{options.ucf101_split:02d}.txt")
        for line, row in _read_lines(path):
            entry = row.split()[0]
            key = _get_ucf101_key(entry)
            label = classes.get(key.split("/")[0])
            if label is None or key in splits:
                reason = f"was named already, for {splits[key]}" if label else f"lies in no class of {CLASSES}"
                rejected.append((f"{path.name}, line {line}", f"{entry!r} {reason}"))
                continue
            splits[key] = split
            with reject_unusable(rejected, files.get(key, entry)):
                if key not in files:
                    raise UnusableClipError(f"{path.name} names it, but it is not there")
                clips.append(scan.make_clip(files[key], (format_class_name(label),), split))
    unlisted = [name for key, name in files.items() if key not in splits]
    return make_listing(scan.source, "ucf101", clips, unlisted=unlisted, rejected=[*rejected, *scan.rejected])


def find_annotations(scan: FolderScan) -> list[str]:
    """Return the files named like MSR-VTT's annotations, except JSON captions of a clip with the same name."""
    candidates = [name for name in scan.files if ANNOTATIONS.fullmatch(name.rsplit("/", 1)[-1])]
    if not candidates:
        return []
    stems = {os.path.splitext(name)[0] for name in scan.media}
    return [name for name in candidates if os.path.splitext(name)[0] not in stems]


def format_class_name(label: str) -> str:
    """Return a class name as words: `ApplyEyeMakeup` -> `apply eye makeup`."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[^A-Z]+", label)).lower()


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


def _get_ucf101_key(path: str) -> str:
    """Return `class/clip` in lower case: the lists have v_HandstandPushups, but the files v_HandStandPushups."""
    return "/".join(os.path.splitext(path)[0].split("/")[-2:]).casefold()


def _read_classes(scan: FolderScan) -> tuple[dict[str, str], list[Rejection]]:
    """Return the class names by their lower-case names, and rejections of malformed lines."""
    path = _find_file(scan, CLASSES)
    classes, rejected = {}, []
    for line, row in _read_lines(path):
        match row.split():
            case [number, label] if number.isdigit():
                classes[label.casefold()] = label
            case _:
                rejected.append((f"{path.name}, line {line}", "is not a number and a class, as 1 ApplyEyeMakeup"))
    return classes, rejected


def _find_file(scan: FolderScan, name: str) -> StoragePath:
    matches = [path for path in scan.files if path.rsplit("/", 1)[-1] == name]
    if not matches:
        raise MissingError(f"{scan.source} holds no {name}; put the folder ucfTrainTestlist of UCF-101 there")
    if len(matches) > 1:
        raise UserError(f"{scan.source} holds {name} more than once ({', '.join(matches[:2])}); remove all but one")
    return scan.get_document(matches[0])


def _read_lines(path: StoragePath) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of the lines that are not blank; a line that is not UTF-8 matches no file."""
    try:
        text = read_range(path).decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); unpack it again") from error
    for line, row in enumerate(text.splitlines(), 1):
        if row.strip():
            yield line, row
