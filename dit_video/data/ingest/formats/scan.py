"""Recursive scan of the files of a folder, on this machine or in a bucket."""

import contextlib
import errno
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from dit_video.core.errors import UserError
from dit_video.core.storage import StoragePath, list_files, read_files, read_range
from dit_video.data.ingest.formats.listing import (
    MEDIA,
    ListedClip,
    Rejection,
    UnusableClipError,
    check_name,
    get_suffix,
)

_FILES_AT_ONCE = 256
"""Number of small files of a bucket that are read at once."""
_LINK_OUT = "is a link out of the source; if it is meant, ingest it with tools/ingest.py --follow-links"


class FolderScan(NamedTuple):
    """Files of a folder by name; no other property of a file is queried until it is used."""

    source: StoragePath
    """Folder that was scanned."""
    files: dict[str, int | None]
    """Sizes in bytes by the files' paths inside the folder, with forward slashes; sorted. A size is None until it is
    queried, on this machine."""
    rejected: tuple[Rejection, ...] = ()
    """Folders that were not entered, with reasons."""
    roots: tuple[str, ...] = ()
    """Folders that links may not lead out of; empty if they may lead anywhere."""
    links: frozenset[str] = frozenset()
    """Names of links among the files."""

    @property
    def media(self) -> list[str]:
        """Return the names of files with the suffix of a video or image."""
        return [name for name in self.files if get_suffix(name) in MEDIA]

    def get_path(self, name: str) -> str:
        """Return the path or address of a file."""
        return os.path.join(str(self.source), name)

    def get_size(self, name: str) -> int:
        """Return the size of a file in bytes.

        Raises:
          FileNotFoundError: If the file does not exist, and was not scanned.
          UnusableClipError: If the file is not a regular file, cannot be read, or is a link out of the source.
        """
        if (size := self.files.get(name)) is not None:
            return size
        if not isinstance(self.source, Path):
            raise FileNotFoundError(self.get_path(name))
        path = self.get_path(name)
        try:
            if name in self.files and name not in self.links:
                return get_file_size(os.lstat(path))  # not followed if it has become a link
            if not is_inside(path, self.roots):
                raise UnusableClipError(_LINK_OUT)
            return get_file_size(os.stat(path))
        except OSError as error:
            if name not in self.files and isinstance(error, FileNotFoundError | NotADirectoryError):
                raise FileNotFoundError(path) from error
            raise UnusableClipError(describe_os_error(error)) from error

    def make_clip(self, name: str, captions: tuple[str, ...] = (), split: str = "") -> ListedClip:
        """Return the clip with a name, which need not have been scanned: the file is hidden, or behind a link.

        Raises:
          FileNotFoundError: If the file does not exist, and was not scanned.
          UnusableClipError: As `get_size`; or if the name is not UTF-8.
        """
        check_name(name)
        return ListedClip(name, captions, self.get_size(name), self.get_path(name), split=split)

    def is_file(self, name: str) -> bool:
        """Return whether a name belongs to a regular file."""
        with contextlib.suppress(FileNotFoundError, UnusableClipError):
            return self.get_size(name) >= 0
        return False

    def make_reader(self, names: Iterable[str], max_bytes: int) -> Callable[[str], bytes]:
        """Return a function that reads small files, in the order of `names`; in a bucket many are read at once.

        The function raises `UnusableClipError` for a file that is too large, or cannot be read.
        """
        upcoming, contents = iter(names), dict[str, bytes]()

        def read(name: str) -> bytes:
            if (size := self.get_size(name)) > max_bytes:  # first, as opening a pipe would block forever
                raise UnusableClipError(f"has {size:,} bytes, {max_bytes:,} is the limit of a caption file")
            if isinstance(self.source, Path):
                try:
                    return read_range(self.get_path(name))
                except OSError as error:
                    raise UnusableClipError(describe_os_error(error)) from error
            if name not in contents:
                batch = [
                    each for each in itertools.islice(upcoming, _FILES_AT_ONCE) if self.get_size(each) <= max_bytes
                ]
                contents.clear()
                contents.update(read_files(self.source, dict.fromkeys([name, *batch])))
            return contents[name]

        return read

    def get_document(self, name: str) -> StoragePath:
        """Return the path of a list or of annotations.

        Raises:
          UserError: If the file is a link out of the source.
        """
        if name in self.links and not is_inside(self.get_path(name), self.roots):
            raise UserError(f"{self.get_path(name)} {_LINK_OUT}")
        return self.source / name


