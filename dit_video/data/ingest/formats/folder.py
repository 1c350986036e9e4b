"""Listing of a folder of clips, with a caption file for each or with lists of clips and captions."""

import functools
import itertools
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from dit_video.core.errors import MissingError, UserError
from dit_video.core.storage import open_file
from dit_video.data.ingest.formats.listing import (
    CAPTION_SUFFIXES,
    MAX_CAPTION_FILE_BYTES,
    ListColumns,
    ListedClip,
    Listing,
    ListingOptions,
    Rejection,
    UnusableClipError,
    clean_captions,
    get_suffix,
    make_listing,
    may_hold_captions,
    read_caption_file,
    reject_unusable,
)
from dit_video.data.ingest.formats.lists import (
    TABLE_SUFFIXES,
    ClipTable,
    ListRow,
    check_is_usable,
    check_no_media,
    find_clips,
    is_list,
    read_paired_rows,
    read_rows,
)
from dit_video.data.ingest.formats.scan import FolderScan

METADATA = tuple(f"metadata{suffix}" for suffix in TABLE_SUFFIXES)
"""Names of lists, as in Hugging Face's folders (huggingface.co/docs/hub/datasets-video) and finetrainers."""
_PATH_LISTS = ("videos.txt", "video.txt")
_CAPTION_LISTS = ("captions.txt", "caption.txt", "prompts.txt", "prompt.txt")
"""Names of two lists, of a path and of a caption a line (finetrainers, docs/dataset/README.md)."""
_CAPTION_FOLDER = "captions"
"""Name of a folder of caption files that lie apart from their clips."""
_UNREAD_SUFFIXES = (".yaml", ".yml", ".toml", ".xml", ".xls", ".xlsx", ".ods", ".srt", ".vtt")
_TEXT_SUFFIXES = frozenset((*TABLE_SUFFIXES, *CAPTION_SUFFIXES, *_UNREAD_SUFFIXES))
"""Suffixes of files that may hold captions."""


class ClipList(NamedTuple):
    """A list of clips in a folder, or a pair of lists."""

    name: str
    """Path of the list inside the source."""
    scope: str = ""
    """Folder inside the source that the list is about, with all that lies below it; empty for the whole source."""
    captions: str | None = None
    """Path of the list of captions, if the first one is a list of paths alone."""

    def read_rows(self, scan: FolderScan, columns: ListColumns) -> Iterator[ListRow]:
        """Yield the rows."""
        if self.captions is not None:
            return read_paired_rows(scan.get_document(self.name), scan.get_document(self.captions))
        return read_rows(scan.get_document(self.name), columns)


def find_lists(scan: FolderScan) -> list[ClipList]:
    """Return the lists of a folder and of its subfolders, which are known by their names.

    Raises:
      UserError: If a folder has two lists.
    """
    lists: dict[str, ClipList] = {}
    for clip_list in _iterate_lists(scan):
        other = lists.setdefault(clip_list.scope, clip_list)
        if other != clip_list:
            folder = scan.get_path(clip_list.scope)
            names = f"{posixpath.basename(other.name)} and {posixpath.basename(clip_list.name)}"
            raise UserError(f"{folder} holds both {names}; keep one of them")
    return list(lists.values())


def _iterate_lists(scan: FolderScan) -> Iterator[ClipList]:
    stems = {os.path.splitext(name)[0] for name in scan.media}
    for name in scan.files:
        folder, base = posixpath.split(name)
        if base in METADATA and (base != "metadata.json" or _holds_json_list(scan, name)):
            yield ClipList(name, folder)
        if base in _PATH_LISTS and os.path.splitext(name)[0] not in stems:  # else it is a clip's caption
            texts = (posixpath.join(folder, each) for each in _CAPTION_LISTS)
            yield from (ClipList(name, folder, each) for each in texts if each in scan.files)


def _holds_json_list(scan: FolderScan, name: str) -> bool:
    """Return whether a JSON file is meant as a list, though it may be damaged: it begins as one, or is one."""
    try:
        with open_file(scan.get_path(name)) as file:
            begins = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    except OSError:
        return False
    return begins or is_list(scan.get_document(name), ListColumns())


