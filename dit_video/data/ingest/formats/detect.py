"""Which format a source has."""

import os
import re
from pathlib import Path
from typing import Literal

from dit_video.core.errors import MissingError, UserError
from dit_video.core.storage import place
from dit_video.data.ingest.formats.folder import METADATA, list_folder
from dit_video.data.ingest.formats.listed import Format, Listing
from dit_video.data.ingest.formats.msrvtt import annotations, list_msrvtt
from dit_video.data.ingest.formats.rows import TABLES, is_list
from dit_video.data.ingest.formats.scan import Scan, scan, suffix_of
from dit_video.data.ingest.formats.tables import list_table
from dit_video.data.ingest.formats.tars import is_tar, list_tar, list_tars
from dit_video.data.ingest.formats.ucf101 import list_ucf101


def list_clips(
    source: str | os.PathLike, *, format: Format | Literal["auto"] = "auto", ucf101_split: Literal[1, 2, 3] = 1
) -> Listing:
    """The clips of a source, with their captions and splits; see the package for the formats.

    Nothing is decoded, and of the media files nothing is read.

    Args:
      source: a folder, a list of clips, or a tar.
      format: how to read it; "auto" finds out, and the listing says what it was.
      ucf101_split: which of UCF-101's three pairs of train and test lists.

    Raises:
      MissingError: nothing is at `source`, or a list that the format has is missing.
      UserError: no clips; a format that cannot be told, or isn't the source's; a list that cannot be used as a whole.
    """
    opened = place(source)
    if not isinstance(opened, Path):
        raise UserError(f"{source} is an address; clips are ingested from this machine, so copy them here first")
    source = opened
    if not source.exists():
        raise MissingError(f"no such folder or file: {source}")
    if not source.is_dir():
        return _list_file(source, format)
    if format == "table":
        raise UserError(f"{source} is a folder; give the list itself, such as {source / 'clips.csv'}")
    found = scan(source)
    match _recognised(found) if format == "auto" else format:
        case "webdataset":
            return list_tars(found)
        case "ucf101":
            return list_ucf101(found, ucf101_split)
        case "msrvtt":
            return list_msrvtt(found)
        case _:
            return list_folder(found)


def _list_file(source: Path, format: str) -> Listing:
    if format in ("auto", "table") and suffix_of(source.name) in TABLES:
        return list_table(source)
    if format in ("auto", "webdataset") and is_tar(source.name):
        return list_tar(source)
    if format in ("auto", "table", "webdataset"):
        kinds = {"auto": "a list (.csv, .jsonl) or a tar", "table": "a list (.csv, .jsonl)", "webdataset": "a tar"}
        raise UserError(f"{source} is a file that is not {kinds[format]}; give the folder that holds the clips")
    raise UserError(f"{source} is a file; give the folder that holds the clips for the format {format!r}")


def _recognised(found: Scan) -> Format:
    """The one format whose marks the folder bears.

    Raises:
      UserError: it bears those of several.
    """
    marks: dict[Format, str] = {}
    for name in found.files:
        if re.fullmatch(r"(?:.*/)?trainlist0[1-3]\.txt", name):
            marks.setdefault("ucf101", name)
        elif is_tar(name):
            marks.setdefault("webdataset", name)
    for name in annotations(found)[:1]:
        marks["msrvtt"] = name
    media = found.media
    if lists := [name for name in METADATA if name in found.files]:
        marks["folder"] = lists[0]
    elif media and not {"ucf101", "msrvtt"} & marks.keys():  # which have loose clips themselves
        marks["folder"] = media[0]
    if len(marks) > 1:
        kinds = " or ".join(f"{kind!r} ({name})" for kind, name in marks.items())
        raise UserError(f"{found.source} may be read as {kinds}; say which as the format, or part them")
    others = [] if lists else [name for name in found.files if "/" not in name and is_list(found.source / name)]
    if others and not marks:
        raise UserError(f"{found.source} holds no clips, but a list of them; give {found.source / others[0]} instead")
    if others and "folder" in marks:
        # The captions would be lost because their list has another name.
        raise UserError(
            f"{found.source} holds clips and the list {others[0]}; give {found.source / others[0]}, or rename it to "
            f"metadata{suffix_of(others[0])}, or name the format 'folder' to go without it"
        )
    return next(iter(marks), "folder")
