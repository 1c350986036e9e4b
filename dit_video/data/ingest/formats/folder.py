"""A folder of clips: with a caption file beside each, or with one list, `metadata.csv` or `metadata.jsonl`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from dit_video.core.errors import UserError
from dit_video.data.ingest.formats import captions
from dit_video.data.ingest.formats.listed import Listed, Listing, Rejected, Unusable, finished, quoted
from dit_video.data.ingest.formats.scan import Scan, list_file, reason_of, size_of, suffix_of
from dit_video.data.ingest.formats.tables import find_clips, read_table

METADATA = ("metadata.csv", "metadata.jsonl")


def list_folder(scan: Scan) -> Listing:
    """The clips of a folder: those that its `metadata.csv` or `.jsonl` names, in its order, or else all, by name.

    Raises:
      UserError: no clip; both lists; a list that cannot be used as a whole, see `read_rows`.
    """
    lists = [name for name in METADATA if name in scan.files]
    if len(lists) > 1:
        raise UserError(f"{scan.source} holds {' and '.join(lists)}; keep one of them")
    if lists:
        return _listed(scan, scan.source / lists[0])
    clips: list[Listed] = []
    rejected: list[Rejected] = []
    beside, used = _caption_files(scan), set(scan.media)
    for name in scan.media:
        files = [*beside.get(os.path.splitext(name)[0], ()), *beside.get(name, ())]
        used.update(files)
        try:
            texts = _read_captions(scan, files)
            clips.append(scan.listed(name, texts))
        except Unusable as error:
            rejected.append((name, str(error)))
    unlisted = [name for name in scan.files if name not in used]
    return finished(scan.source, "folder", clips, unlisted=unlisted, rejected=[*rejected, *scan.rejected])


def _caption_files(scan: Scan) -> Mapping[str, Sequence[str]]:
    """The caption files by what stands before their suffix: `clip.txt` and `clip.TXT` under `clip`, and `clip.mp4.txt`
    under `clip.mp4`."""
    found: dict[str, list[str]] = {}
    for name in scan.files:
        if suffix_of(name) in captions.FILES:
            found.setdefault(os.path.splitext(name)[0], []).append(name)
    for names in found.values():
        names.sort(key=lambda name: (captions.FILES.index(suffix_of(name)), name))
    return found


def _read_captions(scan: Scan, names: Sequence[str]) -> tuple[str, ...]:
    texts: list[str] = []
    for name in names:
        try:
            size = size_of(scan.files[name].stat())  # to open a pipe would wait for ever
            if size > captions.LARGEST_FILE:
                raise Unusable(f"has {size:,} bytes, {captions.LARGEST_FILE:,} is the limit of a caption file")
            with open(scan.files[name].path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise Unusable(f"{quoted(name)} {reason_of(error)}") from error
        except Unusable as error:
            raise Unusable(f"{quoted(name)} {error}") from error
        texts += captions.of_file(name, content)
    return captions.tidy(texts)


def _listed(scan: Scan, path: Path) -> Listing:
    table = read_table(path, _inside)
    clips, rejected = find_clips(table, lambda name: _named(scan, name))
    unlisted = [name for name in scan.media if name not in table.rows]
    return finished(scan.source, "folder", clips, unlisted=unlisted, rejected=[*rejected, *scan.rejected])


def _named(scan: Scan, name: str) -> Listed:
    if name in scan.files:
        return scan.listed(name)
    # Hidden, or behind a link to a folder that was read by another name.
    return list_file(name, str(scan.source / name))


def _inside(name: str) -> str:
    # Keyed by the normalised path, so that `a.mp4` and `./a.mp4` are one clip.
    normal = os.path.normpath(name).replace(os.sep, "/")
    if os.path.isabs(normal) or normal.split("/")[0] == "..":
        raise Unusable("lies outside the folder; use paths inside it")
    return normal
