"""Listing of WebDataset: tars in which members with the same key form one sample.

A member's key is its path up to the first dot of its last part (`a/0001.mp4` and `a/0001.txt` have the key `a/0001`),
as in WebDataset's `base_plus_ext`. Members with the same key need not be adjacent here.

Source: https://github.com/webdataset/webdataset (webdataset/tariterators.py)
"""

import io
import itertools
import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dit_video.core.errors import UserError
from dit_video.core.storage import StoragePath, open_file
from dit_video.data.ingest.formats.listing import (
    CAPTION_FILE_TOO_LARGE,
    CAPTION_SUFFIXES,
    MAX_CAPTION_FILE_BYTES,
    MEDIA,
    ListedClip,
    Listing,
    ListingOptions,
    Rejection,
    UnusableClipError,
    check_name,
    clean_captions,
    get_suffix,
    make_listing,
    read_caption_file,
    reject_unusable,
)
from dit_video.data.ingest.formats.scan import FolderScan, describe_os_error, get_file_size

TAR_SUFFIX = ".tar"
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
MAX_HEADER_BYTES = 1 << 20
"""Maximum size of an entry's headers, with its name and its attributes."""
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


def list_tar(source: StoragePath, options: ListingOptions) -> Listing:
    """Return the clips of one tar, named by their paths in it. Where none has a caption, all else in it is left out.

    Raises:
      UserError: If the file is compressed, or is not a tar.
    """
    try:
        if isinstance(source, Path):
            get_file_size(source.stat())  # first, as opening a pipe would block forever
        clips, rejected, unread = _list_shard(source, "")
    except UnusableClipError as error:
        raise UserError(f"{source} {error}; make it readable") from error
    unlisted = () if any(clip.captions for clip in clips) else unread
    return make_listing(source, "webdataset", clips, unlisted=unlisted, rejected=rejected)


def list_tars(scan: FolderScan, options: ListingOptions) -> Listing:
    """Return the clips of a folder of tars, named `shard.tar/path/in/it`; media next to the tars are left out.

    Where no clip has a caption, the files that are left out are all that are not read.

    Raises:
      UserError: If a tar is compressed.
    """
    clips: list[ListedClip] = []
    rejected: list[Rejection] = []
    unlisted: list[str] = []
    for name in scan.files:
        if not is_tar(name):
            unlisted.append(name)
            continue
        with reject_unusable(rejected, name):
            scan.make_clip(name)
            shard_clips, shard_rejected, unread = _list_shard(scan.get_document(name), name + "/")
            clips += shard_clips
            rejected += shard_rejected
            unlisted += unread
    if any(clip.captions for clip in clips):
        unlisted = scan.media
    return make_listing(scan.source, "webdataset", clips, unlisted=unlisted, rejected=[*rejected, *scan.rejected])


def is_tar(name: str) -> bool:
    """Return whether a name has the suffix of a tar, compressed or not."""
    return name.lower().endswith((TAR_SUFFIX, *COMPRESSED_SUFFIXES))


def _list_shard(path: StoragePath, prefix: str) -> tuple[list[ListedClip], list[Rejection], list[str]]:
    """Return the clips, the rejected members and the names of those that are not read."""
    try:
        with open_file(path) as file:
            _check_not_compressed(path, file)
            rejected: list[Rejection] = []
            unread: list[str] = []
            members = _read_members(file, rejected, unread)
            clips = _make_clips(path, file, members, rejected, unread)
    except OSError as error:
        raise UnusableClipError(describe_os_error(error)) from error
    return (
        [clip._replace(name=prefix + clip.name) for clip in clips],
        [((prefix + name) if name else (prefix.rstrip("/") or path.name), reason) for name, reason in rejected],
        [prefix + name for name in unread],
    )


def _check_not_compressed(path: StoragePath, file: io.BufferedReader) -> None:
    head = file.read(512)
    file.seek(0)
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    if kind is not None and head[257:262] != b"ustar":
        raise UserError(f"{path} is compressed ({kind}); clips are read in place, so unpack it to a plain .tar")


