"""Lists of clips: rows grouped by clip, and the clips found at the paths in the rows."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from dit_video.data.ingest.formats import captions
from dit_video.data.ingest.formats.rows import ListRow, read_rows
from dit_video.data.ingest.formats.scan import list_file
from dit_video.data.ingest.formats.types import (
    ListedClip,
    Listing,
    Rejection,
    UnusableClipError,
    check_name,
    make_listing,
    reject_unusable,
)


class ClipTable(NamedTuple):
    """Rows of a list, grouped by clip."""

    rows: Mapping[str, list[ListRow]]
    """Rows of each clip by its normalised name, in the order in which clips are first named."""
    rejected: list[Rejection]
    """Rows that belong to no clip, by file and line."""


def read_table(path: Path, key: Callable[[str], str]) -> ClipTable:
    """Return the rows of a list, grouped by clip.

    Args:
      path: the list.
      key: normalises a name, so that a clip has one key; raises `UnusableClipError` for an invalid name.

    Raises:
      UserError: the list is unusable as a whole, see `read_rows`.
    """
    rows: dict[str, list[ListRow]] = {}
    rejected: list[Rejection] = []
    for row in read_rows(path):
        if not row.name:
            rejected.append((f"{path.name}, line {row.line}", row.problem))
            continue
        with reject_unusable(rejected, row.name, f"line {row.line}: "):
            check_name(row.name)
            rows.setdefault(key(row.name), []).append(row)
    return ClipTable(rows, rejected)


def find_clips(table: ClipTable, find: Callable[[str], ListedClip]) -> tuple[list[ListedClip], list[Rejection]]:
    """Return the clips of a list with their captions, and the entries of the list that cannot be used.

    Args:
      table: the list.
      find: returns the clip of a key of the table; raises `FileNotFoundError` or `UnusableClipError`.
    """
    clips: list[ListedClip] = []
    rejected = [*table.rejected]
    for key, rows in table.rows.items():
        line = rows[0].line
        try:
            clip = find(key)
            texts: list[str] = []
            for row in rows:
                line = row.line
                texts += row.clean_captions()
            clips.append(clip._replace(captions=captions.clean_captions(texts)))
        except FileNotFoundError:
            rejected.append((rows[0].name, f"line {line} names it, but it is not there"))
        except UnusableClipError as error:
            rejected.append((rows[0].name, f"line {line}: {error}"))
    return clips, rejected


def list_table(source: Path) -> Listing:
    """Return the clips of a list whose paths are absolute, or relative to its folder.

    A clip is named by its path relative to that folder. If any clip lies outside of it, all are named by their paths
    relative to the deepest folder that contains all of them. Rejected rows keep the name that is in the list.

    Raises:
      UserError: there is no clip, or the list is unusable as a whole, see `read_rows`.
    """
    root = os.path.abspath(source.parent)
    table = read_table(source, lambda name: os.path.normpath(os.path.join(root, name)))
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


def _make_relative(path: str, home: str) -> str:
    return os.path.relpath(path, home).replace(os.sep, "/")
