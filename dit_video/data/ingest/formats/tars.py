"""Listing of WebDataset: tars in which members with the same key form one sample.

A member's key is its path up to the first dot of its last part (`a/0001.mp4` and `a/0001.txt` have the key `a/0001`),
as in WebDataset's `base_plus_ext`. Members with the same key need not be adjacent here.

Source: https://github.com/webdataset/webdataset (webdataset/tariterators.py)
"""

import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dit_video.core.errors import UserError
from dit_video.data.ingest.formats import captions
from dit_video.data.ingest.formats.listed import (
    MEDIA,
    Listed,
    Listing,
    Rejected,
    Unusable,
    check_name,
    finished,
    quoted,
)
from dit_video.data.ingest.formats.scan import Scan, reason_of, size_of, suffix_of

TAR = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


def list_tar(source: Path) -> Listing:
    """Return the clips of one tar, named by their paths in it.

    Raises:
      UserError: the file is compressed, or is not a tar.
    """
    try:
        size_of(source.stat())  # first, as opening a pipe would block forever
        clips, rejected = _list_shard(source, "")
    except Unusable as error:
        raise UserError(f"{source} {error}; make it readable") from error
    return finished(source, "webdataset", clips, rejected=rejected)


def list_tars(scan: Scan) -> Listing:
    """Return the clips of a folder of tars, named `shard.tar/path/in/it`; media next to the tars are left out.

    Raises:
      UserError: a tar is compressed.
    """
    clips: list[Listed] = []
    rejected: list[Rejected] = []
    for name in scan.files:
        if not is_tar(name):
            continue
        try:
            scan.listed(name)
            shard_clips, shard_rejected = _list_shard(scan.source / name, name + "/")
        except Unusable as error:
            rejected.append((name, str(error)))
            continue
        clips += shard_clips
        rejected += shard_rejected
    return finished(scan.source, "webdataset", clips, unlisted=scan.media, rejected=[*rejected, *scan.rejected])


def is_tar(name: str) -> bool:
    """Return whether a name has the suffix of a tar, compressed or not."""
    return name.lower().endswith((TAR, *COMPRESSED))


def _list_shard(path: Path, prefix: str) -> tuple[list[Listed], list[Rejected]]:
    """Return the clips and the rejected members, in the order of the tar."""
    try:
        with path.open("rb") as file:
            _refuse_compressed(path, file)
            rejected: list[Rejected] = []
            members = _members(path, file, rejected)
            clips = _clips(path, file, members, rejected)
    except OSError as error:
        raise Unusable(reason_of(error)) from error
    return (
        [clip._replace(name=prefix + clip.name) for clip in clips],
        [((prefix + name) if name else (prefix.rstrip("/") or path.name), reason) for name, reason in rejected],
    )


def _refuse_compressed(path: Path, file: BinaryIO) -> None:
    head = file.read(512)
    file.seek(0)
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    if kind is not None and head[257:262] != b"ustar":
        raise UserError(
            f"{path} is compressed ({kind}); clips are read in place, so unpack it to a plain .tar "
            "(videos gain nothing from it)"
        )


def _members(path: Path, file: BinaryIO, rejected: list[Rejected]) -> dict[str, _Member]:
    """Return the tar's media and caption files by normalised path; reject entries that might have been one."""
    end = os.fstat(file.fileno()).st_size
    members: dict[str, _Member] = {}
    for entry in _entries(file, rejected):
        name = posixpath.normpath(entry.name)
        if entry.isdir() or any(part.startswith(".") and part != ".." for part in name.split("/")):
            continue
        # Links and devices are rejected whatever their suffix, as their content is unknown.
        if entry.isreg() and suffix_of(name) not in MEDIA and suffix_of(name) not in captions.FILES:
            continue
        try:
            check_name(entry.name)
            _check_entry(entry, name, end)
            if name in members:
                raise Unusable("another entry before it has the same name")
            members[name] = _Member(name, entry.offset_data, entry.size)
        except Unusable as error:
            rejected.append((entry.name, str(error)))
    return members


def _entries(file: BinaryIO, rejected: list[Rejected]) -> Iterator[tarfile.TarInfo]:
    """Yield the tar's entries up to the first damage, which is rejected under an empty name."""
    last_offset = -1
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (entry := tar.next()) is not None:
                if entry.offset_data <= last_offset:  # a negative size would make the reader loop
                    raise tarfile.ReadError("an entry has a negative size")
                last_offset = entry.offset_data
                yield entry
            _check_end(file, tar.offset)
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError, RecursionError) as error:
        # Each of these is raised by damage in some field of a header.
        rejected.append(
            ("", f"is not a tar ({error})" if last_offset < 0 else f"is damaged ({error}); the entries before are used")
        )


def _check_end(file: BinaryIO, end: int) -> None:
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
        raise Unusable("its path lies outside of the tar")
    if entry.issym() or entry.islnk():
        raise Unusable(f"is a link to {quoted(entry.linkname)}")
    if not entry.isreg():
        raise Unusable("is not a regular file")
    if entry.issparse():
        raise Unusable("is a sparse entry, which cannot be read in place; make the tar without --sparse")
    if entry.size < 0 or entry.offset_data + entry.size > end:
        raise Unusable("ends after the tar's end; the tar is truncated")


def _key(name: str) -> str:
    """Return the path up to the first dot of its last part."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.split(".", 1)[0])


def _clips(path: Path, file: BinaryIO, members: dict[str, _Member], rejected: list[Rejected]) -> list[Listed]:
    """Return a clip for each media member, with the captions of its key; reject captions without media."""
    media = [member for member in members.values() if suffix_of(member.name) in MEDIA]
    caption_files: dict[str, list[_Member]] = {}
    for member in members.values():
        if suffix_of(member.name) in captions.FILES:
            caption_files.setdefault(os.path.splitext(member.name)[0], []).append(member)
    clips: list[Listed] = []
    for member in media:
        # By WebDataset's rule `a.left.mp4` has the captions of the key `a`; `a.left.txt` is accepted too, so that data
        # sets that break the rule lose no captions.
        stems = dict.fromkeys((os.path.splitext(member.name)[0], _key(member.name)))
        try:
            texts = _read_captions(
                file, [caption_file for stem in stems for caption_file in caption_files.get(stem, ())]
            )
            clips.append(Listed(member.name, texts, member.size, str(path), member.offset))
        except Unusable as error:
            rejected.append((member.name, str(error)))
    keys = {_key(member.name) for member in media}
    orphans = [
        caption_file.name
        for caption_members in caption_files.values()
        for caption_file in caption_members
        if _key(caption_file.name) not in keys
    ]
    rejected += [(name, "no video or image has its key") for name in orphans]
    return clips


def _read_captions(file: BinaryIO, members: list[_Member]) -> tuple[str, ...]:
    texts: list[str] = []
    for member in sorted(members, key=lambda member: captions.FILES.index(suffix_of(member.name))):
        if member.size > captions.LARGEST_FILE:
            too_large = f"has {member.size:,} bytes, {captions.LARGEST_FILE:,} is the limit of a caption file"
            raise Unusable(f"{quoted(member.name)} {too_large}")
        file.seek(member.offset)
        texts += captions.of_file(member.name, file.read(member.size))
    return captions.tidy(texts)
