"""Recursive scan of a folder's files."""

import errno
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from dit_video.core.errors import UserError
from dit_video.data.ingest.formats.types import MEDIA, ListedClip, Rejection, UnusableClipError, check_name


class FolderScan(NamedTuple):
    """Files of a folder by name; no other property of a file is queried until it is used."""

    source: Path
    """Folder that was scanned."""
    files: dict[str, os.DirEntry[str]]
    """Files by their path inside the folder, with forward slashes; sorted."""
    rejected: tuple[Rejection, ...] = ()
    """Folders that were not entered, with reasons."""

    @property
    def media(self) -> list[str]:
        """Return the names of files with the suffix of a video or image."""
        return [name for name in self.files if get_suffix(name) in MEDIA]

    def make_clip(self, name: str, captions: tuple[str, ...] = (), split: str = "") -> ListedClip:
        """Return the clip with a name.

        Raises:
          UnusableClipError: the file is not a regular file, or its name is not UTF-8.
        """
        check_name(name)
        entry = self.files[name]
        try:
            status = entry.stat()
        except OSError as error:
            raise UnusableClipError(describe_os_error(error)) from error
        return ListedClip(name, captions, get_file_size(status), str(self.source / name), split=split)


def list_file(name: str, path: str) -> ListedClip:
    """Return the file at `path` as a clip called `name`.

    Raises:
      FileNotFoundError: the file does not exist.
      UnusableClipError: the file is not a regular file, or its name is not UTF-8.
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


def get_suffix(name: str) -> str:
    """Return the suffix of a name in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def get_file_size(status: os.stat_result) -> int:
    """Return the size of a regular file in bytes.

    Raises:
      UnusableClipError: the status is that of a folder, a pipe or a device.
    """
    if not stat.S_ISREG(status.st_mode):
        raise UnusableClipError("is not a regular file")
    return status.st_size


def describe_os_error(error: OSError) -> str:
    """Return the reason why an existing directory entry cannot be read."""
    if error.errno == errno.ENOENT:
        return "is a link to a file that does not exist"
    return f"cannot be read ({error.strerror})"


def scan_folder(source: Path) -> FolderScan:
    """Scan the folder and its subfolders, each once.

    Files and folders whose name begins with a dot are ignored. Links are followed; a link to a folder that was scanned
    already (by its own name, or through a link earlier in the order of names) is rejected, so that cycles end.

    Raises:
      UserError: the folder itself cannot be read.
    """
    files: dict[str, os.DirEntry[str]] = {}
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
                files[name] = entry
            elif entry.is_symlink():
                links.append((name + "/", entry.path))
            else:
                folders.append((name + "/", entry.path))
    return FolderScan(source, dict(sorted(files.items())), tuple(sorted(rejected)))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # such as a link to itself: a file that cannot be read
