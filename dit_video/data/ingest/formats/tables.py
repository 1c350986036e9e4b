"""Lists of clips: rows grouped by clip, and the clips found at the paths in the rows."""

import os
import posixpath
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from upath import UPath

from dit_video.core.storage import StoragePath
from dit_video.data.ingest.formats import captions
from dit_video.data.ingest.formats.rows import ListRow, read_rows
from dit_video.data.ingest.formats.scan import list_file, scan_folder
from dit_video.data.ingest.formats.types import (
    ListedClip,
    Listing,
    ListingOptions,
    Rejection,
    UnusableClipError,
    check_name,
    make_listing,
    reject_unusable,
)


class ClipTable(NamedTuple):
    """Rows of a list, or of several lists, grouped by clip."""

    rows: dict[str, list[ListRow]]
    """Rows of each clip by its normalised name, in the order in which clips are first named."""
    rejected: list[Rejection]
    """Rows that belong to no clip, by file and line."""
    is_merged: bool = False
    """True if messages name the list of each row, as there are several."""

    def add(self, name: str, rows: Iterable[ListRow], key: Callable[[str], str]) -> None:
        """Add the rows of a list.

        Args:
          name: name of the list in messages.
          rows: its rows.
          key: normalises a name, so that a clip has one key; raises `UnusableClipError` for an invalid name.

        Raises:
          UserError: the list is unusable as a whole, see `read_rows`.
        """
        for row in rows:
            if not row.name:
                self.rejected.append((f"{name}, {row.location}", row.problem))
                continue
            if self.is_merged:
                row = row._replace(location=f"{name}, {row.location}")
            with reject_unusable(self.rejected, row.name, f"{row.location}: "):
                check_name(row.name)
                self.rows.setdefault(key(row.name), []).append(row)


def find_clips(table: ClipTable, find: Callable[[str], ListedClip]) -> tuple[list[ListedClip], list[Rejection]]:
    """Return the clips of a list with their captions, and the entries of the list that cannot be used.

    Args:
      table: the list.
      find: returns the clip of a key of the table; raises `FileNotFoundError` or `UnusableClipError`.
    """
    clips: list[ListedClip] = []
    rejected = [*table.rejected]
    for key, rows in table.rows.items():
        location = rows[0].location
        try:
            clip = find(key)
            texts: list[str] = []
            splits: list[str] = []
            for row in rows:
                location = row.location
                texts += row.clean_captions()
                splits += filter(None, [row.find_split()])
            if len(set(splits)) > 1:
                raise UnusableClipError(
                    f"is in the splits {' and '.join(sorted(set(splits)))}; name it for one of them"
                )
            clips.append(clip._replace(captions=captions.clean_captions(texts), split=splits[0] if splits else ""))
        except FileNotFoundError:
            rejected.append((rows[0].name, f"{location} names it, but it is not there"))
        except UnusableClipError as error:
            rejected.append((rows[0].name, f"{location}: {error}"))
    return clips, rejected


def list_table(source: StoragePath, options: ListingOptions) -> Listing:
    """Return the clips of a list whose paths are absolute, or relative to its folder; in a bucket, below its folder.

    A clip is named by its path relative to that folder. If any clip lies outside of it, all are named by their paths
    relative to the deepest folder that contains all of them. Rejected rows keep the name that is in the list.

    Raises:
      UserError: there is no clip, or the list is unusable as a whole, see `read_rows`.
    """
    if not isinstance(source, Path):
        return _list_remote_table(source, options)
    root = os.path.abspath(source.parent)
    table = ClipTable({}, [])
    table.add(source.name, read_rows(source, options.columns), lambda name: os.path.normpath(os.path.join(root, name)))
    found_clips, rejected = find_clips(table, lambda path: list_file(_make_relative(path, root), path))
    folders = {os.path.dirname(clip.path) for clip in found_clips}
    if found_clips and os.path.commonpath([root, *folders]) != root:
        root = os.path.commonpath(folders)
    clips: list[ListedClip] = []
    for clip in found_clips:
        with reject_unusable(rejected, clip.name):  # if a folder between the root and the clip has an invalid name
            check_name(name := _make_relative(clip.path, root))
            clips.append(clip._replace(name=name))
    return make_listing(source, "table", clips, rejected=rejected)


def _list_remote_table(source: UPath, options: ListingOptions) -> Listing:
    scan, root = scan_folder(source.parent), str(source.parent).rstrip("/") + "/"

    def find_name(name: str) -> str:
        path = posixpath.normpath(name.removeprefix(root))
        if "://" in name.removeprefix(root) or path.startswith(("/", "../")):
            raise UnusableClipError(f"lies outside of {root}; a list in a bucket names files below its folder")
        return path

    table = ClipTable({}, [])
    table.add(source.name, read_rows(source, options.columns), find_name)
    clips, rejected = find_clips(table, scan.make_clip)
    return make_listing(source, "table", clips, rejected=rejected)


def _make_relative(path: str, home: str) -> str:
    return os.path.relpath(path, home).replace(os.sep, "/")
