"""Which clips a source holds, and their captions: from `metadata.csv`, or from a text file beside each clip."""

import csv
import os
from pathlib import Path
from typing import NamedTuple

from dit_video.errors import MissingError, UserError

METADATA = "metadata.csv"
_VIDEOS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv", ".wmv", ".flv"}
_IMAGES = {".gif", ".apng", ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
MEDIA = frozenset(_VIDEOS | _IMAGES)


class Listed(NamedTuple):
    """A file that is to be ingested."""

    name: str
    """Its path inside the source, with forward slashes; unique."""
    captions: tuple[str, ...]
    size: int
    """bytes"""
    path: str
    """The file that holds it: itself, or a tar."""
    offset: int | None = None
    """Where it begins in a tar; None for a file of its own."""
    split: str = "train"

    def read(self) -> bytes:
        """Its bytes.

        Raises:
          OSError: the file cannot be read, or has become shorter.
        """
        with open(self.path, "rb") as file:
            if self.offset is None:
                return file.read()
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) != self.size:
            raise OSError(f"{self.path} has become shorter")
        return content


class Listing(NamedTuple):
    """What a source holds."""

    clips: tuple[Listed, ...]
    unlisted: tuple[str, ...] = ()
    """Media files that the source's list of captions doesn't name; they are left out."""
    rejected: tuple[tuple[str, str], ...] = ()
    """(name, reason) of entries that cannot be clips, such as a tar's entry outside of it."""


def list_clips(source: Path) -> Listing:
    """The clips of a folder with their captions.

    Raises:
      MissingError, UserError: see `ingest`.
    """
    if not source.exists():
        raise MissingError(f"no such folder: {source}")
    if not source.is_dir():
        raise UserError(f"{source} is a file; give the folder that holds the clips")
    media = sorted(
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.suffix.lower() in MEDIA and path.is_file() and not _hidden(path.relative_to(source))
    )
    if (source / METADATA).is_file():
        captions = _read_metadata(source)
        unlisted = tuple(name for name in media if name not in captions)
    else:
        captions = {name: _sidecar(source / name) for name in media}
        unlisted = ()
    if not captions:
        raise UserError(
            f"{source} holds no clips; put videos or images there, with captions in {METADATA} (file_name,text)"
        )
    for name in captions:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the file name {name!r} in {source} is not UTF-8; rename the file") from error
    clips = tuple(
        Listed(name, (caption,) if caption else (), (source / name).stat().st_size, str(source / name))
        for name, caption in captions.items()
    )
    return Listing(clips, unlisted)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_metadata(source: Path) -> dict[str, str]:
    path = source / METADATA
    captions: dict[str, str] = {}
    missing = []
    for name, text in _metadata_rows(path):
        # Keyed by the normalised path, so that `a.mp4` and `./a.mp4` are one clip.
        name = os.path.normpath(name).replace(os.sep, "/")
        if Path(name).is_absolute() or name.split("/")[0] == "..":
            raise UserError(f"{path} names {name}, which lies outside the folder; use paths inside {source}")
        if name in captions:
            raise UserError(f"{path} names {name} twice; a clip has one row")
        captions[name] = text
        if not (source / name).is_file():
            missing.append(name)
    if missing:
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise UserError(
            f"{path} names {len(captions)} files, {len(missing)} of them do not exist ({shown}); fix the names"
        )
    return captions


def _metadata_rows(path: Path) -> list[tuple[str, str]]:
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or ()
            if absent := [column for column in ("file_name", "text") if column not in columns]:
                raise UserError(
                    f"{path} has no column {' and '.join(absent)}, its first line is {','.join(columns)!r}; "
                    "it must name the columns file_name,text"
                )
            for row in reader:
                name = (row["file_name"] or "").strip()
                if not name:
                    raise UserError(
                        f"{path}, line {reader.line_num}: file_name is empty; name a file or remove the line"
                    )
                rows.append((name, (row["text"] or "").strip()))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV file ({error}); write it as file_name,text") from error
    return rows


def _sidecar(clip: Path) -> str:
    path = clip.with_suffix(".txt")
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
