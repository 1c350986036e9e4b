"""Lists of clips: their rows gathered by clip, and the clips found where the rows say."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from dit_video.data.ingest.formats import captions
from dit_video.data.ingest.formats.listed import Listed, Listing, Rejected, Unusable, check_name, finished
from dit_video.data.ingest.formats.rows import Row, read_rows
from dit_video.data.ingest.formats.scan import list_file


class Table(NamedTuple):
    """What a list says, by clip."""

    rows: Mapping[str, list[Row]]
    """The rows of each clip, by a name that is one for all the names it goes by; in the order in which clips are first
    named."""
    rejected: list[Rejected]
    """rows that are no clip's, by their lines"""


def read_table(path: Path, key: Callable[[str], str]) -> Table:
    """The rows of a list, gathered by clip.

    Args:
      path: the list.
      key: makes one name of those that a clip goes by; raises `Unusable` where no clip may have the name.

    Raises:
      UserError: the list cannot be used as a whole, see `read_rows`.
    """
    rows: dict[str, list[Row]] = {}
    rejected: list[Rejected] = []
    for row in read_rows(path):
        if not row.name:
            rejected.append((f"{path.name}, line {row.line}", row.problem))
            continue
        try:
            check_name(row.name)
            rows.setdefault(key(row.name), []).append(row)
        except Unusable as error:
            rejected.append((row.name, f"line {row.line}: {error}"))
    return Table(rows, rejected)


def find_clips(table: Table, find: Callable[[str], Listed]) -> tuple[list[Listed], list[Rejected]]:
    """The clips of a list with their captions, and what of the list cannot be used.

    Args:
      table: the list.
      find: the clip of a name of the table; raises `FileNotFoundError` or `Unusable`.
    """
    clips: list[Listed] = []
    rejected = [*table.rejected]
    for key, rows in table.rows.items():
        line = rows[0].line
        try:
            clip = find(key)
            texts: list[str] = []
            for row in rows:
                line = row.line
                texts += row.captions()
            clips.append(clip._replace(captions=captions.tidy(texts)))
        except FileNotFoundError:
            rejected.append((rows[0].name, f"line {line} names it, but it is not there"))
        except Unusable as error:
            rejected.append((rows[0].name, f"line {line}: {error}"))
    return clips, rejected


def list_table(source: Path) -> Listing:
    """The clips of a list whose paths are absolute, or relative to its folder.

    A clip is named by its path relative to that folder; where one of the clips lies outside of it, all are named by
    their paths relative to the deepest folder that holds them all. What cannot be used goes by what the list calls it.

    Raises:
      UserError: no clip, or a list that cannot be used as a whole, see `read_rows`.
    """
    home = os.path.abspath(source.parent)
    table = read_table(source, lambda name: os.path.normpath(os.path.join(home, name)))
    found, rejected = find_clips(table, lambda path: list_file(_relative(path, home), path))
    folders = {os.path.dirname(clip.path) for clip in found}
    if found and os.path.commonpath([home, *folders]) != home:
        home = os.path.commonpath(folders)
    clips: list[Listed] = []
    for clip in found:
        try:
            check_name(name := _relative(clip.path, home))
            clips.append(clip._replace(name=name))
        except Unusable as error:  # the name of a folder between
            rejected.append((clip.name, str(error)))
    return finished(source, "table", clips, rejected=rejected)


def _relative(path: str, home: str) -> str:
    return os.path.relpath(path, home).replace(os.sep, "/")
