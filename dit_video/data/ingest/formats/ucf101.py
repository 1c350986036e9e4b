"""UCF-101 as its authors ship it: class folders, and lists of what is for training and what for testing.

    UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi …       UCF101.rar
    ucfTrainTestlist/classInd.txt                               `1 ApplyEyeMakeup`
    ucfTrainTestlist/trainlist01.txt … trainlist03.txt          `ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1`
    ucfTrainTestlist/testlist01.txt … testlist03.txt            `ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi`

Where the folders lie inside the source doesn't matter, nor what container the clips were converted to.

Source: https://www.crcv.ucf.edu/data/UCF101.php; Soomro et al., arXiv 1212.0402
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from dit_video.core.errors import MissingError, UserError
from dit_video.data.ingest.formats.listed import Listed, Listing, Rejected, Unusable, finished, quoted
from dit_video.data.ingest.formats.scan import Scan

CLASSES = "classInd.txt"


def list_ucf101(scan: Scan, number: int) -> Listing:
    """The clips that train and test list `number` (1 to 3) name, in their order; the caption is the class's name.

    Raises:
      MissingError: a list is not there.
      UserError: no clip; a list is there twice, or cannot be read.
    """
    files, rejected = _clips(scan)
    classes, strange = _classes(scan)
    rejected += strange
    clips: list[Listed] = []
    splits: dict[str, str] = {}
    for split in ("train", "test"):
        path = _file(scan, f"{split}list{number:02d}.txt")
        for line, row in _lines(path):
            entry = row.split()[0]
            key = _key(entry)
            label = classes.get(key.split("/")[0])
            if label is None or key in splits:
                reason = f"was named already, for {splits[key]}" if label else f"lies in no class of {CLASSES}"
                rejected.append((f"{path.name}, line {line}", f"{quoted(entry)} {reason}"))
                continue
            splits[key] = split
            try:
                if key not in files:
                    raise Unusable(f"{path.name} names it, but it is not there")
                clips.append(scan.listed(files[key], (phrase(label),), split))
            except Unusable as error:
                rejected.append((files.get(key, entry), str(error)))
    unlisted = [name for key, name in files.items() if key not in splits]
    return finished(scan.source, "ucf101", clips, unlisted=unlisted, rejected=[*rejected, *scan.rejected])


def phrase(label: str) -> str:
    """`ApplyEyeMakeup` -> `apply eye makeup`."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[^A-Z]+", label)).lower()


def _key(path: str) -> str:
    """`Class/clip` without case: the lists have v_HandstandPushups where the files are v_HandStandPushups."""
    return "/".join(os.path.splitext(path)[0].split("/")[-2:]).casefold()


def _clips(scan: Scan) -> tuple[dict[str, str], list[Rejected]]:
    """The media by key, and those whose key was taken."""
    files: dict[str, str] = {}
    rejected = []
    for name in scan.media:
        first = files.setdefault(_key(name), name)
        if first != name:
            rejected.append((name, f"is the same clip of UCF-101 as {quoted(first)}"))
    return files, rejected


def _classes(scan: Scan) -> tuple[dict[str, str], list[Rejected]]:
    """The classes' names by their names without case, and the lines that name none."""
    path = _file(scan, CLASSES)
    classes, rejected = {}, []
    for line, row in _lines(path):
        match row.split():
            case [number, label] if number.isdigit():
                classes[label.casefold()] = label
            case _:
                rejected.append((f"{path.name}, line {line}", "is not a number and a class, as 1 ApplyEyeMakeup"))
    return classes, rejected


def _file(scan: Scan, name: str) -> Path:
    found = [path for path in scan.files if path.rsplit("/", 1)[-1] == name]
    if not found:
        raise MissingError(
            f"{scan.source} holds no {name}; put the folder ucfTrainTestlist of UCF-101's split lists there"
        )
    if len(found) > 1:
        raise UserError(f"{scan.source} holds {name} more than once ({', '.join(found[:2])}); remove all but one")
    return scan.source / found[0]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that are not blank. One that is not UTF-8 names no clip that is there."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); unpack it anew") from error
    for line, row in enumerate(text.split("\n"), 1):
        if row.strip():
            yield line, row
