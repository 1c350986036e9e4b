"""Listing of a folder of clips, with a caption file for each or with one list, `metadata.csv` or `metadata.jsonl`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from dit_video.core.errors import UserError
from dit_video.data.ingest.formats import captions
from dit_video.data.ingest.formats.scan import FolderScan, describe_os_error, get_file_size, get_suffix, list_file
from dit_video.data.ingest.formats.tables import find_clips, read_table
from dit_video.data.ingest.formats.types import (
    ListedClip,
    Listing,
    Rejection,
    UnusableClipError,
    make_listing,
    reject_unusable,
)

METADATA = ("metadata.csv", "metadata.jsonl")


def list_folder(scan: FolderScan) -> Listing:
    """Return the clips that `metadata.csv` or `.jsonl` names, in its order; without such a list all clips, by name.

    Raises:
      UserError: there is no clip, there are both lists, or the list is unusable as a whole (see `read_rows`).
    """
    lists = [name for name in METADATA if name in scan.files]
    if len(lists) > 1:
        raise UserError(f"{scan.source} holds both {' and '.join(lists)}; keep one of them")
    if lists:
        return _list_metadata(scan, scan.source / lists[0])
    clips: list[ListedClip] = []
    rejected: list[Rejection] = []
    caption_files, used_names = _find_caption_files(scan), set(scan.media)
    for name in scan.media:
        caption_names = [*caption_files.get(os.path.splitext(name)[0], ()), *caption_files.get(name, ())]
        used_names.update(caption_names)
        with reject_unusable(rejected, name):
            clips.append(scan.make_clip(name, _read_captions(scan, caption_names)))
    unlisted = [name for name in scan.files if name not in used_names]
    return make_listing(scan.source, "folder", clips, unlisted=unlisted, rejected=[*rejected, *scan.rejected])


def _find_caption_files(scan: FolderScan) -> Mapping[str, Sequence[str]]:
    """Return the caption files by their name without suffix.

    `clip.txt` and `clip.TXT` are under `clip`, and `clip.mp4.txt` is under `clip.mp4`.
    """
    files_by_stem: dict[str, list[str]] = {}
    for name in scan.files:
        if get_suffix(name) in captions.CAPTION_SUFFIXES:
            files_by_stem.setdefault(os.path.splitext(name)[0], []).append(name)
    for names in files_by_stem.values():
        names.sort(key=lambda name: (captions.CAPTION_SUFFIXES.index(get_suffix(name)), name))
    return files_by_stem


def _read_captions(scan: FolderScan, names: Sequence[str]) -> tuple[str, ...]:
    texts: list[str] = []
    for name in names:
        try:
            size = get_file_size(scan.files[name].stat())  # first, as opening a pipe would block forever
            if size > captions.MAX_FILE_BYTES:
                raise UnusableClipError(captions.TOO_LARGE.format(size))
            content = Path(scan.files[name].path).read_bytes()
        except OSError as error:
            raise UnusableClipError(f"{name!r} {describe_os_error(error)}") from error
        except UnusableClipError as error:
            raise UnusableClipError(f"{name!r} {error}") from error
        texts += captions.read_file(name, content)
    return captions.clean_captions(texts)


def _list_metadata(scan: FolderScan, path: Path) -> Listing:
    table = read_table(path, _normalize_name)
    clips, rejected = find_clips(table, lambda name: _find_clip(scan, name))
    unlisted = [name for name in scan.media if name not in table.rows]
    return make_listing(scan.source, "folder", clips, unlisted=unlisted, rejected=[*rejected, *scan.rejected])


def _find_clip(scan: FolderScan, name: str) -> ListedClip:
    if name in scan.files:
        return scan.make_clip(name)
    # The scan has no such name: the file is hidden, or behind a link to a folder that was read under another name.
    return list_file(name, str(scan.source / name))


def _normalize_name(name: str) -> str:
    # Rows are grouped by the normalised path, so that `a.mp4` and `./a.mp4` are one clip.
    normal = os.path.normpath(name).replace(os.sep, "/")
    if os.path.isabs(normal) or normal.split("/")[0] == "..":
        raise UnusableClipError("lies outside the folder; use paths inside it")
    return normal