def list_folder(scan: FolderScan, options: ListingOptions) -> Listing:
    """Return the clips of a folder: those that its lists name, in their order, and all others that no list is about.

    A list is about its folder and what lies below. If there is none with a known name, and no clip has a caption file,
    a list with any name is read; it is about all clips, as is a list that the options name.

    Where no clip has a caption, the files that are left out are all that are not read.

    Raises:
      UserError: If there is no clip, there are several lists, or a list is unusable as a whole (see `read_rows`).
      MissingError: If the list that the options name does not exist.
    """
    lists = find_lists(scan) if options.list_path is None else [_get_list(scan, options.list_path)]
    loose, unlisted, rejected = _list_loose_clips(scan, {each.scope for each in lists})
    if not lists and (other := _choose_other_list(scan, options.columns, loose, unlisted)) is not None:
        lists, loose, unlisted, rejected = [other], [], [], []
    table, by_base = ClipTable({}, [], is_merged=len(lists) > 1), _index_by_base(scan)
    for each in lists:
        find_name = functools.partial(_find_name, scan, by_base, posixpath.dirname(each.name))
        table.add(each.name, each.read_rows(scan, options.columns), find_name)
    listed, table_rejected = find_clips(table, scan.make_clip)
    clips = [*listed, *(clip for clip in loose if clip.name not in table.rows)]
    if not clips:
        for each in lists:
            check_is_usable(scan.get_document(each.name), table)
    scopes = {each.scope for each in lists}
    read_names = {*table.rows, *itertools.chain.from_iterable((each.name, each.captions) for each in lists)}
    others = scan.media if any(clip.captions for clip in clips) else scan.files
    unlisted += [name for name in others if name not in read_names and _is_covered(name, scopes)]
    return make_listing(
        scan.source,
        "folder",
        clips,
        unlisted=sorted(unlisted),
        rejected=[*table_rejected, *rejected, *scan.rejected],
    )


def _get_list(scan: FolderScan, name: str) -> ClipList:
    if name not in scan.files:
        raise MissingError(f"list_path={name!r} is invalid: {scan.source} holds no such file; name one of its lists")
    return ClipList(name)


def _is_covered(name: str, scopes: Collection[str]) -> bool:
    """Return whether a file lies in one of these folders or below one of them."""
    folder = posixpath.dirname(name)
    while folder and folder not in scopes:
        folder = posixpath.dirname(folder)
    return folder in scopes


def _list_loose_clips(scan: FolderScan, scopes: Collection[str]) -> tuple[list[ListedClip], list[str], list[Rejection]]:
    """Return the clips that no list is about, with captions in files of their own; files left out; and rejections."""
    clips: list[ListedClip] = []
    rejected: list[Rejection] = []
    media = [name for name in scan.media if not _is_covered(name, scopes)]
    names = _match_caption_files(media, _find_caption_files(scan))
    used_names = {*media, *itertools.chain.from_iterable(names.values())}
    read = scan.make_reader(itertools.chain.from_iterable(names.values()), MAX_CAPTION_FILE_BYTES)
    for name in media:
        with reject_unusable(rejected, name):
            texts = _read_captions(read, names[name])
            used_names.difference_update(each for each in names[name] if each not in texts)
            clips.append(scan.make_clip(name, clean_captions(itertools.chain.from_iterable(texts.values()))))
    return clips, [name for name in scan.files if name not in used_names and not _is_covered(name, scopes)], rejected


