"""Detection of a source's format."""

import os
import re
from pathlib import Path
from typing import Literal

from dit_video.core.errors import MissingError, UserError
from dit_video.core.storage import to_storage_path
from dit_video.data.ingest.formats.folder import METADATA, list_folder
from dit_video.data.ingest.formats.msrvtt import find_annotations, list_msrvtt
from dit_video.data.ingest.formats.rows import TABLE_SUFFIXES, is_list
from dit_video.data.ingest.formats.scan import FolderScan, get_suffix, scan_folder
from dit_video.data.ingest.formats.tables import list_table
from dit_video.data.ingest.formats.tars import is_tar, list_tar, list_tars
from dit_video.data.ingest.formats.types import Listing, ListingFormat
from dit_video.data.ingest.formats.ucf101 import list_ucf101


def list_clips(
    source: str | os.PathLike, *, format: ListingFormat | Literal["auto"] = "auto", ucf101_split: Literal[1, 2, 3] = 1
) -> Listing:
    """Return the clips of a source with their captions and splits; see the package for the formats.

    Nothing is decoded, and the content of media files is not read.

    Args:
      source: a folder, a list of clips, or a tar.
      format: format of the source; "auto" detects it, and the listing holds the result.
      ucf101_split: which of UCF-101's three pairs of train and test lists is read.

    Raises:
      MissingError: `source`, or a list that the format requires, does not exist.
      UserError: there are no clips; the format is ambiguous, or is not the source's; a list is unusable as a whole.
    """
    storage_path = to_storage_path(source)
    if not isinstance(storage_path, Path):
        raise UserError(f"{source} is an address; clips are read from local files, so copy them to this machine first")
    source = storage_path
    if not source.exists():
        raise MissingError(f"no such folder or file: {source}")
    if not source.is_dir():
        return _list_file(source, format)
    if format == "table":
        raise UserError(
            f"{source} is a folder, and format='table' needs a list; give the list itself, a .csv or .jsonl"
        )
    folder = scan_folder(source)
    match _detect_format(folder) if format == "auto" else format:
        case "webdataset":
            return list_tars(folder)
        case "ucf101":
            return list_ucf101(folder, ucf101_split)
        case "msrvtt":
            return list_msrvtt(folder)
        case _:
            return list_folder(folder)


def _list_file(source: Path, format: str) -> Listing:
    if format in ("auto", "table") and get_suffix(source.name) in TABLE_SUFFIXES:
        return list_table(source)
    if format in ("auto", "webdataset") and is_tar(source.name):
        return list_tar(source)
    if format in ("auto", "table", "webdataset"):
        kinds = {"auto": "a list (.csv, .jsonl) or a tar", "table": "a list (.csv, .jsonl)", "webdataset": "a tar"}
        raise UserError(f"{source} is a file, but not {kinds[format]}; give the folder that holds the clips")
    raise UserError(f"{source} is a file, and format={format!r} needs a folder; give the folder that holds the clips")


def _detect_format(folder: FolderScan) -> ListingFormat:
    """Return the one format whose characteristic files the folder has.

    Raises:
      UserError: the folder has those of several formats.
    """
    marks: dict[ListingFormat, str] = {}
    for name in folder.files:
        if re.fullmatch(r"(?:.*/)?trainlist0[1-3]\.txt", name):
            marks.setdefault("ucf101", name)
        elif is_tar(name):
            marks.setdefault("webdataset", name)
    for name in find_annotations(folder)[:1]:
        marks["msrvtt"] = name
    media, metadata_files = folder.media, [name for name in METADATA if name in folder.files]
    if metadata_files:
        marks["folder"] = metadata_files[0]
    elif media and not {"ucf101", "msrvtt"} & marks.keys():  # these two formats have loose clips too
        marks["folder"] = media[0]
    source = folder.source
    if len(marks) > 1:
        formats = " or ".join(f"{kind!r} ({name})" for kind, name in marks.items())
        raise UserError(f"{source} may be read as {formats}; pass one of these as the format, or separate them")
    candidates = () if metadata_files else (name for name in folder.files if "/" not in name)
    other_list = next((name for name in candidates if is_list(source / name)), None)
    if other_list is not None and not marks:
        raise UserError(f"{source} holds no clips, but a list of clips; give {source / other_list} instead")
    if other_list is not None and "folder" in marks:
        # Otherwise the captions would be silently lost, only because their list has another name than metadata.csv.
        raise UserError(
            f"{source} holds clips and the list {other_list}; give {source / other_list}, or rename it to "
            f"metadata{get_suffix(other_list)}, or pass the format 'folder' to ignore the list"
        )
    return next(iter(marks), "folder")
