"""Formats of sources, and detection of a source's format."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dit_video.core.errors import MissingError, UserError
from dit_video.core.registry import load_entry_points
from dit_video.core.storage import StoragePath, StoragePathLike, convert_storage_errors, to_storage_path
from dit_video.data.ingest.formats.folder import find_lists, list_folder
from dit_video.data.ingest.formats.listing import Listing, ListingOptions, find_split, get_suffix
from dit_video.data.ingest.formats.lists import TABLE_SUFFIXES, list_table
from dit_video.data.ingest.formats.published import find_annotations, list_msrvtt, list_ucf101
from dit_video.data.ingest.formats.scan import FolderScan, scan_folder
from dit_video.data.ingest.formats.tars import is_tar, list_tar, list_tars


@dataclass(frozen=True, kw_only=True)
class SourceFormat:
    """A format of sources of clips: folders, single files, or both."""

    name: str
    find_marks: Callable[[FolderScan], Iterable[str]] = lambda folder: ()
    """Function that returns the files by which a folder of this format is known: none in another folder."""
    list_folder: Callable[[FolderScan, ListingOptions], Listing] | None = None
    """Function that lists the clips of a folder."""
    has_loose_clips: bool = False
    """True if the folder's clips are files of their own, which a folder without a format has too."""
    is_file: Callable[[str], bool] = lambda name: False
    """Function that says whether a file of this name is a source of this format."""
    list_file: Callable[[StoragePath, ListingOptions], Listing] | None = None
    """Function that lists the clips of such a file."""


_FORMATS = {
    each.name: each
    for each in (
        SourceFormat(name="table", is_file=lambda name: get_suffix(name) in TABLE_SUFFIXES, list_file=list_table),
        SourceFormat(
            name="webdataset",
            find_marks=lambda folder: filter(is_tar, folder.files),
            list_folder=list_tars,
            is_file=is_tar,
            list_file=list_tar,
        ),
        SourceFormat(
            name="ucf101",
            find_marks=lambda folder: filter(re.compile(r"(?:.*/)?trainlist0[1-3]\.txt").fullmatch, folder.files),
            list_folder=list_ucf101,
            has_loose_clips=True,
        ),
        SourceFormat(name="msrvtt", find_marks=find_annotations, list_folder=list_msrvtt, has_loose_clips=True),
        SourceFormat(name="folder", list_folder=list_folder),
    )
}
"""Formats by name."""


def register_format(source_format: SourceFormat) -> None:
    """Add a format of another package; one of the same name takes its place."""
    _FORMATS[source_format.name] = source_format


def list_clips(source: StoragePathLike, *, format: str = "auto", options: ListingOptions = ListingOptions()) -> Listing:
    """Return the clips of a source with their captions and splits; see the package for the formats.

    Nothing is decoded, and the content of media files is not read.

    Args:
      source: A folder, a list of clips, or a tar; a path of this machine or an address.
      format: Name of the source's format; "auto" detects it, and the listing holds the result.
      options: Options of the formats.

    Raises:
      MissingError: If `source`, or a list that the format requires, does not exist.
      UserError: If there are no clips; the format is unknown or ambiguous, or is not the source's; a list is unusable
        as a whole.
    """
    load_entry_points()
    if format not in ("auto", *_FORMATS):
        raise UserError(f"format={format!r} is invalid: no such format is known. Use auto, {', '.join(_FORMATS)}.")
    path = to_storage_path(source)
    with convert_storage_errors(path):
        exists, is_folder = path.exists(), path.is_dir()
    if not exists:
        raise MissingError(f"no such folder or file: {path}")
    if not is_folder:
        return _complete_splits(_list_file(path, format, options))
    folder = scan_folder(path, follow_links=options.follow_links)
    chosen = _detect_format(folder) if format == "auto" else _FORMATS[format]
    if chosen.list_folder is None:
        fix = f"give the list itself ({', '.join(TABLE_SUFFIXES)})"
        raise UserError(f"{path} is a folder, and format='{format}' needs a list; {fix}")
    return _complete_splits(chosen.list_folder(folder, options))


def _complete_splits(listing: Listing) -> Listing:
    """Give clips whose source names no split the split of their first folder."""
    clips = (clip._replace(split=clip.split or find_split(clip.name)) for clip in listing.clips)
    return listing._replace(clips=tuple(clips))


def _list_file(source: StoragePath, format: str, options: ListingOptions) -> Listing:
    candidates = list(_FORMATS.values()) if format == "auto" else [_FORMATS[format]]
    for each in candidates:
        if each.list_file is not None and each.is_file(source.name):
            return each.list_file(source, options)
    table = f"a list ({', '.join(TABLE_SUFFIXES)})"
    kinds = {"auto": f"{table} or a tar", "table": table, "webdataset": "a tar"}
    if format in kinds:
        raise UserError(f"{source} is a file, but not {kinds[format]}; give the folder that holds the clips")
    raise UserError(f"{source} is a file, and format={format!r} needs a folder; give the folder that holds the clips")


def _detect_format(folder: FolderScan) -> SourceFormat:
    """Return the one format whose characteristic files the folder has.

    Raises:
      UserError: If the folder has characteristic files of several formats.
    """
    found = {name: next(iter(each.find_marks(folder)), None) for name, each in _FORMATS.items()}
    marks = {name: mark for name, mark in found.items() if mark is not None}
    media, lists = folder.media, find_lists(folder)
    if lists:
        marks["folder"] = lists[0].name
    elif media and not any(_FORMATS[name].has_loose_clips for name in marks):
        marks["folder"] = media[0]
    source = folder.source
    if len(marks) > 1:
        formats = " or ".join(f"{kind!r} ({name})" for kind, name in marks.items())
        fix = f"choose one with tools/ingest.py {source} DATA --format {next(iter(marks))}, or separate them"
        raise UserError(f"{source} may be read as {formats}; {fix}")
    return _FORMATS[next(iter(marks), "folder")]