def _choose_other_list(
    scan: FolderScan, columns: ListColumns, clips: Sequence[ListedClip], unlisted: Sequence[str]
) -> ClipList | None:
    """Return the list of clips that has a name of its own, if there is one.

    Otherwise the captions would be silently lost, only because their list has another name than metadata.csv. A JSON
    file is looked into, as a whole, only where no clip has a caption; or where one has none, and the file is called
    like no clip.

    Raises:
      UserError: If there are several lists, or clips have caption files, too; there is a list, and no clip; no clip
        has a caption, and there is a file that may hold captions; or a table holds media itself.
    """
    has_captions, is_complete = any(clip.captions for clip in clips), all(clip.captions for clip in clips)
    tables = [name for name in unlisted if get_suffix(name) in TABLE_SUFFIXES and scan.is_file(name)]
    if has_captions:
        clip_parts = {_get_first_part(name) for name in scan.media}
        tables = [
            name
            for name in tables
            if get_suffix(name) != ".json" or (not is_complete and _get_first_part(name) not in clip_parts)
        ]
    names = [name for name in tables if is_list(scan.get_document(name), columns)]
    if not has_captions and not (names and scan.media):
        for table in names or tables:
            check_no_media(scan.get_document(table), columns if scan.media else None)
    if not names:
        texts = (name for name in unlisted if get_suffix(name) in _TEXT_SUFFIXES and scan.is_file(name))
        unread = (name for name in texts if may_hold_captions(name))
        if clips and not has_captions and (name := next(unread, None)) is not None:
            rule = f"{scan.source} holds clips without captions and {name}, which is no list or caption that is read"
            fix = "write the captions to metadata.csv (file_name,text), ingest a list of other columns with"
            options = "--columns.name … --columns.captions …"
            raise UserError(f"{rule}; {fix} tools/ingest.py {options}, or move it elsewhere")
        return None
    if not scan.media:
        raise UserError(f"{scan.source} holds no clips, but a list of clips; give {scan.get_path(names[0])} instead")
    if len(names) > 1:
        raise UserError(
            f"{scan.source} holds the lists {' and '.join(names)}; ingest one of them with tools/ingest.py --list-path "
            f"{names[0]}, or move the others elsewhere"
        )
    if has_captions:
        rule = f"{scan.source} holds clips with caption files and the list {names[0]}"
        raise UserError(f"{rule}; ingest it with tools/ingest.py --list-path {names[0]}, or move it elsewhere")
    return ClipList(names[0])


def _get_first_part(name: str) -> str:
    """Return the last part of a name up to its first dot."""
    return posixpath.basename(name).partition(".")[0]


def _find_caption_files(scan: FolderScan) -> Mapping[str, Sequence[str]]:
    """Return the caption files by their name without suffix.

    `clip.txt` and `clip.TXT` are under `clip`, and `clip.mp4.txt` is under `clip.mp4`.
    """
    files_by_stem: dict[str, list[str]] = {}
    for name in scan.files:
        if get_suffix(name) in CAPTION_SUFFIXES:
            files_by_stem.setdefault(os.path.splitext(name)[0], []).append(name)
    for names in files_by_stem.values():
        names.sort(key=lambda name: (CAPTION_SUFFIXES.index(get_suffix(name)), name))
    return files_by_stem


def _match_caption_files(media: Sequence[str], files: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the caption files of each clip: those next to it or, if no clip has one, those in `captions/`.

    There they are found by the clip's name without folders, if no other clip has it.
    """
    names = {name: [*files.get(os.path.splitext(name)[0], ()), *files.get(name, ())] for name in media}
    if any(names.values()):
        return names
    apart = {
        posixpath.basename(stem): found
        for stem, found in files.items()
        if posixpath.basename(posixpath.dirname(stem)) == _CAPTION_FOLDER
    }
    bases = {name: os.path.splitext(posixpath.basename(name))[0] for name in media}
    counts = Counter(bases.values())
    return {name: [*apart.get(base, ())] if counts[base] == 1 else [] for name, base in bases.items()}


def _read_captions(read: Callable[[str], bytes], names: Sequence[str]) -> dict[str, list[str]]:
    """Return the captions in each of these files, without JSON files that have no field of captions."""
    texts = dict[str, list[str]]()
    for name in names:
        try:
            content = read(name)
        except UnusableClipError as error:
            raise UnusableClipError(f"{name!r} {error}") from error
        if (found := read_caption_file(name, content)) is not None:
            texts[name] = found
    return texts


def _index_by_base(scan: FolderScan) -> Mapping[str, list[str]]:
    """Return the paths of media files by the last part of their names."""
    names: dict[str, list[str]] = {}
    for name in scan.media:
        names.setdefault(posixpath.basename(name), []).append(name)
    return names


def _find_name(scan: FolderScan, by_base: Mapping[str, list[str]], folder: str, name: str) -> str:
    """Return the path inside the source of a clip that a list in `folder` names.

    A name without a folder may belong to a file in another folder (OpenVid-1M). Paths are normalised, so that `a.mp4`
    and `./a.mp4` are one clip.

    Raises:
      UnusableClipError: If the path lies outside of the source, or several files have the name.
    """
    path = os.path.normpath(os.path.join(folder, name)).replace(os.sep, "/")
    if os.path.isabs(name) or path.split("/")[0] == "..":
        raise UnusableClipError("lies outside the folder; use paths inside it")
    others = by_base.get(name, []) if path not in scan.files else []
    if len(others) > 1:
        raise UnusableClipError(f"may be {others[0]!r} or {others[1]!r}; write the path")
    return others[0] if others else path