def _read_members(file: io.BufferedReader, rejected: list[Rejection], unread: list[str]) -> dict[str, _Member]:
    """Return the tar's media and caption files by normalised path; reject entries that might have been one.

    The names of all other files are added to `unread`.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    members: dict[str, _Member] = {}
    for entry in _read_entries(file, rejected):
        name = posixpath.normpath(entry.name)
        if entry.isdir() or any(part.startswith(".") and part != ".." for part in name.split("/")):
            continue
        # Links and devices are rejected whatever their suffix, as their content is unknown.
        if entry.isreg() and get_suffix(name) not in MEDIA and get_suffix(name) not in CAPTION_SUFFIXES:
            unread.append(name)
            continue
        with reject_unusable(rejected, entry.name):
            check_name(entry.name)
            _check_entry(entry, name, end)
            if name in members:
                raise UnusableClipError("another entry before it has the same name")
            members[name] = _Member(name, entry.offset_data, entry.size)
    return members


def _read_entries(file: io.BufferedReader, rejected: list[Rejection]) -> Iterator[tarfile.TarInfo]:
    """Yield the tar's entries up to the first damage, which is rejected under an empty name."""
    last_offset = -1
    try:
        headers = _HeaderFile(file)
        with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (entry := tar.next()) is not None:
                headers.size = 0
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all of them
                if entry.offset_data <= last_offset:  # a negative size would make the reader loop
                    raise tarfile.ReadError("an entry has a negative size")
                last_offset = entry.offset_data
                yield entry
            _check_end(file, tar.offset)
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError, RecursionError) as error:
        # Each of these is raised by damage in some field of a header.
        damaged = f"is damaged ({error}); the entries before are used"
        rejected.append(("", damaged if last_offset >= 0 else f"is not a tar ({error})"))


class _HeaderFile(io.RawIOBase):
    """A tar whose entries' headers may take a limited size: a header of a few bytes may claim a name of gigabytes."""

    def __init__(self, file: io.BufferedReader):
        self._file = file
        self.size = 0
        """Bytes that were read of the headers of one entry."""

    def read(self, size: int = -1) -> bytes:
        self.size += size
        if self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"the headers of an entry have more than {MAX_HEADER_BYTES:,} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _check_end(file: io.BufferedReader, end: int) -> None:
    """Raise if a tar continues after its last entry, as `tarfile` takes a damaged header for the end."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no end mark at byte {end}: the tar is truncated")
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"no entry begins at byte {end}")
    if file.read(1 << 20).strip(b"\0"):
        raise tarfile.ReadError(f"more data after the end at byte {end}, such as another tar; split them")


def _check_entry(entry: tarfile.TarInfo, name: str, end: int) -> None:
    if entry.name.startswith("/") or name.split("/")[0] == "..":
        raise UnusableClipError("its path lies outside of the tar")
    if entry.issym() or entry.islnk():
        raise UnusableClipError(f"is a link to {entry.linkname!r}")
    if not entry.isreg():
        raise UnusableClipError("is not a regular file")
    if entry.issparse():
        raise UnusableClipError("is a sparse entry, which cannot be read in place; make the tar without --sparse")
    if entry.size < 0 or entry.offset_data + entry.size > end:
        raise UnusableClipError("ends after the tar's end; the tar is truncated")


def _get_key(name: str) -> str:
    """Return the path up to the first dot of its last part."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.split(".", 1)[0])


def _make_clips(
    path: StoragePath,
    file: io.BufferedReader,
    members: dict[str, _Member],
    rejected: list[Rejection],
    unread: list[str],
) -> list[ListedClip]:
    """Return a clip for each media member, with the captions of its key; reject captions without media.

    The names of caption files of a key that give no clip a caption are added to `unread`.
    """
    media = [member for member in members.values() if get_suffix(member.name) in MEDIA]
    caption_files: dict[str, list[_Member]] = {}
    for member in members.values():
        if get_suffix(member.name) in CAPTION_SUFFIXES:
            caption_files.setdefault(os.path.splitext(member.name)[0], []).append(member)
    clips: list[ListedClip] = []
    read_names = set[str]()
    for member in media:
        # By WebDataset's rule `a.left.mp4` has the captions of the key `a`; `a.left.txt` is accepted too, so that data
        # sets that break the rule lose no captions.
        stems = dict.fromkeys((os.path.splitext(member.name)[0], _get_key(member.name)))
        with reject_unusable(rejected, member.name):
            texts = _read_captions(file, [texts for stem in stems for texts in caption_files.get(stem, ())])
            read_names.update(texts)
            captions = clean_captions(itertools.chain.from_iterable(texts.values()))
            clips.append(ListedClip(member.name, captions, member.size, str(path), member.offset))
    keys = {_get_key(member.name) for member in media}
    names = [member.name for same_stem in caption_files.values() for member in same_stem]
    rejected += [(name, "no video or image has its key") for name in names if _get_key(name) not in keys]
    unread += [name for name in names if _get_key(name) in keys and name not in read_names]
    return clips


def _read_captions(file: io.BufferedReader, members: list[_Member]) -> dict[str, list[str]]:
    """Return the captions in each of these files, without JSON files that have no field of captions."""
    texts = dict[str, list[str]]()
    for member in sorted(members, key=lambda member: CAPTION_SUFFIXES.index(get_suffix(member.name))):
        if member.size > MAX_CAPTION_FILE_BYTES:
            raise UnusableClipError(f"{member.name!r} {CAPTION_FILE_TOO_LARGE.format(member.size)}")
        file.seek(member.offset)
        if (found := read_caption_file(member.name, file.read(member.size))) is not None:
            texts[member.name] = found
    return texts
