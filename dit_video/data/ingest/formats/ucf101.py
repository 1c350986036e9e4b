"""Listing of UCF-101 as published: a folder for each class, and lists of training and test clips.

    UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi …       UCF101.rar
    ucfTrainTestlist/classInd.txt                               `1 ApplyEyeMakeup`
    ucfTrainTestlist/trainlist01.txt … trainlist03.txt          `ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1`
    ucfTrainTestlist/testlist01.txt … testlist03.txt            `ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi`

The folders may lie anywhere inside the source, and the clips may have been converted to another container.

Source: https://www.crcv.ucf.edu/data/UCF101.php; Soomro et al., arXiv 1212.0402
"""

import os
import re
from collections.abc import Iterator

from dit_video.core.errors import MissingError, UserError
from dit_video.core.storage import StoragePath, read_range
from dit_video.data.ingest.formats.scan import FolderScan, index_files
from dit_video.data.ingest.formats.types import (
    ListedClip,
    Listing,
    ListingOptions,
    Rejection,
    UnusableClipError,
    make_listing,
    reject_unusable,
)

CLASSES = "classInd.txt"


def list_ucf101(scan: FolderScan, options: ListingOptions) -> Listing:
    """Return the clips that the chosen train and test list name, in their order; the caption is the class name.

    Raises:
      MissingError: a list does not exist.
      UserError: there is no clip; a list exists twice, or cannot be read.
    """
    files, rejected = index_files(scan.media, _get_key, "UCF-101")
    classes, class_rejected = _read_classes(scan)
    rejected += class_rejected
    clips: list[ListedClip] = []
    splits: dict[str, str] = {}
    for split in ("train", "test"):
        path = _find_file(scan, f"{split}list{options.ucf101_split:02d}.txt")
        for line, row in _read_lines(path):
            entry = row.split()[0]
            key = _get_key(entry)
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


def format_class_name(label: str) -> str:
    """Return a class name as words: `ApplyEyeMakeup` -> `apply eye makeup`."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[^A-Z]+", label)).lower()


def _get_key(path: str) -> str:
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