def is_inside(path: str, roots: Sequence[str]) -> bool:
    """Return whether a path, with all links in it followed, lies in one of the folders; True if there are none."""
    real = os.path.realpath(path)
    return not roots or any(real == root or real.startswith(root.rstrip("/") + "/") for root in roots)


def list_file(name: str, path: str) -> ListedClip:
    """Return the file at `path` as a clip called `name`.

    Raises:
      FileNotFoundError: If the file does not exist.
      UnusableClipError: If the file is not a regular file, or its name is not UTF-8.
    """
    check_name(name)
    try:
        return ListedClip(name, (), get_file_size(os.stat(path)), path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(path) from error
    except OSError as error:
        raise UnusableClipError(describe_os_error(error)) from error


def index_files(
    names: Iterable[str], get_key: Callable[[str], str], data_set: str
) -> tuple[dict[str, str], list[Rejection]]:
    """Return the files of a data set by key, and rejections of those whose key occurred before."""
    files: dict[str, str] = {}
    rejected: list[Rejection] = []
    for name in names:
        first_name = files.setdefault(get_key(name), name)
        if first_name != name:
            rejected.append((name, f"is the same clip of {data_set} as {first_name!r}"))
    return files, rejected


def get_file_size(status: os.stat_result) -> int:
    """Return the size of a regular file in bytes.

    Raises:
      UnusableClipError: If the status belongs to a folder, a pipe or a device.
    """
    if not stat.S_ISREG(status.st_mode):
        raise UnusableClipError("is not a regular file")
    return status.st_size


def describe_os_error(error: OSError) -> str:
    """Return the reason why an existing directory entry cannot be read."""
    if error.errno == errno.ENOENT:
        return "is a link to a file that does not exist"
    return f"cannot be read ({error.strerror})"


def scan_folder(source: StoragePath, *, follow_links: bool = False) -> FolderScan:
    """Scan the folder and its subfolders, each once.

    Files and folders whose name begins with a dot are ignored. Links inside the folder are followed; a link to a folder
    that was scanned already (by its own name, or through a link earlier in the order of names) is rejected, so that
    cycles end. A link out of the folder may show what its author cannot read, such as a secret as a caption, so it is
    rejected unless `follow_links`.

    Raises:
      UserError: If the folder itself cannot be read.
    """
    if not isinstance(source, Path):
        sizes = {name: size for name, size in list_files(source).items() if not re.search(r"(^|/)\.", name)}
        return FolderScan(source, dict(sorted(sizes.items())))
    roots = () if follow_links else _find_roots(source)
    files: dict[str, int | None] = {}
    file_links: set[str] = set()
    rejected: list[Rejection] = []
    visited: set[tuple[int, int]] = set()
    links: list[Rejection] = []
    folders = [("", str(source))]
    while folders or links:
        if not folders:
            # Real folders are scanned before links, so that files keep their own names, whatever links to them.
            links.sort(reverse=True)
            folders.append(links.pop())
        prefix, path = folders.pop()
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in visited:
                rejected.append((prefix.rstrip("/"), "links to a folder that is listed already"))
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            if not prefix:
                raise UserError(f"{source} cannot be read ({error.strerror}); make it readable") from error
            rejected.append((prefix.rstrip("/"), describe_os_error(error)))
            continue
        for entry in visible:
            name = prefix + entry.name
            if not _is_folder(entry):
                files[name] = None
                if entry.is_symlink():
                    file_links.add(name)
            elif entry.is_symlink() and not is_inside(entry.path, roots):
                rejected.append((name, _LINK_OUT))
            elif entry.is_symlink():
                links.append((name + "/", entry.path))
            else:
                folders.append((name + "/", entry.path))
    return FolderScan(source, dict(sorted(files.items())), tuple(sorted(rejected)), roots, frozenset(file_links))


def _find_roots(source: Path) -> tuple[str, ...]:
    """Return the folders into which links of a folder may lead: itself, and the blobs if it is of Hugging Face's cache.

    There, files of `snapshots/COMMIT/` link to files of `blobs/`.
    """
    root = Path(os.path.realpath(source))
    snapshots = next((folder for folder in (root, *root.parents) if folder.name == "snapshots"), None)
    return (str(root),) if snapshots is None else (str(root), str(snapshots.parent / "blobs"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # such as a link to itself: a file that cannot be read
